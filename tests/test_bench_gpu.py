"""The GPU run, rehearsed on a CPU with small shapes; and that it notices what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import triton_launch
from amsoftmax_kernels.backends.triton import tiles as triton_configs
from bench import gpu, gpu_checks, gpu_peers, gpu_smoke, gpu_targets, gpu_times, tune
from bench.peers import MARGIN, SCALE, eager, problem

from .cases import relative

CPU = torch.device("cpu")
SHAPES: dict[str, Any] = {
    "correctness": {"small": [(5, 20, 30, {}), (6, 20, 40, {"scale": 200.0})], "large": []},
    "determinism": {"shapes": ((8, 16, 40),)},
    "times": [(8, 16, 40)],
    "size": 64,
    "profile": {"shapes": ((8, 16, 40),)},
}


def test_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "NAMES", ("chunked", "reference"))  # others are interpreted
    stages = ("smoke", "correctness", "determinism", "times", "profile")
    assert gpu.run_stages(tmp_path, stages, True, CPU, SHAPES) == 0
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert set(report["stages"]) == {*stages, "ceilings", "seconds"} and path.with_suffix(".png").exists()
    checked = {row["backend"] for row in report["stages"]["correctness"]}
    assert "chunked" in checked and all(row["ok"] for row in report["stages"]["correctness"])
    timed = {row["peer"] for row in report["stages"]["times"] if "median_s" in row}
    assert timed >= {"eager PyTorch", "PartialFC algorithm"}
    printed = capsys.readouterr().out
    assert "every check that ran passed" in printed and "every check ran" in printed


def test_a_wrong_backend_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_checks.ak.am_softmax_loss

    def wrong(*args: Any, backend: str, **options: Any) -> Tensor:
        return right(*args, backend=backend, margin=0.35 if backend == "reference" else 0.3499, **options)

    monkeypatch.setattr(gpu_checks.ak, "am_softmax_loss", wrong)
    assert gpu.run_stages(tmp_path, ("correctness",), True, CPU, SHAPES) == 1


def test_a_broken_stage_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "correctness", lambda *_, **__: 1 / 0)
    assert gpu.run_stages(tmp_path, ("correctness", "determinism"), True, CPU, SHAPES) == 1
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert "ZeroDivisionError" in report["stages"]["correctness"]["error"]
    assert all(row["ok"] for row in report["stages"]["determinism"])


def test_what_breaks_within_a_stage_leaves_its_other_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One backend raises, without a word; one shape does not fit the memory; and a stage stops after its first row."""
    right = gpu_checks._step

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
    monkeypatch.setattr(gpu_checks, "_serves", lambda *_: True)
    monkeypatch.setattr(gpu_checks, "_step", step)
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
    command = ["bash", "-c", f"(sleep 2; touch {tmp_path}/late) & echo begun; wait"]
    row = gpu_checks.run_child(command, 0.5)
    assert row["ok"] is None and "0.5 s" in row["skipped"] and row["output"] == "begun\n"
    assert gpu_checks.run_child(["true"], 10)["ok"] is True and gpu_checks.run_child(["false"], 10)["ok"] is False
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_peers_stand_only_in_rows_of_their_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_times, "OTHER_DTYPES", {"float32": (8, 16, 40)})
    monkeypatch.setattr(gpu_times, "SHAPES", [(8, 16, 40)])
    known = gpu_times.ceilings(CPU, [(8, 16, 40)], 64)
    rows = [row for row in gpu_times.times(CPU, known, False) if row["peer"] == "PartialFC algorithm"]
    assert ["median_s" in row for row in rows] == [True, False] and rows[1]["skipped"] == "computes in float16"


def test_determinism_is_checked_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = gpu_checks._step, iter(range(1000))
    monkeypatch.setattr(gpu_checks, "_step", lambda *args: tuple(each + 1e-6 * next(calls) for each in right(*args)))
    assert not any(row["ok"] for row in gpu_checks.determinism(CPU, 2, ((8, 16, 40),)))


def test_relative_errors() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert gpu_checks._relative(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert gpu_checks._relative(torch.tensor([3.0, float("nan")]), exact) == float("inf")


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


def test_a_smoke_stage_that_ends_early_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backends, "NAMES", backends.NAMES)

    def smoke(*unused: Any) -> Any:
        yield {"backend": "chunked", "without": None, "ok": True}
        raise OSError("no such child")

    monkeypatch.setattr(gpu_smoke, "smoke", smoke)
    assert gpu.run_stages(tmp_path, ("smoke", "determinism"), True, CPU, SHAPES) == 1
    stages = json.loads(next(tmp_path.glob("*.json")).read_text())["stages"]
    assert stages["smoke"][1]["error"] == "OSError: no such child"
    assert all(row["ok"] for row in stages["determinism"])


def test_a_backend_is_not_broken_for_want_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "run_child", lambda *_: {"ok": None, "skipped": "did not end", "output": ""})
    assert gpu_smoke._ask(CPU, "triton", None, 60)["ok"] is False
    monkeypatch.setattr(gpu_checks.clock, "ends", 0.0)
    row = gpu_smoke._ask(CPU, "triton", None, 60)
    assert row["ok"] is None and gpu_smoke.leave_out([row]) == []


def test_a_step_of_minutes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the one of the shape before took."""
    monkeypatch.setattr(gpu_times, "SLOWEST", 0.5)
    monkeypatch.setattr(gpu_times, "OTHER_DTYPES", {})
    monkeypatch.setattr(gpu_times, "SHAPES", shapes := [(8, 16, 40), (8, 16, 400)])
    monkeypatch.setattr(gpu_times, "_measure", lambda *_: {"median_s": 0.1, "loss": 1.0})
    rows = list(gpu_times.times(CPU, gpu_times.ceilings(CPU, shapes, 64), False))
    taken = [("median_s" in row, row.get("skipped")) for row in rows if row["peer"] == "eager PyTorch"]
    assert taken == [(True, None), (False, "would take some 1 s a step")]


def test_every_kernels_gpu_tests_are_in_the_run() -> None:
    folder = Path(__file__).parent
    marked = {path.stem.removeprefix("test_") for path in folder.glob("test_*.py") if "mark.gpu" in path.read_text()}
    of_ranks = {"sharded", "sharded_training", "sharded_checkpoint", "sampling", "bench_train", "bench_gpu"}
    assert marked - of_ranks <= set(gpu_checks.TESTS)
    assert all((folder / f"test_{name}.py").exists() for name in gpu_checks.TESTS)


def test_targets_are_compared() -> None:
    def row(peer: str, shape: tuple[int, int, int], median_s: float, **also: Any) -> dict[str, Any]:
        B, D, C = shape
        return {"B": B, "D": D, "C": C, "dtype": "bfloat16", "peer": peer, "median_s": median_s, **also}

    small, million = gpu_targets.SMALL, gpu_targets.MILLION
    times = [
        row("triton, E kept", small, 0.2e-3, of_card_floor=0.1, peak_bytes=1),
        row("triton, E kept", million, 3e-3, of_card_floor=0.7, peak_bytes=4_000_000_000),
        row("cuda, E kept", million, 2.9e-3, of_card_floor=0.75, peak_bytes=2_000_000_000),
        row("triton, recomputed", million, 3.6e-3, of_card_floor=0.74, peak_bytes=1_000_000_000),
        row("PartialFC algorithm", million, 9e-3, of_card_floor=0.2, peak_bytes=10_000_000_000),
        row("cuda, bfloat16 centres", million, 2.7e-3, of_card_floor=0.9, peak_bytes=1),
        row("CCE, pre-normalized", million, 2.8e-3, of_card_floor=0.5, peak_bytes=1),
        {"B": 1, "D": 1, "C": 1, "dtype": "bfloat16", "peer": "quack", "skipped": "quack is not installed"},
    ]
    graph = [{"backend": "cuda", "B": 256, "D": 512, "C": 10_516, "kept": True, "replay_s": 0.05e-3, "ok": True}]
    profile = [
        {"peer": f"{name}, E kept", "B": 1024, "D": 512, "C": 1_000_000, "kernels": [{"name": "cosine_exp", "seconds": s}]}
        for name, s in (("triton", 1.3), ("cuda", 1.0))
    ]
    found = {each["target"]: each for each in gpu_targets.targets({"times": times, "graph": graph, "profile": profile})}
    assert {name: each["met"] for name, each in found.items()} == {
        "triton, E kept: share of the floor": True,
        "cuda, E kept: share of the floor": False,
        "triton, recomputed: share of the floor": False,
        "ms launched one by one": False,
        "times the PartialFC algorithm's speed": True,
        "of the PartialFC algorithm's memory": True,
        "of the time of CCE, pre-normalized": False,
        "of the time of CCE, pre-normalized, bfloat16 centres": True,
        "cuda, E kept: ms replayed": True,
        "cuda, E kept: times the speed of Triton's cosine kernel": True,
    }
    assert found["times the PartialFC algorithm's speed"]["found"] == pytest.approx(9 / 2.9)
    assert not list(gpu_targets.targets({"times": {"ok": False, "error": "it broke"}}))


def test_a_run_ends_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is named; what a stage has done is kept, and a child is not given more than there is."""
    monkeypatch.setattr(gpu_checks.clock, "ends", math.inf)

    def slow(*unused: Any, **also: Any) -> Any:
        yield {"backend": "chunked", "ok": True}
        time.sleep(1)
        yield {"backend": "triton"} | gpu_checks.run_child(["sleep", "60"], 50)
        raise AssertionError

    monkeypatch.setattr(gpu_checks, "correctness", slow)
    start = time.perf_counter()
    assert gpu.run_stages(tmp_path, ("correctness", "determinism"), True, CPU, SHAPES, seconds=2) == 0
    assert time.perf_counter() - start < 20
    stages = json.loads(next(tmp_path.glob("*.json")).read_text())["stages"]
    assert [row["ok"] for row in stages["correctness"]] == [True, None, None]
    assert stages["determinism"] == gpu.OUT_OF_TIME
    printed = capsys.readouterr().out
    assert "NOT RUN\n" in printed and "determinism: ok=None  skipped=out of time" in printed


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from bench.__main__ import main

    for command in ("gpu", "tune"):
        with pytest.raises(SystemExit, match="finds no GPU"):
            main([command])


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("how", list(tune.KINDS))
def test_candidates(capability: tuple[int, int], how: str) -> None:
    from amsoftmax_kernels.backends.triton import tiles as triton_configs

    found = list(tune.candidates(capability, how))
    assert found[0] == triton_configs.config(capability, how) and len(found) > 4
    for config in found:
        assert all(size & (size - 1) == 0 for size in (config.rows, config.classes, config.depth))
        assert config.bulk == (capability[0] >= 9 and how != "float32")


def test_tuning_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions on a CPU: a candidate is scored, one that fails says so, whole steps are timed by sizes of chunks."""
    from amsoftmax_kernels.backends import triton as backend

    if not backend.serves(CPU, torch.float32):
        pytest.skip("Triton is not interpreted here")
    monkeypatch.setattr(tune, "SHAPES", [(8, 16, 40)])
    sums: list[Tensor] = []
    row = tune._score(backend._INTERPRETED, "float32", CPU, sums)
    assert row["score"] > 0 and "TFLOP/s" in tune._line(row) and sums[0].shape == (8,)
    failed = tune._score(dataclasses.replace(backend._INTERPRETED, rows=24), "float32", CPU, sums)
    assert "failed" in failed and failed["failed"] in tune._line(failed)
    wrong = tune._score(backend._INTERPRETED, "float32", CPU, [sums[0] * 1.01])
    assert "9.9e-03 away" in wrong["failed"]
    (gradient,) = tune._gradients(CPU, math.inf, (8,), 16, 40)
    assert gradient["at once"] > 0 and gradient["product and pass"] > 0
    monkeypatch.setattr(tune, "CHUNK_SHAPE", (8, 16, 40))
    rows = list(tune._chunks(CPU, math.inf, (1 << 25,), (1 << 22, 1 << 23)))
    assert len(rows) == 2 and rows[0]["kept"] > 0 and rows[0]["recomputed"] > 0


def test_a_backend_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked in a process of its own, that may hang or crash; first without the kernel that it can do without."""
    everything = backends.NAMES
    monkeypatch.setattr(backends, "NAMES", ("chunked", "reference"))
    assert [row["ok"] for row in gpu_smoke.smoke(CPU)] == [True]
    (row,) = gpu_smoke.smoke(CPU, seconds=0.01)
    backends.NAMES = everything
    assert not row["ok"] and row["error"].startswith("did not end in 0.01 s")
    assert "no-such-backend" in gpu_smoke._ask(CPU, "no-such-backend", None, 60)["error"]
    fine, ill = {"backend": "chunked", "without": None, "ok": True}, {"backend": "cuda", "without": None, "ok": False}
    assert gpu_smoke.leave_out([fine]) == [] and "cuda" in backends.NAMES
    monkeypatch.setattr(gpu_checks, "left_out", {})
    kernels = backends.load("cuda")._Kernels
    for each in ("grad_centres", "grad_both"):
        monkeypatch.setattr(kernels, each, getattr(kernels, each))
    assert gpu_smoke.leave_out([fine, ill, ill | {"without": "grad_centres", "ok": True}]) == ["cuda's grad_centres"]
    assert gpu_checks.left_out == {"cuda": "grad_centres"}
    assert kernels().grad_centres() is False and "cuda" in backends.NAMES
    assert gpu_smoke.leave_out([fine, ill, ill | {"without": "grad_centres"}]) == ["cuda"] and "cuda" not in backends.NAMES


def test_what_a_backend_can_do_without_is_tried_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def ask(device: torch.device, name: str, without: str | None, seconds: float) -> dict[str, Any]:
        asked.append(without)
        return {"backend": name, "without": without, "ok": without == works}

    monkeypatch.setattr(gpu_smoke, "_ask", ask)
    monkeypatch.setattr(gpu_smoke, "absent", lambda device: [])
    monkeypatch.setattr(gpu_smoke, "compared_backends", lambda device: ["triton"])
    for works, expected in ((None, 1), (gpu_smoke.DIRECTLY, 2), ("grad_both", 3), ("grad_centres", 4), ("nothing", 4)):
        asked.clear()
        assert [row["ok"] for row in gpu_smoke.smoke(CPU)] == [False] * (expected - 1) + [works != "nothing"]
        assert asked == [None, gpu_smoke.DIRECTLY, "grad_both", "grad_centres"][:expected]
    kernels: Any = backends.load("triton")._Kernels  # type: ignore[attr-defined]
    for each in ("grad_centres", "grad_both"):
        monkeypatch.setattr(kernels, each, getattr(kernels, each))
    gpu_smoke.do_without("triton", "grad_centres")
    assert kernels().grad_centres() is kernels().grad_both() is False
    monkeypatch.setattr(triton_launch, "launch_directly", True)
    gpu_smoke.do_without("triton", gpu_smoke.DIRECTLY)
    assert not triton_launch.launch_directly


def test_a_backend_that_is_absent_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot run here is not run; one that is listed and serves nothing, as after a failed build, has failed."""
    reasons = {"cuda": [None, "its library cannot be had"], "triton": ["not installed"]}

    class Kernels:
        def __init__(self, name: str) -> None:
            self.reasons = reasons[name]

        def unavailable_reason(self) -> str | None:
            return self.reasons[0]

        def serves(self, *unused: Any) -> bool:
            self.reasons[:-1] = []  # tried now
            return False

        def comes_first(self, *unused: Any) -> bool:
            return False

    right = backends.load
    monkeypatch.setattr(backends, "load", lambda name: Kernels(name) if name in reasons else right(name))
    monkeypatch.setattr(backends, "NAMES", ("triton", "cuda", "chunked", "reference"))
    assert gpu.run_stages(tmp_path, ("smoke",), True, CPU, SHAPES) == 1
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["stages"]["smoke"]
    assert [(row["backend"], row["ok"]) for row in rows] == [("triton", None), ("cuda", False), ("chunked", True)]
    assert rows[0]["skipped"] == "not installed" and rows[1]["error"] == "its library cannot be had"
    printed = capsys.readouterr().out
    assert "left out from here on: cuda\n" in printed and "NOT RUN\nsmoke: backend=triton" in printed


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
    assert [command[2] for command in commands] == [row["tool"] for row in rows]
    assert all(command[-2] == row["backend"] and command[-1] == "--few" for command, row in zip(commands, rows, strict=True))
    # Rows that stay in Hopper's shared memory and that do not, of a width that halves do not divide evenly.
    assert {D for _, D, C in gpu_smoke.FEW if C > 2 * 132 * 128} == {480, 528}
    gradient = triton_configs.GRADIENT[9]
    for shapes in (gpu_smoke.FEW, gpu_smoke.SHAPES):
        assert any(D % 16 == 0 and gradient.serves(B, D) and gradient.parts_beside(B, D, C, 132) > 1 for B, D, C in shapes)


def test_a_wrong_result_is_not_called_running(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_smoke.main(["cpu", "chunked"]) == 0
    right = gpu_smoke._step
    monkeypatch.setattr(gpu_smoke, "_step", lambda *args: tuple(each * (1 + 0.03 * args[4]) for each in right(*args)))
    assert gpu_smoke.main(["cpu", "chunked"]) == 1
