"""Inputs, the float64 reference, and how far a result may be from it, with the reason for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import Traits

# Float64: a few hundred roundings of 1.1e-16, amplified by s = 1000 at most.
FLOAT64 = 1e-10
# Float32: a product of D terms and an exponential of an argument up to 64 (its rounding alone is 64 · 6e-8).
FLOAT32 = 5e-6

CHUNK = 64  # classes a chunk in tests, so that a few hundred classes take several


@dataclass
class Case:
    name: str
    why: str
    B: int = 24
    C: int = 3 * CHUNK + 5  # centres; with sub-centres K times as many as classes
    D: int = 33
    options: dict[str, Any] = field(default_factory=dict)
    own: float | None = None  # cosine of each feature to its own centre, random if None
    wrong: float | None = None  # cosine of each feature to another centre

    @property
    def degenerate(self) -> bool:
        """Whether directions coincide, so that the exact gradient is zero."""
        return self.D == 1 or (self.own is not None and abs(self.own) == 1)

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """features, weight, labels and an upstream gradient [B], drawn in float64 and rounded to ``dtype``.

        Features and weight are views into NaN-filled buffers: a read past their ends shows.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        K = self.options.get("subcentres", 1)
        weight, labels = normal(self.C, self.D), torch.randint(self.C // K, (self.B,), generator=generator)
        if self.B > 3:
            labels[1] = labels[0]  # two rows of one class
        features = normal(self.B, self.D)
        for cosine, classes in ((self.own, labels), (self.wrong, (labels + 1) % (self.C // K))):
            if cosine is not None:
                features = _at_cosine(features, weight[classes * K + K - 1], cosine)
        features *= 0.5 + torch.rand(self.B, 1, generator=generator, dtype=torch.float64) * 3
        return _guarded(features, dtype), _guarded(weight, dtype), labels, normal(self.B)


def _at_cosine(x: Tensor, centre: Tensor, cosine: float) -> Tensor:
    centre = centre / centre.norm(dim=1, keepdim=True)
    across = x - (x * centre).sum(1, keepdim=True) * centre
    across = across / across.norm(dim=1, keepdim=True)
    return cosine * centre + math.sqrt(1 - cosine**2) * across


def _guarded(values: Tensor, dtype: torch.dtype) -> Tensor:
    buffer = torch.full((values.shape[0] + 2, values.shape[1] + 3), math.nan, dtype=dtype)
    inside = buffer[1:-1, 1:-2]
    inside.copy_(values)
    return inside


CASES = [
    Case("plain", "several chunks, the last of them short"),
    Case("one-chunk", "C below a chunk", C=CHUNK - 1),
    Case("exact-chunks", "C a multiple of the chunk", C=2 * CHUNK),
    Case("one-past", "a last chunk of one class", C=2 * CHUNK + 1),
    Case("one-class", "no negatives: the loss is 0, z is 0", C=1),
    Case("one-row", "B = 1", B=1),
    Case("wide", "more rows than classes", B=80, C=7),
    Case("one-dimension", "D = 1: every cosine is ±1", D=1),
    Case("s64", "the largest scale without a running maximum", options={"scale": 64.0}),
    Case("s64-near", "e^64 against the sum of the negatives", own=0.9, options={"scale": 64.0}),
    Case("s64-wrong", "a hard negative dominates", wrong=0.95, options={"scale": 64.0}),
    Case("s1000", "past float32's range of e^s", options={"scale": 1000.0}),
    Case("s1000-far", "the target far from its centre", own=-0.9, options={"scale": 1000.0}),
    Case(
        "s1000-near",
        "the target at its centre, held back by its margin",
        own=0.999,
        options={"scale": 1000.0, "margin": 0.9},
    ),
    Case("s64-nearer", "a cosine of 1 - 1e-5", own=0.99999, options={"scale": 64.0, "margin": 0.9}),
    Case("opposite", "cos = -1", own=-1.0),
    Case("at-centre", "cos = 1", own=1.0),
    Case("no-margin", "normalized softmax", options={"margin": 0.0}),
    Case("no-fn", "without feature normalization", options={"normalize_features": False}),
    Case("filter", "some negatives are left out", options={"interclass_filter": 0.1}),
    Case("filter-s1000", "the filter under a running maximum", options={"interclass_filter": 0.2, "scale": 1000.0}),
    Case(
        "filter-no-fn",
        "the filter is on cosines whatever ‖x‖",
        options={"interclass_filter": 0.1, "normalize_features": False},
    ),
    Case("filter-wrong", "the filter takes the hard negative out", wrong=0.95, options={"interclass_filter": 0.9}),
    Case("subcentres", "groups of three, padded to four in kernels", C=3 * CHUNK + 6, options={"subcentres": 3}),
    Case(
        "subcentres-shift",
        "pairs under a filter and a running maximum",
        C=3 * CHUNK + 6,
        options={"subcentres": 2, "interclass_filter": 0.5, "scale": 100.0},
    ),
    Case("subcentres-no-fn", "groups of eight", C=200, options={"subcentres": 8, "normalize_features": False}),
    Case("subcentres-near", "a row near its own class's last", own=0.9, C=2 * CHUNK, options={"subcentres": 4}),
    Case("smoothing", "a share of the label on all classes", options={"label_smoothing": 0.1}),
    Case(
        "smoothing-no-fn",
        "with ‖x‖ in the place of the scale",
        options={"label_smoothing": 0.3, "normalize_features": False},
    ),
    Case("sum", "another reduction", options={"reduction": "sum"}),
    Case("mean", "the default reduction", options={"reduction": "mean"}),
]
BY_NAME = {case.name: case for case in CASES}
Loss = Callable[..., Tensor]


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; infinite where a NaN or a wrong shape is in the way."""
    if actual.shape != expected.shape:
        return math.inf
    error, size = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    return math.inf if math.isnan(error) else error / size if size else error


def evaluate(
    loss: Loss, features: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss's rows (or reduced value) and the gradients of features and weight, for an upstream gradient."""
    x, w = features.detach().requires_grad_(), weight.detach().requires_grad_()
    out = loss(x, w, labels, **{"reduction": "none", **options})
    upstream = (upstream if out.dim() else upstream[0]).to(out.dtype)
    grads = torch.autograd.grad(out, (x, w), upstream)
    return out.detach(), *grads


def oracle(case: Case, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    features, weight, labels, upstream = case.tensors(dtype)
    return evaluate(
        ak.reference.am_softmax_loss, features.double(), weight.double(), labels, upstream, **{**case.options, **options}
    )


def check(case: Case, dtype: torch.dtype, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Assert that loss and gradients are as near the exact ones as ``dtype`` allows."""
    tensors = case.tensors(dtype)
    scale = case.options.get("scale", 30.0)
    # Float32: an error of 6e-8 in a cosine is one of s · 6e-8 in a logit, relative in every gradient.
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32 * max(1.0, scale / 64)
    floor = 1e-13
    if case.degenerate:
        # Directions coincide: the gradient is the rounding left of terms of size s/‖·‖ that cancel.
        floor = tolerance * scale / min(each.norm(dim=1).min().item() for each in tensors[:2])
    for name, ours, exact in zip(("loss", "features", "weight"), actual, expected, strict=True):
        assert ours.dtype == dtype
        size = exact.norm().item()
        error = (ours.double() - exact).norm().item()
        assert error <= tolerance * size + floor, (name, error, size)


def eager(features: Tensor, weight: Tensor, labels: Tensor, scale: float = 30.0, margin: float = 0.35, **_: Any) -> Tensor:
    """What is written without this package; under autocast the product is in half precision."""
    cosine = linear(normalize(features), normalize(weight)).float()
    offset = torch.zeros_like(cosine).scatter_(1, labels[:, None], margin)
    return cross_entropy(scale * (cosine - offset), labels, reduction="none")


def traits(device: torch.device, dtype: torch.dtype) -> Traits:
    """Of a plain call, by which a backend is chosen."""
    return Traits(device, dtype, dtype, dtype, 16, True, True, False, False)


def in_turn(cases: list[Case], *save_bytes: int | None) -> list[Any]:
    """Each case with one of ``save_bytes`` after the other: where each takes long and every pair would tell nothing more."""
    pairs = [(case, save_bytes[i % len(save_bytes)]) for i, case in enumerate(cases)]
    return [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in pairs]
