"""Inputs at the edge of what is meaningful: none may give a silently wrong number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak

from .cases import CASES, FLOAT64, Case, evaluate, relative

PLAIN = CASES[0]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "chunked"])
pytestmark = pytest.mark.usefixtures("small_chunks")


def reference(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return evaluate(ak.reference.am_softmax_loss, *tensors, **options)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    features, weight, labels, _upstream = Case("", "", C=100).tensors()
    labels = labels.to(dtype)
    assert relative(ak.am_softmax_loss(features, weight, labels), ak.am_softmax_loss(features, weight, labels.long())) == 0


@pytest.mark.parametrize("broken", [math.inf, math.nan])
@BACKENDS
def test_an_ignored_row_has_no_gradient_even_beside_a_broken_centre(backend: str, broken: float) -> None:
    features, weight, labels, upstream = PLAIN.tensors()
    weight[9, 3], labels[6] = broken, -100
    labels[labels == 9] = 8
    loss, dx, _ = evaluate(ak.am_softmax_loss, features, weight, labels, upstream, backend=backend)
    assert loss[6] == 0 and not dx[6].any() and loss[7].isnan() and dx[7].isnan().any()


def test_labels_belong_to_the_caller() -> None:
    """Who may write into them between the passes, through NumPy too, and may have made them in inference mode."""
    features, weight, labels, upstream = PLAIN.tensors()
    expected = evaluate(ak.am_softmax_loss, features, weight, labels, upstream)
    buffer = labels.numpy().copy()
    x, w = features.detach().requires_grad_(), weight.detach().requires_grad_()
    rows = ak.am_softmax_loss(x, w, torch.from_numpy(buffer), reduction="none")
    buffer[:] = 0
    rows.backward(upstream)
    assert all(map(torch.equal, (rows, x.grad, w.grad), expected))
    with torch.inference_mode():
        labels = labels + 0
    assert all(map(torch.equal, evaluate(ak.am_softmax_loss, features, weight, labels, upstream), expected))


def test_strided_views() -> None:
    features, weight, labels, upstream = PLAIN.tensors()
    wide = torch.full((PLAIN.D, 2 * PLAIN.B), math.nan, dtype=torch.float64)
    wide[:, ::2] = features.T
    spread = torch.full((2 * PLAIN.B,), 10**6)
    spread[::2] = labels
    views = (wide.T[::2], weight.flip(0).flip(0).T.contiguous().T, spread[::2], upstream)
    assert not any(each.is_contiguous() for each in views[:3])
    actual, expected = evaluate(ak.am_softmax_loss, *views), evaluate(ak.am_softmax_loss, features, weight, labels, upstream)
    assert max(map(relative, actual, expected)) < 1e-14


def test_expanded_features() -> None:
    features, weight, labels, _upstream = PLAIN.tensors()
    row = features[:1].clone().requires_grad_()
    ak.am_softmax_loss(row.expand(PLAIN.B, -1), weight, labels, reduction="sum").backward()
    copied = features[:1].clone().requires_grad_()
    ak.am_softmax_loss(copied.repeat(PLAIN.B, 1), weight, labels, reduction="sum").backward()
    assert row.grad is not None and copied.grad is not None and relative(row.grad, copied.grad) < 1e-13


@BACKENDS
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("options", [{}, {"scale": 100.0}, {"normalize_features": False}], ids=["plain", "s100", "no-fn"])
def test_ignored_rows(backend: str, ignore_index: int, options: dict[str, Any]) -> None:
    """As if they were not there, even full of NaN."""
    features, weight, labels, upstream = PLAIN.tensors()
    labels[labels == ignore_index] = 4
    ignored = torch.zeros(PLAIN.B, dtype=torch.bool)
    ignored[[2, 5, 6]] = True
    labels[ignored] = ignore_index
    features[2], features[5] = math.nan, math.inf
    options = {**options, "ignore_index": ignore_index}
    loss, dx, dw = evaluate(ak.am_softmax_loss, features, weight, labels, upstream, backend=backend, **options)
    kept = (features[~ignored], weight, labels[~ignored], upstream[~ignored])
    expected = reference(*kept, **options)
    assert loss[ignored].eq(0).all() and dx[ignored].eq(0).all()
    assert max(map(relative, (loss[~ignored], dx[~ignored], dw), expected)) < FLOAT64
    mean = ak.am_softmax_loss(features, weight, labels, backend=backend, **options)
    assert relative(mean, expected[0].mean()) < FLOAT64


@BACKENDS
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", ["empty", "all ignored"])
def test_no_row_to_learn_from(backend: str, reduction: str, rows: str) -> None:
    features, weight, _labels, upstream = PLAIN.tensors()
    count = 0 if rows == "empty" else 4
    out, dx, dw = evaluate(
        ak.am_softmax_loss, features[:count], weight, torch.full((count,), -100), upstream[: max(count, 1)][:count]
        if reduction == "none" else upstream, reduction=reduction, backend=backend,
    )  # fmt: skip
    assert out.shape == ((count,) if reduction == "none" else ())
    assert out.eq(0).all() and dx.shape == (count, PLAIN.D) and dx.eq(0).all() and dw.eq(0).all()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"scale": 100.0}, {"normalize_features": False}], ids=["plain", "s100", "no-fn"])
def test_zero_rows(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """They have no direction: cosines of 0, gradients of 0, and the other rows as if nothing were special."""
    features, weight, labels, upstream = PLAIN.tensors(dtype)
    features[3] = 0
    weight[labels[4]] = 0
    weight[(labels[4] + 1) % PLAIN.C] = 0
    loss, dx, dw = evaluate(ak.am_softmax_loss, features, weight, labels, upstream, backend=backend, **options)
    assert all(each.isfinite().all() for each in (loss, dx, dw))
    assert dw[labels[4]].eq(0).all()
    assert dx[3].eq(0).all()
    if options.get("normalize_features", True):
        s = options.get("scale", 30.0)
        # every logit of the zero feature is 0: log(1 + (C − 1) e^{s m})
        assert loss[3].item() == pytest.approx(math.log1p((PLAIN.C - 1) * math.exp(s * 0.35)), rel=1e-6)


@BACKENDS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"scale": 100.0}, {"normalize_features": False}], ids=["plain", "s100", "no-fn"])
def test_a_bad_row_is_nan_alone(backend: str, bad: float, options: dict[str, Any]) -> None:
    features, weight, labels, upstream = PLAIN.tensors(torch.float32)
    expected = reference(features.double(), weight.double(), labels, upstream, **options)[0]
    features[7, 2] = bad
    loss = ak.am_softmax_loss(features, weight, labels, reduction="none", backend=backend, **options)
    others = torch.arange(PLAIN.B) != 7
    assert loss[7].isnan()
    assert relative(loss[others], expected[others]) < 1e-5


def far_from_one(dtype: torch.dtype, power: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The plain case, every third centre and the first feature times 10^power as far as ``dtype`` goes; which they are."""
    features, weight, labels, upstream = PLAIN.tensors(dtype)
    largest = torch.finfo(dtype).max
    far = torch.arange(PLAIN.C) % 3 == 0
    weight[far] = (weight[far].double() * 10.0**power).clamp(-largest, largest).to(dtype)
    features[0] = (features[0].double() * 10.0**power).clamp(-largest, largest).to(dtype)
    return features, weight, labels, upstream, far


def check_far_from_one(actual: tuple[Tensor, ...], given: tuple[Tensor, ...], bound: float) -> None:
    """The loss is that of the rows over their largest elements, and the gradients theirs over these."""
    features, weight, labels, upstream, far = given
    x_size, size = (each.double().abs().amax(1, keepdim=True) for each in (features, weight))
    expected = reference(features.double() / x_size, weight.double() / size, labels, upstream)
    (loss, dx, dw), (exact, exact_dx, exact_dw) = actual, expected
    assert relative(loss, exact) < bound
    assert relative(dx.double() * x_size, exact_dx) < bound
    for of_chosen in (far, ~far):
        assert relative((dw.double() * size)[of_chosen], exact_dw[of_chosen]) < bound


@BACKENDS
@pytest.mark.parametrize("one_chunk", [False, True], ids=["chunks", "one-chunk"])
@pytest.mark.parametrize(
    ("dtype", "power"),
    [*((torch.float32, power) for power in (-29, -25, -13, 11, 19, 30, 38)), (torch.bfloat16, -25), (torch.bfloat16, 30),
     (torch.float16, 5), (torch.float64, -29), (torch.float64, 200)],
)  # fmt: skip
def test_rows_of_any_norm(
    backend: str, one_chunk: bool, dtype: torch.dtype, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if one_chunk:
        monkeypatch.undo()
    given = far_from_one(dtype, power)
    actual = evaluate(ak.am_softmax_loss, *given[:4], backend=backend)
    rounding = {torch.bfloat16: 4e-3, torch.float16: 4e-3, torch.float64: FLOAT64}  # of the gradients
    check_far_from_one(actual, given, rounding.get(dtype, 5e-6))


@BACKENDS
@pytest.mark.parametrize("size", [1e-31, 1e-29, 1e-20, 1e-13])
def test_features_of_a_tiny_norm_without_normalization(backend: str, size: float) -> None:
    """The gradient is Σ p_j ŵ_j − p(ŵ_y − m x̂) however short the row is, until it counts as zero."""
    features, weight, labels, upstream = PLAIN.tensors(torch.float32)
    features[2] *= size / features[2].norm()
    loss, dx, dw = evaluate(
        ak.am_softmax_loss, features, weight, labels, upstream, backend=backend, normalize_features=False
    )
    unit, x_unit = torch.nn.functional.normalize(weight.double()), features[2].double() / size
    mean = unit.mean(0)  # all logits are 0
    expected = (mean - unit[labels[2]] + (1 - 1 / PLAIN.C) * 0.35 * x_unit) * upstream[2]
    assert loss[2].item() == pytest.approx(math.log(PLAIN.C), rel=1e-6)
    assert dx[2].eq(0).all() if size < 1e-30 else relative(dx[2], expected) < 1e-5
    assert dw.isfinite().all()


@BACKENDS
def test_a_norm_past_float32_in_the_place_of_the_scale_is_nan(backend: str) -> None:
    """Not silently wrong: float32 has not this scale."""
    features, weight, labels, _ = PLAIN.tensors(torch.float32)
    features[1] = 3e38
    loss = ak.am_softmax_loss(features, weight, labels, reduction="none", backend=backend, normalize_features=False)
    assert loss.isnan().tolist() == [row == 1 for row in range(PLAIN.B)]


def test_one_class() -> None:
    features, weight, labels, upstream = Case("", "", C=1).tensors()
    for options in ({}, {"scale": 1000.0}, {"normalize_features": False}):
        for each in evaluate(ak.am_softmax_loss, features, weight, labels, upstream, **options):
            assert each.eq(0).all()


def test_many_rows_of_one_class() -> None:
    features, weight, labels, upstream = PLAIN.tensors()
    labels.fill_(PLAIN.C - 1)
    actual = evaluate(ak.am_softmax_loss, features, weight, labels, upstream)
    assert max(map(relative, actual, reference(features, weight, labels, upstream))) < FLOAT64


def test_duplicate_centres() -> None:
    """Every centre at the feature: the negatives' sum is (C − 1) e^s, and the loss log(1 + (C − 1) e^{s m})."""
    features = torch.randn(1, 16, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    weight = features.expand(300, 16).clone()
    loss = ak.am_softmax_loss(features, weight, torch.tensor([5]), scale=64.0)
    assert loss.item() == pytest.approx(math.log1p(299 * math.exp(64 * 0.35)), rel=1e-6)


def test_the_default_device_does_not_matter() -> None:
    features, weight, labels, _ = PLAIN.tensors()
    expected = ak.am_softmax_loss(features, weight, labels)
    with torch.device("meta"):
        assert torch.equal(ak.am_softmax_loss(features, weight, labels), expected)
