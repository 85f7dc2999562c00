"""The loss benchmark, end to end at toy size."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine, measure
from bench.__main__ import main
from bench.loss import command, memory, peers

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(measure, "product_rates", lambda *_: {"torch.mm": 1e9, "any": 2e9})
    # A process for each peer takes seconds; test_peak_memory_sees_the_logits starts them.
    monkeypatch.setattr(memory, "peak_memory", lambda *_: {"above_inputs": 9, "above_inputs_and_gradients": 5})


def bench(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["loss", "--quick", "--batch", "4", "--dim", "8", "--classes", "16", "40", "--out", str(out), *arguments])
    return status, json.loads((out / "loss.json").read_text())


def test_a_sweep(tmp_path: Path, quickly: None, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = bench(tmp_path, "--only", "ours", "ours, save_bytes=0", "eager PyTorch")
    assert status == 0 and (tmp_path / "loss.png").stat().st_size > 10_000
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["cpu"] == machine.cpu_name()
    assert [(row["C"], row["peer"]) for row in report["results"]] == [
        (C, name) for C in (16, 40) for name in ("ours", "ours, save_bytes=0", "eager PyTorch")
    ]
    for row in report["results"]:
        assert row["min_s"] <= row["median_s"] <= row["max_s"] and row["samples"] >= 3
        floor = 6 * 4 * 8 * row["C"] / 1e9
        assert row["of_mm_floor"] == pytest.approx(row["median_s"] / floor)
        assert row["of_floor"] == pytest.approx(2 * row["of_mm_floor"])
        assert row["peak_bytes"] == {"above_inputs": 9, "above_inputs_and_gradients": 5}
    assert "eager PyTorch" in capsys.readouterr().out


def test_a_wrong_peer_is_flagged(
    tmp_path: Path, quickly: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_margin(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            30 * torch.cosine_similarity(tensors[0][:, None], tensors[1], dim=2), tensors[2]
        )

    wrong = [peers.Peer("ours", lambda: without_margin, lambda *_: 0), *peers.PEERS[2:3]]
    monkeypatch.setattr(command, "PEERS", wrong)
    status, report = bench(tmp_path)
    assert status == 1
    assert ["disagrees" in row for row in report["results"]] == [True, False] * 2
    assert "WRONG" in capsys.readouterr().out


def test_a_failing_peer_does_not_end_the_run(tmp_path: Path, quickly: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(command, "PEERS", [peers.Peer("ours", lambda: broken, lambda *_: 0), *peers.PEERS[2:3]])
    status, report = bench(tmp_path)
    assert status == 0 and "no such kernel" in report["results"][0]["skipped"] and report["results"][1]["median_s"] > 0


def test_what_is_left_out_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peers.PEERS[2]
    earlier = [{"peer": peer.name, "B": 1, "D": 1, "C": 100, "median_s": 9.0, "min_s": 2.0}]
    assert command.skip_reason(peer, 1, 1, 200, earlier, 30.0, CPU) is None
    assert "40.0 s" in (command.skip_reason(peer, 1, 1, 2000, earlier, 30.0, CPU) or "")
    monkeypatch.setattr(machine, "available_bytes", lambda device: 10**9)
    assert "memory" in (command.skip_reason(peer, 256, 512, 10**6, [], 30.0, CPU) or "")
    missing = peers.Peer("x", peer.make, peer.memory, lambda: "is not installed")
    assert command.skip_reason(missing, 1, 1, 1, [], 30.0, CPU) == "is not installed"


def test_a_nan_is_flagged(tmp_path: Path, quickly: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return x.sum() * float("nan")

    monkeypatch.setattr(command, "PEERS", [peers.Peer("ours", lambda: nan, lambda *_: 0), *peers.PEERS[2:3]])
    status, report = bench(tmp_path)
    assert status == 1 and ["disagrees" in row for row in report["results"]] == [True, False] * 2


def test_without_eager_the_others_are_compared(tmp_path: Path, quickly: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = peers.Peer("wrong", lambda: lambda *tensors: 2 * peers.eager(*tensors), lambda *_: 0)
    monkeypatch.setattr(command, "PEERS", [peers.PEERS[1], wrong])
    status, report = bench(tmp_path)
    assert status == 1 and ["disagrees" in row for row in report["results"]] == [False, True] * 2


def test_bf16(tmp_path: Path, quickly: None, capsys: pytest.CaptureFixture[str]) -> None:
    names = [peer.name for peer in peers.PEERS if peer.name != "torch.compile" and not peer.unavailable()]
    status, report = bench(tmp_path, "--dtype", "bf16", "--only", *names)
    assert status == 0 and report["dtype"] == "bfloat16 autocast"
    assert all("median_s" in row for row in report["results"]), report["results"]
    assert "bfloat16 autocast" in capsys.readouterr().out


def test_products_of_float32_in_bfloat16(tmp_path: Path, quickly: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    ours = peers.PEERS[0]
    noted = dataclasses.replace(ours, make=lambda: seen.append(torch.get_float32_matmul_precision()) or ours.make())
    monkeypatch.setattr(command, "PEERS", [noted])
    before = torch.get_float32_matmul_precision()
    status, report = bench(tmp_path, "--dtype", "medium")
    assert status == 0 and "'medium'" in report["dtype"] and set(seen) == {"medium"}
    assert torch.get_float32_matmul_precision() == before != "medium"


def test_a_slow_function_leaves_the_others_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "seconds", lambda function, device, queued: function())
    times = measure.interleaved({"slow": lambda: 6.0, "middling": lambda: 2.0, "fast": lambda: 0.5}, CPU, 10.0)
    assert [len(times[name].samples) for name in ("slow", "middling", "fast")] == [2, 3, 10]


def test_every_peer_here_computes_the_loss() -> None:
    tensors = peers.problem(6, 8, 20, CPU)
    expected = peers.step(peers.eager, *tensors)
    grads = [each.grad.clone() for each in tensors[:2] if each.grad is not None]
    for peer in peers.PEERS:
        if peer.unavailable() or not peer.margin or peer.name == "torch.compile":
            continue
        assert torch.allclose(peers.step(peer.make(), *tensors), expected, rtol=1e-5)
        for tensor, grad in zip(tensors, grads, strict=False):
            assert tensor.grad is not None and torch.allclose(tensor.grad, grad, rtol=1e-3, atol=1e-5)


def test_pytest_benchmark_times_a_step(tmp_path: Path) -> None:
    """The steps are collected, one runs with floor and memory beside its time, and two runs compare."""
    pytest.importorskip("pytest_benchmark")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench", "--benchmark-only"]
    stored, picture = tmp_path / "new" / "steps.json", tmp_path / "new" / "steps.png"
    tiny = [
        "--shape", "4", "8", "16", "-k", "ours and not save_bytes and float32", "--benchmark-max-time", "0.01",
        f"--benchmark-json={stored}", f"--picture={picture}",
    ]  # fmt: skip
    result = subprocess.run(
        [*command, *tiny], capture_output=True, text=True, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(stored.read_text())
    (step,) = report["benchmarks"]
    assert step["group"] == "B=4 D=8 C=16 float32 cpu" and step["stats"]["median"] > 0 and picture.exists()
    assert step["extra_info"]["floor_s"] > 0 and step["extra_info"]["library"] == "ours"
    assert report["machine_info"]["bench"]["cpu"] == machine.cpu_name()
    again = shutil.copy(stored, tmp_path / "again.json")
    compare = [sys.executable, "-m", "pytest_benchmark", "compare", str(stored), str(again)]
    result = subprocess.run(compare, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0 and result.stdout.count("test_step[cpu-ours-float32-B4-D8-C16]") == 2, result.stdout


def test_peak_memory_sees_the_logits() -> None:
    """Eager holds several B×C matrices, of 102 MB each; ours with save_bytes=0 some tens of MB whatever C is."""
    B, D, C = 256, 16, 100_000
    eager, ours = (memory.peak_memory(name, B, D, C, CPU) for name in ("eager PyTorch", "ours, save_bytes=0"))
    if eager is None or ours is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert eager["above_inputs_and_gradients"] > 2 * 4 * B * C
    assert ours["above_inputs_and_gradients"] < 0.4 * 4 * B * C


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--classes", "-1"], ["--threads", "0"]])
def test_bad_arguments(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"{arguments[0]} must be at least 1"):
        main(["loss", "--out", str(tmp_path), *arguments])


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["nothing"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    assert "faces" in capsys.readouterr().err


def test_the_rate_of_products_in_both_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rates = measure.product_rates(4, 8, CPU, dtype)
        assert rates["any"] >= rates["torch.mm"] > 0
