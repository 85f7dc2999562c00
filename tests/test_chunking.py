"""Which classes fused kernels take at a time: in the forward pass several chunks together, in the backward pass one each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import Problem, chunking, parts

from .cases import CHUNK, Case, relative

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOGETHER = 2


@pytest.fixture
def two_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """ŵ has room for two chunks, E for one."""
    monkeypatch.setattr(chunking, "chunk_size", lambda batch, dim: CHUNK if batch else TOGETHER * CHUNK)


@pytest.fixture
def name(fused_backend: str, two_together: None) -> str:
    return fused_backend


@pytest.mark.parametrize("C", [1, CHUNK, 3 * CHUNK - 1, 3 * CHUNK + 1, 8 * CHUNK + 5])
def test_every_class_is_taken_once(C: int, two_together: None) -> None:
    chunks = -(-C // CHUNK)
    for stored in [*range(0, C, CHUNK), C]:
        spans = chunking.forward_spans(5, 8, C, stored)
        assert [each for span in spans for each in span] == list(range(C)) and all(spans)
        assert all(len(span) <= CHUNK for span in spans if span.start < stored)
        others = [span for span in spans if span.start >= stored]
        assert all(span.start % CHUNK == 0 and len(span) <= TOGETHER * CHUNK for span in others)
        assert len(others) == -(-(chunks - -(-stored // CHUNK)) // TOGETHER)
        if others:  # the last are as many chunks as there can be
            assert -(-len(others[-1]) // CHUNK) == min(TOGETHER, chunks - stored // CHUNK)


MIXED = 2 * CHUNK * 40 * 4


@pytest.mark.parametrize(
    ("D", "places", "save_bytes"),
    [(8, 2, 0), (16, 100, MIXED), (16, 2, 0)],  # ŵ, padded, does not fit the gradient's memory, or does
    ids=["no room", "room, mixed", "room"],
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
    """Taken twice: what the forward pass left of ŵ is there again, and so are the bits."""
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


def test_the_room_in_the_gradient() -> None:
    for dtype, compute, D, fits in (
        (torch.float32, torch.float32, 32, True),
        (torch.float32, torch.float32, 20, False),  # the rows are padded
        (torch.float32, torch.bfloat16, 20, True),
        (torch.bfloat16, torch.bfloat16, 20, False),
        (torch.float16, torch.float16, 32, True),
    ):
        problem = Problem(torch.empty(4, D), torch.empty(300, D), torch.zeros(4).long(), torch.tensor(1.0), True, compute, 2)
        shard, grad = chunking.Shard.of(problem, False), torch.zeros(300, D, dtype=dtype)
        assert not shard.room_in(grad, range(256, 300)).fill_(1).isnan().any() and not grad.any()  # one chunk: not there
        shard.chunk, shard.spare = 256, None
        room = shard.room_in(grad, range(256, 300))
        assert room.shape == (44, chunking.padded(D)) and room.dtype == compute and room.is_contiguous()
        room.fill_(1)
        assert not grad[:256].any() and grad[256:].any() == fits
        assert (shard.spare is None) == fits and (fits or shard.room_in(grad, range(256)).data_ptr() == room.data_ptr())
    grad = torch.zeros(301 * 32)[1:-31].view(300, 32)  # at a multiple of 4 bytes only
    shard.chunk, shard.spare = 256, None
    shard.room_in(grad, range(256)).fill_(1)
    assert not grad.any()


def test_the_room_for_normalized_centres_is_bounded() -> None:
    for batch, dim, stored in ((1, 1, 0), (256, 1, 0), (256, 17, 0), (1024, 512, 131_072), (4096, 512, 0), (70_000, 512, 0)):
        for C in (1, 10_000, 1_000_003, 100_000_000):
            spans = chunking.forward_spans(batch, dim, C, min(stored, C))
            chunk = chunking.chunk_size(batch, dim)
            assert max(map(len, spans)) <= max(chunking.CHUNK_ELEMENTS // chunking.padded(dim), chunk)
            if stored < C:
                assert chunking.last_span(batch, dim, C, min(stored, C)) == len(spans[-1])
