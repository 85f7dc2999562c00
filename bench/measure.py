"""Time, and the rates that a machine reaches."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from amsoftmax_kernels.backends.products import product_nt


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


# Of a GPU's clock, some 0.6 ms: time for the host to queue a few launches.
_HEAD_START = 1_000_000


def first_line(error: BaseException) -> str:
    """Of what an exception says, if anything, after its type."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def seconds(function: Callable[[], Any], device: torch.device, queued: bool = False) -> float:
    """How long one call takes; on a GPU by events around it, ``queued`` behind something else.

    A kernel of a few µs takes longer to launch: alone, it is the host that would be timed.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if queued:
        torch.cuda._sleep(_HEAD_START)
    first.record()
    function()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def interleaved(
    functions: dict[str, Callable[[], Any]], device: torch.device, budget: float, queued: bool = False
) -> dict[str, Times]:
    """Time functions in turn, so that a drift of the machine's speed falls on all alike.

    Each runs twice in a row and the second is counted: the first also pays for memory that the one before it gave back.
    At most fifty rounds and at least three (two, of steps over 5 s). ``budget`` is each function's own seconds, so that a
    slow one does not leave the others with few samples. ``queued``: as in :func:`seconds`.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(50):
        for name, function in functions.items():
            taken = samples[name]
            fewest = 2 if taken and min(taken) > 5 else 3
            if turn < fewest or 2 * sum(taken) < budget:
                function()
                taken.append(seconds(function, device, queued))
    return {name: Times(each) for name, each in samples.items()}


def product_rates(B: int, D: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Flop/s of the fastest torch.mm, and of the fastest product at all, over the three products' shapes and some sizes.

    The package's own products on a CPU are float32 whatever ``dtype`` is.
    """
    best = {"torch.mm": 0.0, "any": 0.0}
    for n in (512, 1024, 2048, 4096, 8192):
        shapes = ((n, D), (B, D), (n, B))
        w, x, e = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
        w_own, x_own, e_own = (each.float() if device.type == "cpu" else each for each in (w, x, e))
        xT = x_own.T.contiguous()
        candidates = (
            ("torch.mm", functools.partial(torch.mm, w, x.T)),
            ("torch.mm", functools.partial(torch.mm, e, x)),
            ("torch.mm", functools.partial(torch.mm, e.T, w)),
            ("any", functools.partial(product_nt, w_own, x_own)),
            ("any", functools.partial(product_nt, e_own, xT)),
        )
        for name, product in candidates:
            fastest = min(seconds(product, device) for _ in range(8))
            best[name] = max(best[name], 2 * B * D * n / fastest)
    best["any"] = max(best.values())
    return best


def copies(B: int, D: int, C: int, device: torch.device) -> int:
    """How many problems to take in turn so that a step on a GPU does not find its inputs in the cache."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(2 * cache // (4 * D * (B + C)) + 1, 32)
