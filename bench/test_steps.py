"""`pytest bench --benchmark-only`: a step of the loss, forward and backward, by library, shape, dtype and device.

Choose by the parameters' names (`-k "ours and C10000 and float32"`), or give a shape of your own (`--shape 64 512 5000`).
pytest-benchmark stores and compares the times (`--benchmark-json`, `--benchmark-autosave`, `pytest-benchmark compare`).
Beside them, in `extra_info`, are the floor and the peak memory. Libraries do not take turns here: for a claim of "n times
as fast" there is `python -m bench loss`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import machine, measure
from .gpu import graphs
from .gpu import peers as gpu_peers
from .loss import memory
from .loss.peers import PEERS, Peer, problem, step

SLOWEST = 20.0  # seconds a step; one that takes longer is left out
ROOM = 0.85  # of the memory that is free; a step that needs more is left out
GRAPH_BELOW = 1 << 34  # B·D·C of a step that a GPU ends sooner than the host can launch it
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of losses that should agree
_losses: dict[str, float] = {}


def libraries(device: str) -> dict[str, Peer]:
    """Every way to make the step on a device, by name."""
    return {peer.name: peer for peer in [*PEERS, *(gpu_peers.peers() if device == "cuda" else [])]}


@functools.cache
def rates(B: int, D: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What products reach here, measured once."""
    return measure.product_rates(B, D, device, dtype)


def test_step(benchmark: Any, library: str, shape: tuple[int, int, int], dtype: str, device: str) -> None:
    """Times one library at one shape; fails if its loss is not the others'."""
    peer, place, (B, D, C) = libraries(device)[library], torch.device(device), shape
    _skip_what_cannot_run(peer, shape, place)
    benchmark.group = f"B={B} D={D} C={C} {dtype} {device}"
    graph = device == "cuda" and B * D * C < GRAPH_BELOW
    function, loss, peak = _function(peer, shape, dtype == "bfloat16", place, graph)
    if device == "cpu":
        seconds = measure.seconds(function, place)
        if seconds > SLOWEST:
            pytest.skip(f"a step takes {seconds:.0f} s, more than {SLOWEST:.0f}")
        in_all = memory.peak_memory(library, B, D, C, place, dtype == "bfloat16")
        peak = None if in_all is None else in_all["above_inputs_and_gradients"]
    benchmark.extra_info |= {
        "library": library, "B": B, "D": D, "C": C, "dtype": dtype, "device": device, "graph": graph, "loss": loss,
        "floor_s": 6 * B * D * C / rates(B, D, place, getattr(torch, dtype))["torch.mm"],
        "peak_bytes": peak,
    }  # fmt: skip
    benchmark(function)
    if peer.margin:
        expected = _losses.setdefault(benchmark.group, loss)
        assert abs(loss - expected) <= TOLERANCE[dtype] * abs(expected), f"loss {loss:.6g}, others have {expected:.6g}"


def _skip_what_cannot_run(peer: Peer, shape: tuple[int, int, int], device: torch.device) -> None:
    B, D, C = shape
    reason = peer.unavailable()
    if reason is not None:
        pytest.skip(reason)
    needed, free = 4 * (3 * C * D + 3 * B * D) + peer.memory(B, D, C), machine.available_bytes(device)
    if free is not None and needed > ROOM * free:
        pytest.skip(f"needs about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} are free")


def _function(
    peer: Peer, shape: tuple[int, int, int], autocast: bool, device: torch.device, graph: bool
) -> tuple[Callable[[], Any], float, int | None]:
    """What is timed, already warm; the loss of the first step; on a GPU the peak memory of one.

    On a GPU it ends when the device does, and goes through several problems so that none is found in the cache.
    """
    loss = peer.make()
    problems = [problem(*shape, device, seed) for seed in range(measure.copies(*shape, device))]
    if peer.given is not None:
        problems = [peer.given(*each) for each in problems]
    steps: list[Callable[[], Any]] = [functools.partial(step, loss, *each, autocast=autocast) for each in problems]
    value = float(steps[0]())
    if device.type != "cuda":
        return steps[0], value, None
    peak = memory.peak_on_gpu(steps[0], problems)
    if graph:
        steps = [graphs.capture(functools.partial(_as_tuple, each), device)[0] for each in steps]
    turns = itertools.cycle(steps)

    def function() -> None:
        next(turns)()
        torch.cuda.synchronize()

    for _ in steps:
        function()
    return function, value, peak


def _as_tuple(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return (function(),)
