"""The Triton backend in half precision, every option of it, where the centres' gradient is one kernel's work.

Rows of whole tiles start at multiples of 16 bytes here, as that kernel wants them and a user's centres do.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak

from .cases import CHUNK, Case, evaluate, relative
from .triton_kernels import DEVICE, MARKS, backend

pytestmark = MARKS
B, C = 40, 2 * CHUNK + 35
COMPUTE = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]  # the interpreter has no bfloat16 products


@pytest.fixture
def made_at_once(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each gradient of centres came from ``grad_centres``."""
    done: list[bool] = []
    kernel = backend._Kernels.grad_centres

    def noted(*arguments: Any) -> bool:
        done.append(kernel(*arguments))
        return done[-1]

    monkeypatch.setattr(backend._Kernels, "grad_centres", noted)
    return done


def inputs(D: int, weight_dtype: torch.dtype, own: float = 0.5) -> list[Tensor]:
    tensors = Case("", "", B=B, C=C, D=D, own=own).tensors(torch.float32)
    return [each.clone(memory_format=torch.contiguous_format).to(DEVICE) for each in tensors[:1]] + [
        tensors[1].clone(memory_format=torch.contiguous_format).to(DEVICE, weight_dtype),
        *(each.to(DEVICE) for each in tensors[2:]),
    ]


def eager(features: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Autocast's bfloat16 product of normalized operands, and the rest in float32."""
    x = torch.nn.functional.normalize(features)
    cosine = torch.nn.functional.linear(x, torch.nn.functional.normalize(weight)).float()
    mine = torch.nn.functional.one_hot(labels, weight.shape[0]).bool()
    s: Any = options.get("scale", 30.0)
    if not options.get("normalize_features", True):
        s = features.norm(dim=1, keepdim=True)
    margin = torch.as_tensor(options.get("margin", 0.35), device=features.device)
    logits = s * (cosine - mine * (margin[labels][:, None] if margin.dim() else margin))
    logits = logits.masked_fill(~mine & (cosine > options.get("interclass_filter", math.inf)), -math.inf)
    return torch.nn.functional.cross_entropy(logits, labels, reduction=options.get("reduction", "none"))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mean": {"reduction": "mean"},
    "sum": {"reduction": "sum"},
    "s64": {"scale": 64.0},
    "s1000": {"scale": 1000.0},
    "no-fn": {"normalize_features": False},
    "no-margin": {"margin": 0.0},
    "margin-a-class": {"margin": torch.linspace(0, 0.7, C)},
    "filter": {"interclass_filter": 0.4},
    "s1000-filter": {"scale": 1000.0, "interclass_filter": 0.4},
}
VARIANTS = [(64, option, save_bytes) for option in OPTIONS for save_bytes in (None, 0)]
VARIANTS += [(D, "plain", CHUNK * B * 2) for D in (32, 64, 128)]  # some of E is kept


def between_cosines(features: Tensor, weight: Tensor, near: float) -> float:
    """A threshold that is in the widest gap of the cosines there: rounding decides none of them."""
    cosine = torch.nn.functional.normalize(features.double()) @ torch.nn.functional.normalize(weight.double()).T
    there = cosine[(cosine - near).abs() < 0.1].sort().values
    widest = there.diff().argmax()
    assert there.diff()[widest] > 2**-7
    return float(there[widest : widest + 2].mean())


@pytest.mark.parametrize(("D", "option", "save_bytes"), VARIANTS)
@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_every_option_errs_at_most_as_eager_does(
    compute: torch.dtype, D: int, option: str, save_bytes: int | None, short_chunks: None, made_at_once: list[bool]
) -> None:
    options = {key: each.to(DEVICE) if isinstance(each, Tensor) else each for key, each in OPTIONS[option].items()}
    tensors = inputs(D, torch.float32)
    features, weight, labels, upstream = tensors
    if "interclass_filter" in options:
        options["interclass_filter"] = between_cosines(features, weight, options["interclass_filter"])
    exact = evaluate(ak.reference.am_softmax_loss, features.double(), weight.double(), labels, upstream, **options)
    with torch.autocast(DEVICE.type, compute):
        mine = evaluate(ak.am_softmax_loss, *tensors, backend="triton", save_bytes=save_bytes, **options)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        theirs = evaluate(eager, *tensors, **options)
    for expected, got, other in zip(exact, mine, theirs, strict=True):
        assert relative(got, expected) <= relative(other, expected)
    used = backend._gradient_config(DEVICE) is not None
    assert made_at_once == [used] * 3


@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("own", [0.5, 0.9])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_half_precision_centres(
    compute: torch.dtype, weight_dtype: torch.dtype, own: float, save_bytes: int | None, short_chunks: None
) -> None:
    """Whose gradient, the targets' part of it too, is rounded to their dtype."""
    tensors = inputs(64, weight_dtype, own)
    features, weight, labels, upstream = tensors
    exact = evaluate(ak.reference.am_softmax_loss, features.double(), weight.double(), labels, upstream)
    with torch.autocast(DEVICE.type, compute):
        loss, dx, dw = evaluate(ak.am_softmax_loss, *tensors, backend="triton", save_bytes=save_bytes)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        theirs = evaluate(eager, *tensors)
    assert (dx.dtype, dw.dtype) == (torch.float32, weight_dtype)
    for expected, got, other in zip(exact, (loss, dx, dw), theirs, strict=True):
        assert relative(got, expected) <= relative(other, expected)


@pytest.mark.parametrize("options", [{}, {"scale": 1000.0}, {"normalize_features": False}, {"interclass_filter": 0.3}])
@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_predictions(compute: torch.dtype, options: dict[str, Any], short_chunks: None) -> None:
    """The class of the largest rounded cosine: its exact one is nearly the largest."""
    features, weight, labels, _ = inputs(64, torch.float32)
    with torch.autocast(DEVICE.type, compute):
        _, predictions = ak.am_softmax_loss(features, weight, labels, backend="triton", return_predictions=True, **options)
    cosine = torch.nn.functional.normalize(features.double()) @ torch.nn.functional.normalize(weight.double()).T
    assert (cosine.max(1).values - cosine.gather(1, predictions[:, None])[:, 0]).max() < 2**-7
    assert (predictions == cosine.argmax(1)).float().mean() > 0.3
