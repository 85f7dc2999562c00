"""The comparison with which a backend proves itself: what is right passes, by any rounding, and what is wrong does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import Traits, chunked, comparison

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own proof is its test")


@pytest.mark.parametrize(
    ("width", "dtype"), [(3, torch.float16), (64, torch.float16), (64, torch.bfloat16), (64, torch.float32)]
)
def test_kernels_that_are_right_pass(
    width: int, dtype: torch.dtype, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C++ kernels, which multiply float32 as TF32, with every option: no proof fails by rounding."""
    monkeypatch.setattr(comparison, "kind", lambda dtype: "tf32" if dtype == torch.float32 else "half")
    for features, normalize, filtered in ((dtype, True, True), (torch.float32, False, False)):
        traits = Traits(CPU, dtype, features, torch.float32, width, normalize, False, filtered, True)
        assert comparison.compare("cuda", traits) is None


FAULTY: dict[str, Callable[[Any], None]] = {
    "a gradient too large": lambda b: b.spoil("backward", lambda x, w, s: (x * 1.5, w, s)),
    "a gradient of zeros": lambda b: b.spoil("backward", lambda x, w, s: (x, w * 0, s)),
    "one class without its gradient": lambda b: b.spoil("backward", lambda x, w, s: (x, w.index_fill(0, b.zero, 0), s)),
    "no margin": lambda b: setattr(b, "forward", lambda p, request: chunked.forward(p, request._replace(margin=0.0))),
    "a NaN": lambda b: b.spoil("backward", lambda x, w, s: (x, w.index_fill(0, b.zero, float("nan")), s)),
    "no gradient of the scale": lambda b: b.spoil("backward", lambda x, w, s: (x, w, s * 0)),
}


class Spoilt:
    """The chunked backend with a fault."""

    zero = torch.tensor([0])

    def __init__(self) -> None:
        self.forward, self.backward = chunked.forward, chunked.backward
        self.unavailable_reason, self.refusal = (lambda: None), (lambda *_: None)

    def spoil(self, name: str, change: Callable[..., Any]) -> None:
        right = getattr(self, name)
        setattr(self, name, lambda *arguments: change(*right(*arguments)))


@pytest.mark.parametrize(
    ("width", "dtype", "bounded", "normalize"),
    [
        (1, torch.float32, True, True), (3, torch.bfloat16, True, True), (16, torch.bfloat16, False, True),
        (512, torch.float32, False, True), (512, torch.bfloat16, False, False),
    ],
)  # fmt: skip
def test_the_comparison_tells_right_from_wrong(
    width: int, dtype: torch.dtype, bounded: bool, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    traits = Traits(CPU, dtype, torch.float32, torch.float32, width, normalize, bounded, width == 512, False)
    spoilt = Spoilt()
    monkeypatch.setitem(backends._loaded, "triton", spoilt)  # type: ignore[arg-type]
    assert comparison.compare("triton", traits, "reference") is None
    for what, fault in FAULTY.items():
        if what == "one class without its gradient" and dtype == torch.bfloat16:
            continue  # one of many is within its rounding
        if what == "no gradient of the scale" and (bounded or not normalize):
            continue
        spoilt.__init__()  # type: ignore[misc]
        fault(spoilt)
        assert comparison.compare("triton", traits, "reference") is not None, what
