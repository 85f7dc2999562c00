"""Which classes the fused kernels take at a time, and the parts of sums and maxima that many chunks leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import amsoftmax_kernels as ak
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import chunking, parts

from .cases import CHUNK, Case, evaluate, relative
from .test_odd_input import check_far_from_one, far_from_one

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def name(fused_backend: str, short_chunks: None) -> str:
    return fused_backend


@pytest.mark.parametrize("C", [1, CHUNK, 3 * CHUNK - 1, 3 * CHUNK + 1, 8 * CHUNK + 5])
def test_every_class_is_taken_once(C: int, short_chunks: None) -> None:
    spans = chunking.spans(5, 8, C)
    assert [each for span in spans for each in span] == list(range(C))
    assert all(span.start % CHUNK == 0 and 0 < len(span) <= CHUNK for span in spans)


def test_a_chunk_is_bounded() -> None:
    for batch, dim in ((0, 1), (256, 17), (1024, 512), (4096, 512), (70_000, 512)):
        size = chunking.chunk_size(batch, dim)
        assert size % 256 == 0 and (size == 256 or size * max(batch, dim) <= chunking.CHUNK_ELEMENTS)


MIXED = 2 * CHUNK * 40 * 4


@pytest.mark.parametrize(
    ("D", "places", "save_bytes"), [(8, 2, 0), (16, 100, MIXED), (16, 2, None)], ids=["recomputed", "mixed", "kept"]
)
@pytest.mark.parametrize(
    ("options", "half"),
    [
        ({}, None), ({"scale": 100.0}, None), ({"margin": lambda cosine, *_: cosine - 0.3}, None),
        ({}, "autocast"), ({"scale": 100.0}, "centres"),
    ],
    ids=["plain", "shifted", "function", "autocast", "half centres, shifted"],
)  # fmt: skip
def test_gradients(
    name: str, options: dict[str, Any], half: str | None, D: int, places: int, save_bytes: int, poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Taken twice: what the forward pass saved is as it was, and so are the bits."""
    monkeypatch.setattr(parts, "places_for", lambda chunks, *_: min(chunks, places))
    device = GPU if name == "triton" else torch.device("cpu")  # where the emulation is
    features, weight, labels, _ = Case("", "", B=40, C=6 * CHUNK + 5, D=D, own=0.5).tensors(torch.float32)
    labels[4] = -100
    if half == "centres":
        features, weight = features.half().float(), weight.half().float()
    found = []
    for backend_name, dtype in (("reference", torch.float64), (name, torch.float16 if half == "centres" else torch.float32)):
        x, w = (each.to(device, dtype, copy=True).requires_grad_() for each in (features, weight))
        how = {} if backend_name == "reference" else {"save_bytes": save_bytes}
        with torch.autocast(device.type, torch.float16, enabled=half == "autocast" and backend_name == name):
            loss = ak.am_softmax_loss(x, w, labels.to(device), backend=backend_name, **how, **options)
        found.append((loss, *torch.autograd.grad(loss, (x, w), retain_graph=True)))
    exactness = 2e-5 if name == "triton" and half is None else 5e-3  # operands of 11 bits: half precision, or TF32
    for got, exact in zip(found[1], found[0], strict=True):
        assert relative(got.double(), exact) < exactness
    again = torch.autograd.grad(found[1][0], (x, w))
    assert all(map(torch.equal, again, found[1][1:]))


@pytest.mark.parametrize("places", [2, 7])
@pytest.mark.parametrize("options", [{}, {"scale": 1000.0}, {"interclass_filter": 0.3, "scale": 200.0}], ids=str)
def test_chunks_share_places(
    name: str, options: dict[str, Any], places: int, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, weight, labels, _ = Case("", "", B=40, C=7 * CHUNK + 5, D=8).tensors(torch.float32)
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


@pytest.mark.parametrize("power", [-29, -25, 19, 37])
def test_rows_of_any_norm(power: float, short_chunks: None) -> None:
    """In Triton; the C++ kernels take a smaller range, which am_softmax_loss documents."""
    reason = backends.load("triton").unavailable_reason()
    if reason is not None:
        pytest.skip(f"the Triton backend cannot run here: {reason}")
    given = far_from_one(torch.float32, power)
    actual = evaluate(ak.am_softmax_loss, *(each.to(GPU) for each in given[:4]), backend="triton")
    check_far_from_one(tuple(each.cpu() for each in actual), given, 1e-5)
