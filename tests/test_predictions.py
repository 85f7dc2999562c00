"""Training accuracy from the pass that computes the loss, and the filter's meaning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import amsoftmax_kernels as ak
from amsoftmax_kernels.margins import AngularMargin

from .cases import BY_NAME, CHUNK, Case

CASE = Case("", "", B=40, C=3 * CHUNK + 5, D=8)  # few dimensions: many a target is not the largest cosine


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 1000.0}, {"normalize_features": False}, {"interclass_filter": 0.3}, {"save_bytes": 0}],
    ids=["plain", "s1000", "no-fn", "filter", "recomputed"],
)
def test_predictions(options: dict[str, Any], dtype: torch.dtype, backend: str, small_chunks: None) -> None:
    features, weight, labels, _ = CASE.tensors(dtype)
    features[:20] = weight[labels[:20]] + 0.1 * features[:20]  # half of them right
    labels[4] = -100
    cosine = ak.AMSoftmaxLoss(CASE.D, CASE.C, dtype=dtype)
    cosine.weight.data = weight
    expected = cosine.cosine(features).argmax(1)
    expected[4] = -1
    x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, predictions = ak.am_softmax_loss(x, w, labels, return_predictions=True, backend=backend, **options)
    assert predictions.dtype == torch.int64 and torch.equal(predictions, expected)
    assert 15 <= (predictions == labels).sum() < 35
    plain = ak.am_softmax_loss(x.detach(), w.detach(), labels, backend=backend, **options)
    assert torch.equal(loss.detach(), plain)
    grads = torch.autograd.grad(loss, (x, w))
    y, v = features.clone().requires_grad_(), weight.clone().requires_grad_()
    alone = torch.autograd.grad(ak.am_softmax_loss(y, v, labels, backend=backend, **options), (y, v))
    assert all(map(torch.equal, grads, alone))


@pytest.mark.parametrize(
    "margin", [0.35, torch.full((CASE.C,), 0.35), AngularMargin(0.4)], ids=["float", "tensor", "angular"]
)
def test_predictions_with_the_margin(margin: Any, fused_backend: str, small_chunks: None, short_chunks: None) -> None:
    """A target counts where it is the largest even with its margin, as where logits with it are at hand."""
    features, weight, labels, _ = CASE.tensors(torch.float32)
    features[:20] = weight[labels[:20]] + torch.linspace(0.1, 1.5, 20)[:, None] * features[:20]
    labels[4] = -100
    target = labels.clamp(0)
    cosines = ak.reference.cosine(features, weight)
    t = cosines.gather(1, target[:, None])[:, 0]
    psi = margin(t, target, t) if callable(margin) else t - 0.35
    expected = cosines.scatter(1, target[:, None], psi[:, None]).argmax(1)
    expected[4] = -1
    without = cosines.argmax(1)
    assert ((expected != without) & (labels >= 0)).sum() >= 5
    for backend in ("reference", "chunked", fused_backend):
        loss, predictions = ak.am_softmax_loss(
            features, weight, labels, margin=margin, return_predictions="with_margin", backend=backend
        )
        assert loss.isfinite() and torch.equal(predictions, expected), backend
    head = ak.AMSoftmaxLoss(CASE.D, CASE.C, margin=margin)
    head.set_centres(weight)
    assert torch.equal(head(features, labels, return_predictions="with_margin")[1], expected)


def test_the_label_wins_a_tie_and_one_class_is_right() -> None:
    features, weight, _, _ = CASE.tensors()
    weight[7] = weight[3]
    for label in (3, 7):
        x = weight[[label]].clone()
        _, predictions = ak.am_softmax_loss(x, weight, torch.tensor([label]), return_predictions=True, backend="reference")
        assert predictions.item() == label
    _, predictions = ak.am_softmax_loss(features, weight[:1], torch.zeros(CASE.B).long(), return_predictions=True)
    assert torch.equal(predictions, torch.zeros(CASE.B).long())


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_row_of_nan_predicts_nothing(backend: str) -> None:
    features, weight, labels, _ = CASE.tensors()
    features[3] = math.nan
    _, predictions = ak.am_softmax_loss(features, weight, labels, return_predictions=True, backend=backend)
    assert predictions[3] == -1 and (predictions[4:] >= 0).all()


def test_the_module_returns_them_too() -> None:
    features, _, labels, _ = CASE.tensors()
    for seed in range(30):  # the loss has the same bits with them and without
        torch.manual_seed(seed)
        head = ak.AMSoftmaxLoss(CASE.D, CASE.C, dtype=torch.float64)
        loss, predictions = head(features, labels, return_predictions=True)
        assert torch.equal(predictions, head.cosine(features).argmax(1))
        assert torch.equal(loss, head(features, labels))


def test_the_filter_leaves_out_what_is_too_near() -> None:
    case = BY_NAME["s64-wrong"]
    features, weight, labels, _ = case.tensors()
    wrong = (labels + 1) % case.C
    kept = ak.am_softmax_loss(features, weight, labels, reduction="none")
    filtered = ak.am_softmax_loss(features, weight, labels, reduction="none", interclass_filter=0.9)
    assert (filtered < kept - 10).all()
    w = weight.clone().requires_grad_()
    ak.am_softmax_loss(features[:1], w, labels[:1], interclass_filter=0.9).backward()
    assert w.grad is not None and not w.grad[wrong[0]].any() and w.grad.any()


def test_a_filter_that_leaves_no_negative() -> None:
    features, weight, labels, _ = CASE.tensors(torch.float32)
    for options in ({}, {"scale": 1000.0}, {"normalize_features": False}):
        x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = ak.am_softmax_loss(x, w, labels, interclass_filter=-1.0, **options)
        loss.backward()
        assert loss == 0 and x.grad is not None and w.grad is not None and not x.grad.any() and not w.grad.any()


@pytest.mark.parametrize("scale", [1e-8, 1.0, 64.0])
def test_small_problems_at_any_scale(scale: float) -> None:
    """One chunk of classes, whose gradients are made in the forward pass."""
    features, weight, labels, _ = Case("", "", B=64, C=500, D=32).tensors(torch.float32)
    features[:20] = weight[labels[:20]] + features[:20]
    x = features.clone().requires_grad_()
    _, predictions = ak.am_softmax_loss(x, weight, labels, scale=scale, return_predictions=True)
    expected = ak.reference.cosine(features.double(), weight.double()).argmax(1)
    assert torch.equal(predictions, expected) and 5 < (predictions == labels).sum() < 60


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_centre_that_is_not_finite_predicts_nothing(backend: str, value: float, small_chunks: None) -> None:
    """Not the label itself, which would be an accuracy of 1 with a loss that is NaN."""
    features, weight, labels, _ = CASE.tensors(torch.float32)
    weight = weight.clone()
    weight[CASE.C // 2, 0] = value
    labels[labels == CASE.C // 2] = 0
    loss, predictions = ak.am_softmax_loss(features, weight, labels, return_predictions=True, backend=backend)
    assert loss.isnan() and predictions.eq(-1).all()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_zero_row_and_a_filter_below_zero(backend: str, small_chunks: None) -> None:
    """Its cosines, all 0, exceed the filter: no negative is left."""
    options = {"normalize_features": False, "interclass_filter": -0.2, "backend": backend}
    assert ak.am_softmax_loss(torch.zeros(1, 8), torch.randn(700, 8), torch.tensor([3]), **options) == 0
