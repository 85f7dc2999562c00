"""Partial sums and maxima of many chunks, in memory for a few of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import parts

from .cases import CHUNK, Case, relative

CASE = Case("", "", B=40, C=7 * CHUNK + 5, D=8)
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def name(fused_backend: str, short_chunks: None) -> str:
    """In seven chunks and an eighth, which two places hold."""
    return fused_backend


@pytest.mark.parametrize("places", [2, 7])
@pytest.mark.parametrize("options", [{}, {"scale": 1000.0}, {"interclass_filter": 0.3, "scale": 200.0}], ids=str)
def test_chunks_share_places(
    name: str, options: dict[str, Any], places: int, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, weight, labels, _ = CASE.tensors(torch.float32)
    labels[4], features[9] = -100, 0
    device = GPU if name == "triton" else torch.device("cpu")  # where the emulation is
    features, weight, labels = (each.to(device) for each in (features, weight, labels))
    exact, expected = ak.reference.am_softmax_loss(
        features.double(), weight.double(), labels, reduction="none", return_predictions=True, **options
    )
    how = {"backend": name, "reduction": "none", "return_predictions": True, **options}
    apart, likewise = ak.am_softmax_loss(features, weight, labels, **how)
    assert relative(apart, exact) < (2e-5 if name == "triton" else 1e-3)  # in TF32
    assert name != "triton" or torch.equal(likewise, expected)
    monkeypatch.setattr(parts, "places_for", lambda *_: places)
    loss, predictions = ak.am_softmax_loss(features, weight, labels, **how)
    assert relative(loss, apart) < 1e-6 and torch.equal(predictions, likewise)


def test_memory_does_not_grow_with_the_classes() -> None:
    for streams, batch in ((1, 65_536), (64, 32_768), (4, 4_096), (8, 1)):
        for chunks in (1, 2, 100, 10_000, 1_000_000):
            places = parts.places_for(chunks, streams * batch)
            assert min(chunks, 2) <= places <= chunks
            assert 8 * places * streams * batch <= max(parts.PART_BYTES, 16 * streams * batch)
    assert parts.places_for(306, 4 * 4_096) == 306  # ten million classes
    assert parts.places_for(306, 4_096 * 512, 4) == 8
