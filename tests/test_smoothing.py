"""Label smoothing: torch's own, optimizers, compilation, errors. Backends against the reference: CASES; ranks: SCENARIOS."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels import margins
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD

from .cases import FLOAT64, relative
from .updated import two_steps_apart

B, C, D = 24, 150, 12


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype) for n in (B, C))
    labels = torch.randint(C, (B,), generator=generator)
    labels[1], labels[4] = labels[0], -100
    return x, weight, labels


def by_torch(
    x: Tensor, weight: Tensor, labels: Tensor, scale: Any, margin: float, smoothing: float, reduction: str
) -> Tensor:
    """``cross_entropy`` of the logits with their margin."""
    cosines = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(weight).T
    taken_off = margin * torch.nn.functional.one_hot(labels.clamp(0), C).double() * (labels >= 0)[:, None]
    return torch.nn.functional.cross_entropy(
        scale * (cosines - taken_off), labels, label_smoothing=smoothing, reduction=reduction
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("chunks", ["one", "many"])
def test_it_is_torchs(chunks: str, backend: str, reduction: str, request: pytest.FixtureRequest) -> None:
    if chunks == "many":
        request.getfixturevalue("small_chunks")
    results = []
    for ours in (False, True):
        x, w, labels = problem()
        leaves = x.requires_grad_(), w.requires_grad_(), torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
        if ours:
            loss = ak.am_softmax_loss(
                *leaves[:2], labels, scale=leaves[2], margin=0.3, label_smoothing=0.1, reduction=reduction, backend=backend
            )
        else:
            loss = by_torch(*leaves[:2], labels, leaves[2], 0.3, 0.1, reduction)
        grads = torch.autograd.grad((loss * torch.arange(1, 1 + loss.numel()).view(loss.shape)).sum(), leaves)
        results.append((loss.detach(), *grads))
    for mine, exact in zip(results[1], results[0], strict=True):
        assert relative(mine, exact) < FLOAT64


@pytest.mark.parametrize("margin", [torch.linspace(0.1, 0.5, C, dtype=torch.float64), margins.MagFaceMargin()])
def test_any_margin(margin: Any, small_chunks: None) -> None:
    results = []
    for backend in ("reference", "chunked"):
        x, w, labels = problem()
        leaves = x.requires_grad_(), w.requires_grad_()
        loss = ak.am_softmax_loss(*leaves, labels, margin=margin, label_smoothing=0.2, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for mine, exact in zip(results[1], results[0], strict=True):
        assert relative(mine, exact) < FLOAT64


@pytest.mark.parametrize("make", [FusedSGD, FusedAdamW])
def test_the_optimizers(make: Any, fused_backend: str, small_chunks: None, short_chunks: None) -> None:
    """By chunked in float64 and by kernels in float32."""
    for backend, dtype, tolerance in (("chunked", torch.float64, 1e-12), (fused_backend, torch.float32, 2e-5)):
        assert two_steps_apart(make, problem(dtype), C, label_smoothing=0.1, backend=backend) < tolerance, backend


def test_a_compiled_step() -> None:
    x, weight, labels = problem(torch.float32)
    loss = lambda x, w: ak.am_softmax_loss(x, w, labels, label_smoothing=0.1)  # noqa: E731
    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        function(*leaves).backward()
        grads.append([each.grad for each in leaves])
    assert all(relative(a, b) < 1e-5 for a, b in zip(*grads, strict=True))


def test_odd_rows(small_chunks: None) -> None:
    x, weight, labels = problem()
    x[2], x[4], weight[5] = 0, math.nan, 0  # the fifth is ignored
    x.requires_grad_()
    weight.requires_grad_()
    loss = ak.am_softmax_loss(x, weight, labels, label_smoothing=0.1)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and weight.grad.isfinite().all()
    assert not x.grad[2].any() and not x.grad[4].any() and not weight.grad[5].any()


def test_wrong_arguments() -> None:
    x, weight, labels = problem()
    for value, error in ((-0.1, ValueError), (1.0, ValueError), (math.nan, ValueError), ("a", TypeError)):
        with pytest.raises(error, match="label_smoothing must"):
            ak.am_softmax_loss(x, weight, labels, label_smoothing=value)  # type: ignore[call-overload]
    for options in ({"subcentres": 2}, {"interclass_filter": 0.5}):
        with pytest.raises(ValueError, match=f"label_smoothing does not go with {next(iter(options))}"):
            ak.am_softmax_loss(x, weight, labels, label_smoothing=0.1, **options)
        with pytest.raises(ValueError, match="label_smoothing does not go with"):
            ak.AMSoftmaxLoss(D, C, label_smoothing=0.1, **options)
    assert "label_smoothing=0.1" in repr(ak.AMSoftmaxLoss(D, C, label_smoothing=0.1))
    with pytest.raises(ValueError, match="label_smoothing does not go with sample_rate"):
        ak.ShardedAMSoftmaxLoss(D, C, label_smoothing=0.1, sample_rate=0.5)
    head = ak.ShardedAMSoftmaxLoss(D, C, sample_rate=0.5)
    head.label_smoothing = 0.1
    with pytest.raises(ValueError, match="label_smoothing does not go with sample_rate"):
        head(x.float(), labels)
