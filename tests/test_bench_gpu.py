"""The GPU run, rehearsed on a CPU with small shapes; and that it notices what is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amsoftmax_kernels import backends
from bench.gpu import checks as gpu_checks
from bench.gpu import command as gpu
from bench.gpu import graphs as gpu_graphs
from bench.gpu import peers as gpu_peers
from bench.gpu import smoke as gpu_smoke
from bench.gpu import times as gpu_times
from bench.gpu import undecided as gpu_undecided
from bench.gpu import whole_steps as gpu_whole_steps
from bench.loss.peers import MARGIN, SCALE, eager, problem

from .cases import relative
from .processes import ended

CPU = torch.device("cpu")


def small_backbone(D: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, D))


SHAPES: dict[str, Any] = {
    "correctness": {"small": [(5, 20, 30, {}), (6, 20, 40, {"scale": 200.0})], "large": []},
    "determinism": {"shapes": ((8, 16, 40),)},
    "graph": {"captured": [(8, 16, 40, {"scale": "on the device", "margin": "one a class"})], "head": (8, 16, 40)},
    "undecided": {
        "chunks": [(8, 16, 48)], "steps": [(8, 16, 40)], "backbone": (4, 16, 40, 8), "make": small_backbone,
    },
    "times": [(8, 16, 40)],
    "steps": {"shapes": [(8, 16, 40)], "checked": [(8, 16, 40)]},
    "size": 64,
    "profile": {"shapes": ((8, 16, 40),)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with all backends, and leaves them so; what is timed is timed once."""
    monkeypatch.setattr(backends, "NAMES", backends.NAMES)
    monkeypatch.setattr(gpu_checks, "left_out", {})
    monkeypatch.setattr(gpu_checks.clock, "ends", math.inf)
    gpu_checks.not_compiled.clear()
    for module in (gpu_graphs, gpu_undecided, gpu_whole_steps):
        monkeypatch.setattr(module, "SECONDS", 0.0)
    for name in ("triton", "cuda"):
        kernels: Any = backends.load(name)._Kernels  # type: ignore[attr-defined]
        monkeypatch.setattr(kernels, "grad_centres", kernels.grad_centres)


def test_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "NAMES", ("chunked", "reference"))  # others are interpreted
    stages = ("compile", "smoke", "correctness", "determinism", "graph", "undecided", "times", "steps", "profile")
    assert gpu.run_stages(tmp_path, stages, True, CPU, SHAPES) == 0
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert set(report["stages"]) == {*stages, "ceilings", "seconds"} and path.with_suffix(".png").exists()
    found = report["stages"]
    assert found["compile"][0]["compiled"] == ["chunked float32 D=16", "chunked float32 D=16 scale=200.0"]
    for stage in ("smoke", "correctness", "determinism", "graph"):
        assert found[stage] and all(row["ok"] and row["backend"] == "chunked" for row in found[stage])
    ways = {gpu_graphs.GRAPHED, gpu_graphs.REDUCED, gpu_graphs.TRAINED}
    assert {row["way"] for row in found["graph"] if "way" in row} == ways
    assert all(row["graph_s"] > 0 and row["launched_s"] > 0 for row in found["graph"])
    questions = {row["question"]: set(row["seconds"]) for row in found["undecided"]}
    assert questions == {
        "E·ŵ": {"mm", "bmm of 8, sum"}, "chunked: a graph under a ResNet-50": {"launched", "graph"},
    }  # fmt: skip
    timed = {row["peer"] for row in found["times"] if "median_s" in row}
    assert timed >= {"eager PyTorch", "PartialFC algorithm"}
    steps = {row["way"]: row["median_s"] for row in found["steps"] if "way" in row}
    assert found["steps"][0]["ok"] and found["steps"][0]["apart"] < 1e-5 and min(steps.values()) > 0
    assert {name.split(", ")[-1] for name in steps} == {"FusedSGD", "torch.optim.SGD"} and len(steps) == 5
    printed = capsys.readouterr().out
    assert "every check that ran passed" in printed and "every check ran" in printed


def test_stages_come_in_the_order_that_is_documented() -> None:
    assert gpu.STAGES[:6] == ("compile", "smoke", "correctness", "determinism", "terms", "graph")
    assert gpu.STAGES[-3:] == ("sanitizer", "races", "tests") and set(gpu.QUICK) < set(gpu.STAGES)


def test_a_wrong_backend_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_checks.ak.am_softmax_loss

    def wrong(*args: Any, backend: str, **options: Any) -> Tensor:
        return right(*args, backend=backend, margin=0.35 if backend == "reference" else 0.3499, **options)

    monkeypatch.setattr(gpu_checks.ak, "am_softmax_loss", wrong)
    assert gpu.run_stages(tmp_path, ("correctness",), True, CPU, SHAPES) == 1


def test_what_breaks_within_a_stage_leaves_its_other_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One backend raises, without a word; one shape does not fit the memory; and a stage stops after its first row."""
    right = gpu_checks.take_step

    def step(*args: Any) -> Any:
        if args[3] == "triton":
            raise AssertionError
        if args[3] == "reference" and len(args[0]) == 6:
            raise torch.OutOfMemoryError("too much\nindeed")
        return right(*args)

    def broken(*unused: Any, **also: Any) -> Any:
        yield {"backend": "chunked", "ok": True}
        raise ZeroDivisionError

    monkeypatch.setattr(gpu_checks, "compared_backends", lambda device: ["triton", "chunked"])
    monkeypatch.setattr(gpu_checks, "serves", lambda *_: True)
    monkeypatch.setattr(gpu_checks, "take_step", step)
    monkeypatch.setattr(gpu_checks, "determinism", broken)
    assert gpu.run_stages(tmp_path, ("correctness", "determinism"), True, CPU, SHAPES) == 1
    stages = json.loads(next(tmp_path.glob("*.json")).read_text())["stages"]
    correctness = stages["correctness"]
    assert {row["ok"] for row in correctness if row.get("backend") == "chunked"} == {True}
    assert {row["error"] for row in correctness if row.get("backend") == "triton"} == {"AssertionError: "}
    assert [row["skipped"] for row in correctness if row["ok"] is None] == ["OutOfMemoryError: too much"]
    assert [row["ok"] for row in stages["determinism"]] == [True, False]
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "NOT RUN\ncorrectness: B=6" in printed and "every check" not in printed


def test_a_child_that_does_not_end_is_killed_with_its_own(tmp_path: Path) -> None:
    row = gpu_checks.run_child(["bash", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid; echo begun; wait"], 4)
    assert row["ok"] is None and "4 s" in row["skipped"] and row["output"] == "begun\n"
    assert ended(int((tmp_path / "pid").read_text()))
    assert gpu_checks.run_child(["true"], 100)["ok"] is True and gpu_checks.run_child(["false"], 100)["ok"] is False


def test_peers_stand_only_in_rows_of_their_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_times, "OTHER_DTYPES", {"float32": (8, 16, 40)})
    monkeypatch.setattr(gpu_times, "SHAPES", [(8, 16, 40)])
    monkeypatch.setattr(gpu_times, "_measure", lambda *_: {"median_s": 0.1, "loss": 1.0})
    known = gpu_times.ceilings(CPU, [(8, 16, 40)], 64)
    rows = [row for row in gpu_times.times(CPU, known, False) if row["peer"] == "PartialFC algorithm"]
    assert ["median_s" in row for row in rows] == [True, False] and rows[1]["skipped"] == "computes in float16"


def test_determinism_is_checked_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = gpu_checks.take_step, iter(range(1000))
    monkeypatch.setattr(gpu_checks, "take_step", lambda *args: tuple(each + 1e-6 * next(calls) for each in right(*args)))
    assert not any(row["ok"] for row in gpu_checks.determinism(CPU, 2, ((8, 16, 40),)))


def test_the_partial_fc_algorithm_is_the_same_loss() -> None:
    """Up to its cosines in half precision."""
    tensors = problem(16, 32, 100, CPU)
    results = []
    for loss in (gpu_peers.partial_fc, eager):
        value = loss(*tensors)
        results.append((value.detach(), *torch.autograd.grad(value, tensors[:2])))
    for actual, expected in zip(*results, strict=True):
        assert relative(actual, expected) < 0.05
    assert MARGIN == 0.35 and SCALE == 30.0


def test_floors_count_products_and_bytes() -> None:
    known = {"copy_bytes_s": 1e9, "shapes": [{"B": 8, "D": 16, "C": 40, "seconds": [1.0, 2.0, 3.0]}]}
    floors = gpu_times._floors(8, 16, 40, "bfloat16", known, CPU)
    moved = 12 * 40 * 16 / 1e9
    assert floors == {3: pytest.approx(6 + moved), 4: pytest.approx(7 + moved)}
    known |= {"products_flop_s": {"bfloat16": 1e6}}
    assert gpu_times._card_floor(4, 8, 16, 40, "bfloat16", known) == pytest.approx(8 * 8 * 16 * 40 / 1e6 + moved)


def test_what_is_given_normalized_is_the_same_step() -> None:
    """Values alike; gradients are those of the normalized tensors, in bfloat16."""
    tensors = problem(16, 32, 100, CPU)
    x, w, labels = gpu_peers.pre_normalized(*tensors)
    assert (x.dtype, w.dtype) == (torch.bfloat16, torch.bfloat16) and x.is_leaf and w.is_leaf
    whole = gpu_peers._whole(lambda: lambda x, w, y: torch.nn.functional.cross_entropy((x @ w.T).float(), y))()
    alone = torch.nn.functional.cross_entropy((x @ w.T).float(), labels)
    assert torch.equal(whole(*tensors), alone)
    assert [each.dtype for each in torch.autograd.grad(alone, (x, w))] == [torch.bfloat16] * 2
    assert [each.dtype for each in torch.autograd.grad(whole(*tensors), tensors[:2])] == [torch.float32] * 2
    x, w, _ = gpu_peers.half_centres(*tensors)
    assert x is tensors[0] and w.dtype == torch.bfloat16 and w.is_leaf and w.requires_grad
    needed = {peer.name: 8 * 512 * 10**7 + peer.memory(4096, 512, 10**7) for peer in gpu_peers.peers()}
    assert needed["chunked, bfloat16 centres"] == 2 * 4096 * 10**7 + 4 * 512 * 10**7 < needed["chunked, E kept"]
    names = {peer.name for peer in gpu_peers.peers()}
    assert names >= {f"{name}{how}" for name in ("CCE", "Liger", "quack") for how in ("", ", pre-normalized")}


def test_a_step_of_minutes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the one of the shape before took."""
    monkeypatch.setattr(gpu_times, "SLOWEST", 0.5)
    monkeypatch.setattr(gpu_times, "OTHER_DTYPES", {})
    monkeypatch.setattr(gpu_times, "SHAPES", shapes := [(8, 16, 40), (8, 16, 400)])
    monkeypatch.setattr(gpu_times, "_measure", lambda *_: {"median_s": 0.1, "loss": 1.0})
    rows = list(gpu_times.times(CPU, gpu_times.ceilings(CPU, shapes, 64), False))
    taken = [("median_s" in row, row.get("skipped")) for row in rows if row["peer"] == "eager PyTorch"]
    assert taken == [(True, None), (False, "would take some 1 s a step")]


def test_a_run_ends_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is named; what a stage has done is kept, and a child is not given more than there is."""
    monkeypatch.setattr(gpu_checks.clock, "ends", math.inf)

    def slow(*unused: Any, **also: Any) -> Any:
        yield {"backend": "chunked", "ok": True}
        gpu_checks.clock.ends = time.perf_counter()  # the time is up
        yield {"backend": "triton"} | gpu_checks.run_child(["sleep", "1000"], 1000)
        raise AssertionError

    monkeypatch.setattr(gpu_checks, "correctness", slow)
    assert gpu.run_stages(tmp_path, ("correctness", "determinism"), True, CPU, SHAPES, seconds=1000) == 0
    stages = json.loads(next(tmp_path.glob("*.json")).read_text())["stages"]
    assert [row["ok"] for row in stages["correctness"]] == [True, None, None]
    assert stages["determinism"] == gpu.OUT_OF_TIME
    printed = capsys.readouterr().out
    assert "NOT RUN\n" in printed and "determinism: ok=None  skipped=out of time" in printed


def test_a_run_that_hangs_is_ended(tmp_path: Path) -> None:
    """And its children with it; what it has found by then is written."""
    code = f"""
import torch
from pathlib import Path
from bench.gpu import command as gpu, checks as gpu_checks
def hangs(*unused, **also):
    yield {{"backend": "chunked", "ok": True}}
    with gpu._ended_after(3):
        gpu_checks.run_child(["bash", "-c", "echo $$ > {tmp_path}/pid; sleep 1000"], 1000)
gpu_checks.correctness = hangs
gpu.run_stages(Path("{tmp_path}"), ("correctness",), True, torch.device("cpu"))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300)
    assert result.returncode == 1 and "the time is up" in result.stdout, result.stderr
    stages = json.loads(next(tmp_path.glob("*.json")).read_text())["stages"]
    assert stages["correctness"] == [{"backend": "chunked", "ok": True}]
    assert ended(int((tmp_path / "pid").read_text()))


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from bench.__main__ import main

    for command in ("gpu", "tune"):
        with pytest.raises(SystemExit, match="finds no GPU"):
            main([command])


def test_the_sanitizer_runs_every_tool_on_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run_child(command: list[str], seconds: float, environment: dict[str, str]) -> dict[str, Any]:
        assert seconds <= 100 and environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        commands.append(command)
        return {"ok": True}

    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name, path=None: name)
    monkeypatch.setattr(gpu_checks, "compared_backends", lambda device: ["triton", "cuda", "chunked"])
    monkeypatch.setattr(gpu_checks, "run_child", run_child)
    rows = [row for tools in (gpu_checks.MEMORY, gpu_checks.RACES) for row in gpu_checks.sanitizer(CPU, tools)]
    tools = ("memcheck", "synccheck", "racecheck")
    assert [(row["tool"], row["backend"]) for row in rows] == [(t, b) for t in tools for b in ("triton", "cuda")]
    assert all(command[-2] == row["backend"] and command[-1] == "--few" for command, row in zip(commands, rows, strict=True))


def test_every_kernels_gpu_tests_are_in_the_run() -> None:
    folder = Path(__file__).parent
    marked = {path.stem.removeprefix("test_") for path in folder.glob("test_*.py") if "mark.gpu" in path.read_text()}
    of_ranks = {"sharded", "sharded_training", "sharded_checkpoint", "sampling", "bench_train", "bench_gpu"}
    assert marked - of_ranks <= set(gpu_checks.TESTS)
    assert all((folder / f"test_{name}.py").exists() for name in gpu_checks.TESTS)


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a smoke child, in a graph's replay, and beside another way."""
    monkeypatch.setattr(gpu_graphs, "compared_backends", lambda device: ["chunked"])
    monkeypatch.setattr(gpu_undecided, "compared_backends", lambda device: ["chunked"])
    right, capture = gpu_smoke.take_step, gpu_graphs.capture

    def stale(*arguments: Any) -> Any:
        _, results = capture(*arguments)
        return lambda: [each.add_(1) for each in results], results

    monkeypatch.setattr(gpu_graphs, "capture", stale)
    assert not next(gpu_graphs.graphs(CPU, [(8, 16, 40, {})]))["ok"]
    monkeypatch.setattr(gpu_smoke, "take_step", lambda *args: tuple(each * (1 + 0.03 * args[4]) for each in right(*args)))
    assert gpu_smoke.main(["cpu", "chunked"]) == 1
    monkeypatch.setattr(torch, "bmm", lambda a, b: torch.matmul(a, b) * 1.1)
    assert not next(gpu_undecided.undecided(CPU, [(8, 16, 48)]))["ok"]


def test_the_ways_to_the_centres_gradient_are_compared() -> None:
    if not backends.serves("triton", CPU, torch.float32):
        pytest.skip("Triton is not interpreted here")
    row = gpu_undecided._row("", (8, 16, 48), lambda: gpu_undecided._gradients("triton", 8, 16, 48, CPU), CPU)
    assert row["ok"] and set(row["seconds"]) == {"product and pass", "one kernel"}


def test_the_plain_resnet_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_undecided.importlib.util, "find_spec", lambda name: None)
    network = gpu_undecided.resnet50(1000)
    assert sum(each.numel() for each in network.parameters()) == 25_557_032
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
