"""Time, peak memory and the floor: what the loss benchmark measures."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from amsoftmax_kernels.backends.products import product_nt

from .peers import PEERS, problem, step


@dataclass(frozen=True)
class Times:
    """Seconds a step: every sample in the order it was taken."""

    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def as_json(self) -> dict[str, float]:
        return {
            "median_s": self.median,
            "min_s": min(self.samples),
            "max_s": max(self.samples),
            "samples": len(self.samples),
        }


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """How long one call takes; on a GPU by events around it."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    function()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def interleaved(functions: dict[str, Callable[[], Any]], device: torch.device, budget: float) -> dict[str, Times]:
    """Time functions in turn, so that a drift of the machine's speed falls on all alike.

    Each runs twice in a row and the second is counted: the first also pays for memory that the one before it gave back.
    At least three rounds, at most fifty, until ``budget`` seconds have gone.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    for turn in range(50):
        if turn >= 3 and time.perf_counter() - start > budget:
            break
        for name, function in functions.items():
            function()
            samples[name].append(seconds(function, device))
    return {name: Times(each) for name, each in samples.items()}


def product_rates(B: int, D: int, device: torch.device) -> dict[str, float]:
    """Flop/s of the fastest torch.mm, and of the fastest product at all, over the three products' shapes and some sizes."""
    best = {"torch.mm": 0.0, "any": 0.0}
    for n in (512, 1024, 2048, 4096, 8192):
        w, x, e = (torch.randn(shape, device=device) for shape in ((n, D), (B, D), (n, B)))
        xT = x.T.contiguous()
        candidates = (
            ("torch.mm", functools.partial(torch.mm, w, x.T)),
            ("torch.mm", functools.partial(torch.mm, e, x)),
            ("torch.mm", functools.partial(torch.mm, e.T, w)),
            ("any", functools.partial(product_nt, w, x)),
            ("any", functools.partial(product_nt, e, xT)),
        )
        for name, product in candidates:
            fastest = min(seconds(product, device) for _ in range(8))
            best[name] = max(best[name], 2 * B * D * n / fastest)
    best["any"] = max(best.values())
    return best


def peak_memory(peer: str, B: int, D: int, C: int, device: torch.device) -> dict[str, int] | None:
    """Bytes a step needs above its inputs, and above inputs and gradients: the peak of a fresh process.

    None where the system does not tell a process its own peak.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(there, peer, B, D, C, device.type, torch.get_num_threads()))
    process.start()
    there.close()
    try:
        result: int | None = here.recv()
    except EOFError:
        result = None
    process.join()
    if result is None:
        return None
    return {"above_inputs": result, "above_inputs_and_gradients": result - 4 * D * (B + C)}


def _measure_peak(
    pipe: multiprocessing.connection.Connection, name: str, B: int, D: int, C: int, device_type: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    device = torch.device(device_type)
    loss = next(peer for peer in PEERS if peer.name == name).make()
    step(loss, *problem(8, D, 64, device))  # whatever libraries set up once
    tensors = problem(B, D, C, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, *tensors)
        pipe.send(torch.cuda.max_memory_allocated() - before)
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as clear:
            clear.write("5")  # the peak counts from here
        before = _status("VmRSS")
        step(loss, *tensors)
        pipe.send(_status("VmHWM") - before)
    except OSError:
        pipe.send(None)


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
