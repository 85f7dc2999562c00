"""Ceilings of this card, then time and peak memory of each way to make the step, and where our own time goes."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import machine, measure
from ..kernels.estimate import SHAPES
from ..loss.memory import peak_on_gpu
from ..loss.peers import Peer, problem, step
from .peers import half_centres, peers

Row = dict[str, Any]
# The other dtypes once each: (B, D, C).
OTHER_DTYPES = {"float32": (1024, 512, 93_431), "float16": (1024, 512, 93_431)}
# A loss that others should share, relative: they round each cosine to bfloat16.
SAME_LOSS = 2e-2
# A step that would take longer, by what the one of the last shape took a logit, is left out: it is taken seven times.
SLOWEST = 4.0
# Peers with a dtype of their own, and the rows that they may stand in.
COMPUTED_IN = {
    "PartialFC algorithm": ("float16", "bfloat16"), "CCE": ("bfloat16",), "Liger": ("bfloat16",), "quack": ("bfloat16",),
}  # fmt: skip


def ceilings(device: torch.device, shapes: Any = None, size: int = 8192) -> dict[str, Any]:
    """Flop/s of a large square product by dtype, bytes/s of a copy, and the three products of each shape."""
    rates = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        n = size // 4 if name == "float32" else size
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[name] = 2 * n**3 / _median(functools.partial(torch.mm, a, b), device, 12)
    source = torch.empty(size * size * 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / _median(lambda: target.copy_(source), device, 12)
    return {
        "products_flop_s": rates,
        "copy_bytes_s": copy,
        "shapes": [three_products(B, D, C, device) for B, D, C in (shapes or SHAPES)],
    }


def three_products(B: int, D: int, C: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Row:
    """Seconds of the three products that no method can avoid, by torch.mm; on a part of the classes where C is large.

    Of whole rows of 16: a library is slower at others, which would make a floor of less than the card can do.
    """
    part = min(-(-C // 16) * 16, 131_072)
    x, w, e = (torch.randn(shape, device=device).to(dtype) for shape in ((B, D), (part, D), (B, part)))
    products: list[Callable[[], Tensor]] = [lambda: x @ w.T, lambda: e @ w, lambda: e.T @ x]
    seconds = [_median(each, device, 12) * C / part for each in products]
    return {"B": B, "D": D, "C": C, "seconds": seconds, "flop_s": 6 * B * D * C / sum(seconds)}


def times(device: torch.device, known: dict[str, Any], quick: bool, shapes: Any = None) -> Iterator[Row]:
    """One row for each shape, dtype and way to make the step."""
    wanted = [(*shape, "bfloat16") for shape in (shapes or SHAPES)]
    if quick:
        wanted = wanted[:3]
    elif shapes is None:
        wanted += [(*shape, dtype) for dtype, shape in OTHER_DTYPES.items()]
    took: dict[tuple[str, str], float] = {}  # seconds a logit, by peer and dtype
    for B, D, C, dtype in wanted:
        floors = _floors(B, D, C, dtype, known, device)
        expected: float | None = None
        every = peers()
        # The first once more at the end: what has become of this card's clock meanwhile.
        for i, peer in enumerate([*every, every[0]]):
            name = peer.name + (", again" if i == len(every) else "")
            row: Row = {"B": B, "D": D, "C": C, "dtype": dtype, "peer": name, "margin": peer.margin}
            reason = _left_out(peer, B, D, C, dtype, device, quick)
            predicted = took.get((peer.name, dtype), 0.0) * B * C
            if reason is None and predicted > SLOWEST:
                reason = f"would take some {predicted:.0f} s a step"
            if reason is None:
                try:
                    row |= _measure(peer, B, D, C, dtype, device, quick)
                except Exception as error:  # whatever a peer's library raises must not end the others' run
                    reason = f"failed: {measure.first_line(error)}"
            if reason is not None:
                yield row | {"skipped": reason}
                _release(device)
                continue
            took[peer.name, dtype] = row["median_s"] / (B * C)
            products = 4 if "recomputed" in peer.name else 3
            floor, of_card = floors[products], _card_floor(products, B, D, C, dtype, known)
            if peer.given is half_centres:  # half the bytes
                less = _seconds_moved(D, C, known) / 2
                floor, of_card = floor - less, of_card - less
            row |= {"floor_s": floor, "of_floor": floor / row["median_s"], "of_card_floor": of_card / row["median_s"]}
            if peer.margin:
                expected = expected or row["loss"]
                row["ok"] = abs(row["loss"] - expected) <= SAME_LOSS * abs(expected)
            yield row
            _release(device)


def profile(device: torch.device, shapes: Any = ((256, 512, 10_516), (1024, 512, 1_000_000))) -> list[Row]:
    """Seconds of every kernel of our own step."""
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    found = []
    for B, D, C in shapes:
        tensors = problem(B, D, C, device)
        every = peers()
        plain = [each for each in every if each.given is None]
        for peer in [each for each in plain if each.name.split(",")[0] in ("triton", "cuda")] or plain[:2]:
            loss = peer.make()
            for _ in range(3):
                step(loss, *tensors, autocast=device.type == "cuda")
            with torch.profiler.profile(activities=[kind]) as recorded:
                for _ in range(5):
                    step(loss, *tensors, autocast=device.type == "cuda")
                _synchronize(device)
            events = [
                {"name": event.key[:100], "calls": event.count / 5, "seconds": _device_seconds(event) / 5}
                for event in recorded.key_averages()
            ]
            events = sorted((each for each in events if each["seconds"] > 0), key=lambda each: -each["seconds"])[:30]
            found.append({"peer": peer.name, "B": B, "D": D, "C": C, "kernels": events})
        _release(device)
    return found


def _device_seconds(event: Any) -> float:
    return float(getattr(event, "self_device_time_total", 0) or getattr(event, "self_cuda_time_total", 0)) / 1e6


def _floors(B: int, D: int, C: int, dtype: str, known: dict[str, Any], device: torch.device) -> dict[int, float]:
    """Seconds of three products (four if E is recomputed) of these shapes, and of the bytes that must move after them.

    A yardstick: a step that has both at once can be below it.
    """
    same = [row for row in known["shapes"] if (row["B"], row["D"], row["C"]) == (B, D, C)] if dtype == "bfloat16" else []
    row = same[0] if same else three_products(B, D, C, device, getattr(torch, dtype))
    moved = _seconds_moved(D, C, known)
    return {3: sum(row["seconds"]) + moved, 4: sum(row["seconds"]) + row["seconds"][0] + moved}


def _card_floor(products: int, B: int, D: int, C: int, dtype: str, known: dict[str, Any]) -> float:
    """The same with every product at the rate of a large square one."""
    return 2 * products * B * C * D / float(known["products_flop_s"][dtype]) + _seconds_moved(D, C, known)


def _seconds_moved(D: int, C: int, known: dict[str, Any]) -> float:
    """Float32 centres read once a pass, their gradient written."""
    return 12 * C * D / float(known["copy_bytes_s"])


def _left_out(peer: Peer, B: int, D: int, C: int, dtype: str, device: torch.device, quick: bool) -> str | None:
    missing = peer.unavailable()
    if missing:
        return missing
    only = COMPUTED_IN.get(peer.name.split(",")[0]) or (None if peer.given is None else ("bfloat16",))
    if only is not None and dtype not in only:
        return f"computes in {only[0]}"
    if quick and ("chunked" in peer.name or peer.name == "torch.compile"):
        return "left out of a quick run"
    needed, free = 8 * C * D + peer.memory(B, D, C), machine.available_bytes(device)
    if free is not None and needed > 0.92 * free:
        return f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"
    return None


def _measure(peer: Peer, B: int, D: int, C: int, dtype: str, device: torch.device, quick: bool) -> Row:
    loss = peer.make()
    problems = [problem(B, D, C, device, seed) for seed in range(measure.copies(B, D, C, device))]
    if peer.given is not None:
        problems = [peer.given(*each) for each in problems]
    turns = itertools.cycle(problems)
    half = None if dtype == "float32" else getattr(torch, dtype)

    def one() -> Tensor:
        x, w, y = next(turns)
        x.grad = w.grad = None
        with torch.autocast(device.type, half, enabled=half is not None and device.type == "cuda"):
            value = loss(x, w, y)
        value.backward()
        return value.detach()

    value = one().item()
    one()
    peak = peak_on_gpu(one, problems) if device.type == "cuda" else None
    once = _seconds(one, device, 1)
    budget = 0.5 if quick else 1.5
    batch = max(min(int(0.02 / once), 50), 1)  # many short steps between two events, as they follow one another in training
    samples = [_seconds(one, device, batch) for _ in range(max(min(int(budget / (once * batch)), 15), 3))]
    return {
        "loss": value, "median_s": statistics.median(samples), "min_s": min(samples), "max_s": max(samples),
        "samples": len(samples), "steps_a_sample": batch, "peak_bytes": peak,
    }  # fmt: skip


def _seconds(function: Callable[[], Any], device: torch.device, times: int) -> float:
    def several() -> None:
        for _ in range(times):
            function()

    return measure.seconds(several, device) / times


def _median(function: Callable[[], Any], device: torch.device, samples: int) -> float:
    for _ in range(3):
        function()
    return statistics.median(measure.seconds(function, device, queued=True) for _ in range(samples))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
