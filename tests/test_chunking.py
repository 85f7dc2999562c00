"""Which classes fused kernels take at a time: in the forward pass several chunks together, in the backward pass one each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import Problem, chunking, parts

from .cases import CHUNK, Case, relative

pytest.importorskip("triton")
from amsoftmax_kernels.backends import triton as backend

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOGETHER = 2


@pytest.fixture(params=["triton", "cuda"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Those on fused kernels, where ŵ has room for two chunks and E for one."""
    monkeypatch.setattr(chunking, "chunk_size", lambda batch, dim: CHUNK if batch else TOGETHER * CHUNK)
    reason = backend.unavailable_reason()
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    elif reason is not None:
        pytest.skip(f"the Triton backend cannot run here: {reason}")
    return str(request.param)


@pytest.mark.parametrize("C", [1, CHUNK, 3 * CHUNK - 1, 3 * CHUNK + 1, 8 * CHUNK + 5])
def test_every_class_is_taken_once(C: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "chunk_size", lambda batch, dim: CHUNK if batch else TOGETHER * CHUNK)
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


@pytest.mark.parametrize("save_bytes", [0, 2 * CHUNK * 40 * 4], ids=["recomputed", "mixed"])
@pytest.mark.parametrize(("D", "places"), [(8, 2), (16, 100)])  # ŵ, padded, does not fit the gradient's memory, or does
@pytest.mark.parametrize("options", [{}, {"scale": 100.0}, {"margin": lambda cosine, *_: cosine - 0.3}], ids=str)
def test_gradients(
    name: str, options: dict[str, Any], D: int, places: int, save_bytes: int, poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Taken twice: what the forward pass left of ŵ is there again, and so are the bits."""
    monkeypatch.setattr(parts, "places_for", lambda chunks, *_: min(chunks, places))
    device = GPU if name == "triton" else torch.device("cpu")  # where the emulation is
    features, weight, labels, _ = Case("", "", B=40, C=6 * CHUNK + 5, D=D, own=0.5).tensors(torch.float32)
    labels[4] = -100
    found = []
    for backend_name, dtype in (("reference", torch.float64), (name, torch.float32)):
        x, w = (each.to(device, dtype, copy=True).requires_grad_() for each in (features, weight))
        how = {} if backend_name == "reference" else {"save_bytes": save_bytes}
        loss = ak.am_softmax_loss(x, w, labels.to(device), backend=backend_name, **how, **options)
        found.append((loss, *torch.autograd.grad(loss, (x, w), retain_graph=True)))
    for got, exact in zip(found[1], found[0], strict=True):
        assert relative(got.double(), exact) < (2e-5 if name == "triton" else 5e-3)  # in TF32
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
        room = shard.room_in(grad, range(256, 300))
        assert (room is not None) == fits
        if room is not None:
            assert room.shape == (44, chunking.padded(D)) and room.dtype == compute and room.is_contiguous()
            room.fill_(1)
            assert not grad[:256].any() and grad[256:].any()
    grad = torch.zeros(301 * 32)[1:-31].view(300, 32)  # at a multiple of 4 bytes only
    assert chunking.Shard.of(problem._replace(weight=grad), False).room_in(grad, range(256)) is None
