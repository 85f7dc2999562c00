"""The gradient filter's emulation, against the definition written out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from amsoftmax_kernels import reference
from bench import filter as bench_filter
from bench.__main__ import main
from bench.peers import MARGIN


@pytest.mark.parametrize(("scale", "own", "least"), [(40.0, None, 0.1), (20.0, 0.6, 0.01)])
def test_against_the_definition(scale: float, own: float | None, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    B, C = 150, 1000  # neither is whole blocks
    monkeypatch.setattr(bench_filter, "CHUNK", 256)
    monkeypatch.setattr(bench_filter, "BLOCK", 16)
    monkeypatch.setattr(bench_filter, "LEAST", least)
    x, w, labels = bench_filter.embeddings(B, 24, C, own)
    assert len(set(labels.tolist())) == B
    if own is not None:
        assert torch.allclose((x * w[labels]).sum(1), torch.full((B,), own), atol=1e-5)
    logits = (scale * (x.double() @ w.double().T)).requires_grad_()
    target = torch.zeros(B, C, dtype=torch.bool).scatter_(1, labels[:, None], True)
    loss = torch.nn.functional.cross_entropy(logits - scale * MARGIN * target, labels, reduction="sum")
    assert torch.allclose(loss / B, reference.am_softmax_loss(x.double(), w.double(), labels, scale=scale, margin=MARGIN))
    (by_logit,) = torch.autograd.grad(loss, logits)
    order = logits.detach().mean(0).argsort()
    kept = torch.zeros(B, C, dtype=torch.float64)
    live = blocks = 0
    for rows in torch.arange(B).split(16):
        for columns in order.split(16):
            block = rows[:, None], columns
            blocks += 1
            if by_logit[block].abs().max() >= bench_filter.LEAST:
                kept[block] = by_logit[block]
                live += 1
    found = bench_filter.compare(x, w, labels, scale)
    lost, others = by_logit - kept, torch.ones(C, dtype=torch.bool).index_fill_(0, labels, False)
    by_weight, of_lost = by_logit.T @ x.double(), lost.T @ x.double()
    assert found["p"] == pytest.approx(-by_logit[target].mean().item(), rel=1e-5)
    assert found["blocks"] == live / blocks and 0 < live < blocks
    assert found["features"] == pytest.approx(((lost @ w.double()).norm() / (by_logit @ w.double()).norm()).item(), rel=1e-4)
    assert found["weight"] == pytest.approx((of_lost.norm() / by_weight.norm()).item(), rel=1e-4)
    assert found["other centres"] == pytest.approx((of_lost[others].norm() / by_weight[others].norm()).item(), rel=1e-4)
    assert 0.01 < found["other centres"] < 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "filter.json"
    assert main(["filter", "--classes", "300", "--scale", "16", "--batch", "8", "--dim", "16", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [row["own"] for row in report["results"]] == list(bench_filter.OWN) and report["machine"]["cpu"]
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(bench_filter.OWN)
