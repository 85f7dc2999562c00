"""AMSoftmaxFunction by itself, for whoever builds on it: the whole loss for a constant margin as one autograd function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import one_chunk

from .cases import BY_NAME, FLOAT64, Case, relative

CASE = Case("", "", own=0.5)


def gradients(loss: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    upstream = upstream if loss.dim() else upstream[0]
    return (loss.detach(), *torch.autograd.grad(loss, inputs, upstream))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", [(), (64,), (64.0, 0.4), (30.0, 0), (20.0, 0.1, "none"), (30.0, 0.35, "sum")], ids=str)
def test_it_is_the_loss(arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    features, weight, labels, upstream = CASE.tensors(dtype)
    labels[3] = -100
    x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
    options = dict(zip(("scale", "margin", "reduction"), arguments, strict=False))
    found = gradients(ak.AMSoftmaxFunction.apply(x, w, labels, *arguments), (x, w), upstream)
    expected = gradients(ak.am_softmax_loss(x, w, labels, **options), (x, w), upstream)
    assert all(map(torch.equal, found, expected))
    x64, w64 = features.double().requires_grad_(), weight.double().requires_grad_()
    exact = gradients(ak.reference.am_softmax_loss(x64, w64, labels, **options), (x64, w64), upstream)
    tolerance = {torch.float64: FLOAT64, torch.float32: 5e-6, torch.bfloat16: 1e-2}[dtype]
    assert max(map(relative, found, exact)) < tolerance


def test_a_scale_that_learns() -> None:
    features, weight, labels, _ = Case("", "", B=4, C=6, D=3).tensors()
    x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
    scale = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *each: ak.AMSoftmaxFunction.apply(each[0], each[1], labels, each[2]), (x, w, scale)
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1.0,), ValueError, "scale must be positive"),
        (("30",), TypeError, "scale must be a float"),
        ((30.0, 3.0), ValueError, "margin is taken off a cosine"),
        ((30.0, torch.zeros(200)), TypeError, "margin must be a float, but it is Tensor"),
        ((30.0, lambda t, labels, norm: t), TypeError, "margin must be a float"),
        ((30.0, 0.35, "average"), ValueError, "reduction must be one of"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    features, weight, labels, _ = CASE.tensors()
    with pytest.raises(error, match=message):
        ak.AMSoftmaxFunction.apply(features, weight, labels, *arguments)


def test_wrong_tensors() -> None:
    features, weight, labels, _ = CASE.tensors()
    with pytest.raises(ValueError, match="must share D"):
        ak.AMSoftmaxFunction.apply(features[:, 1:], weight, labels)
    with pytest.raises(ValueError, match=r"labels\[0\] is 100000"):
        ak.AMSoftmaxFunction.apply(features, weight, torch.full_like(labels, 100_000))


def test_labels_in_a_column() -> None:
    """As InsightFace and speechbrain hand them over; shuffled, and some ignored."""
    features, weight, labels, _ = CASE.tensors(torch.float32)
    labels[2] = -100
    column = labels[:, None]
    expected = ak.am_softmax_loss(features, weight, labels, reduction="none", return_predictions=True)
    for each in (column, column.int(), torch.stack([labels, labels], 1)[:, :1]):
        found = ak.am_softmax_loss(features, weight, each, reduction="none", return_predictions=True)
        assert all(map(torch.equal, found, expected))
        assert torch.equal(ak.AMSoftmaxFunction.apply(features, weight, each, 30.0, 0.35, "none"), expected[0])
    for options in ({"backend": "reference"}, {"margin": torch.full((len(weight),), 0.35)}):
        found = ak.am_softmax_loss(features, weight, column, reduction="none", **options)
        assert found.shape == labels.shape and torch.allclose(found, expected[0], atol=1e-5)
    for head in (ak.AMSoftmaxLoss, ak.ShardedAMSoftmaxLoss):
        module = head(CASE.D, CASE.C, reduction="none", backend="chunked")
        assert torch.equal(module(features, column), module(features, labels))
    with pytest.raises(ValueError, match=r"labels must have shape \[B\]"):
        ak.am_softmax_loss(features, weight, labels[None])


def test_compiled() -> None:
    features, weight, labels, upstream = CASE.tensors(torch.float32)
    x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
    torch._dynamo.reset()
    step = torch.compile(
        lambda x, w: ak.AMSoftmaxFunction.apply(x, w, labels, 64.0, 0.4), fullgraph=True, backend="aot_eager"
    )
    found, expected = (
        gradients(each(x, w), (x, w), upstream) for each in (step, lambda *t: step._torchdynamo_orig_callable(*t))
    )
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("margin", [0.35, lambda t, labels, norm: t - 0.01 * norm], ids=["constant", "function"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_second_derivative_by_what_multiplies_the_loss_is_an_error(reduction: str, margin: Any) -> None:
    """GradNorm and learned weights of losses take it: it must not come out as 0."""
    features, weight, labels, _ = CASE.tensors()
    x, factor = features.clone().requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = factor * ak.am_softmax_loss(x, weight, labels, margin=margin, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(grad.norm(), factor)


@pytest.mark.parametrize("options", [{}, {"normalize_features": False}, {"margin": torch.linspace(0, 0.5, CASE.C)}])
def test_gradients_of_each_sample(options: dict[str, Any]) -> None:
    """By vmap over features and labels, ignored ones too; one out of range is NaN, as labels are not read there."""
    features, weight, labels, _ = CASE.tensors()
    labels[3] = -100

    def loss(x: Tensor, w: Tensor, label: Tensor) -> Tensor:
        result: Tensor = ak.am_softmax_loss(x[None], w, label[None], backend="reference", **options)
        return result

    gradient = torch.func.grad(loss, (0, 1))
    mapped = torch.func.vmap(gradient, (0, None, 0))
    rows = [gradient(x, weight, label) for x, label in zip(features, labels, strict=True)]
    for actual, expected in zip(mapped(features, weight, labels), zip(*rows, strict=True), strict=True):
        assert relative(actual, torch.stack(expected)) < 1e-13
    labels[5] = CASE.C
    nan = mapped(features, weight, labels)[0].isnan().any(1)
    assert nan.nonzero().flatten().tolist() == [5]


def test_several_upstream_gradients_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As autograd.functional.jacobian(..., vectorize=True) has them; in one chunk, also a large one."""
    monkeypatch.setattr(one_chunk, "_ELEMENTS", 100)
    features, weight, labels, _upstream = BY_NAME["plain"].tensors()
    inputs = features.requires_grad_(), weight.requires_grad_()
    rows, some = ak.am_softmax_loss(*inputs, labels, reduction="none"), torch.eye(len(labels), dtype=torch.float64)[:3]
    at_once = torch.autograd.grad(rows, inputs, some, is_grads_batched=True, retain_graph=True)
    for i, upstream in enumerate(some):
        single = torch.autograd.grad(rows, inputs, upstream, retain_graph=True)
        assert all(relative(each[i], one) < 1e-14 for each, one in zip(at_once, single, strict=True))
