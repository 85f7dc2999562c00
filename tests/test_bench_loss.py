"""The loss benchmark, end to end at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import loss as command
from bench import machine, measure, peers
from bench.__main__ import main

CPU = torch.device("cpu")


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "product_rates", lambda *_: {"torch.mm": 1e9, "any": 2e9})


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
        assert row["peak_bytes"] is None or row["peak_bytes"]["above_inputs"] >= 0
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


def test_a_nan_is_flagged(tmp_path: Path, quickly: None, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = [peers.Peer("ours", lambda: lambda x, w, y: peers.eager(x, w, y) * float("nan"), lambda *_: 0), *peers.PEERS[2:3]]
    monkeypatch.setattr(command, "PEERS", nan)
    assert bench(tmp_path)[0] == 1


def test_a_failing_peer_does_not_end_the_run(tmp_path: Path, quickly: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(command, "PEERS", [peers.Peer("ours", lambda: broken, lambda *_: 0), *peers.PEERS[2:3]])
    status, report = bench(tmp_path)
    assert status == 0 and "no such kernel" in report["results"][0]["skipped"] and report["results"][1]["median_s"] > 0


def test_what_is_left_out_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peers.PEERS[2]
    earlier = [{"peer": peer.name, "B": 1, "D": 1, "C": 100, "median_s": 2.0}]
    assert command.skip_reason(peer, 1, 1, 200, earlier, 30.0) is None
    assert "40 s" in (command.skip_reason(peer, 1, 1, 2000, earlier, 30.0) or "")
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**9)
    assert "memory" in (command.skip_reason(peer, 256, 512, 10**6, [], 30.0) or "")
    missing = peers.Peer("x", peer.make, peer.memory, lambda: "is not installed")
    assert command.skip_reason(missing, 1, 1, 1, [], 30.0) == "is not installed"


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


def test_peak_memory_sees_the_logits() -> None:
    """Eager holds several B×C matrices; ours with save_bytes=0 holds none."""
    B, D, C = 256, 16, 40_000
    eager, ours = (measure.peak_memory(name, B, D, C, CPU) for name in ("eager PyTorch", "ours, save_bytes=0"))
    if eager is None or ours is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert eager["above_inputs_and_gradients"] > 2 * 4 * B * C
    assert ours["above_inputs_and_gradients"] < 0.5 * 4 * B * C


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
