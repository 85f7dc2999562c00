"""Time of a training step of the sharded head: the floor, an efficiency that says where it is from, and the wire."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import measure
from ..kernels import estimate
from .memory import OPTIMIZERS, Run

RESULTS = Path(__file__).parents[1] / "results"
_COPY_BYTES = 1 << 28


_H200, _A100 = estimate.CARDS["sm_90"], estimate.CARDS["sm_80"]
# NVIDIA's data sheets: H200 SXM 4.8 TB/s and 141 GB, H100 SXM 3.35 TB/s and 80 GB, both 989 TFLOP/s in dense bfloat16;
# A100 SXM 312 TFLOP/s, 2.04 TB/s and 80 GB. What is reached of them is in each card's source.
_H100 = replace(
    _H200, name="H100 SXM", copy=2.85e12,
    source="large product 790 TFLOP/s as measured on an H200, the same chip; copy 85% of the datasheet's 3.35 TB/s, assumed",
)  # fmt: skip
GPUS = {"h200": (_H200, 141e9), "h100": (_H100, 80e9), "a100": (_A100, 80e9)}  # and bytes of memory


@dataclass(frozen=True)
class Rates:
    """What the device can do, and how near to it the head comes: as on a card, or as recorded."""

    products: float  # flop/s
    copy: float  # bytes/s read and written
    source: str
    card: estimate.Card | None = None  # whose kernels kernels/estimate.py counts
    recorded: tuple[dict[str, Any], ...] = ()  # times over the floor as measured


def of_gpu(name: str, kind: str = "bfloat16") -> Rates:
    """A card's of :data:`GPUS`; ``kind`` of :data:`.estimate.KINDS`."""
    card = GPUS[name][0]
    units = 64 if card.capability == (8, 0) else 128
    more = f"; in float32 80% of {units} multiply-adds a clock and SM, assumed" if kind == "float32" else ""
    return Rates(estimate.KINDS[kind].rate(card), card.copy, f"{card.name}: {card.source}{more}", card)


def of_another_card(products: float, copy: float) -> Rates:
    """The rates as given; an H200's kernels and number of SMs stand for the card's own."""
    return Rates(products, copy, "rates as given, kernels as on an H200", _H200)


def of_this_cpu(rows: int, dim: int) -> Rates:
    """Measured now, in a few seconds; the efficiency is that of the recorded results of bench loss."""
    device = torch.device("cpu")
    products = measure.product_rates(min(rows, 512), dim, device, torch.float32)["any"]
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    seconds = min(measure.seconds(lambda: target.copy_(source), device) for _ in range(5))
    found, names = [], []
    for path in sorted(RESULTS.glob("loss-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["dtype"] == "float32" and "gpu" not in report["machine"] and "quick" not in path.name:
            found += [row for row in report["results"] if row["peer"].startswith("ours") and not row["skipped"]]
            names.append(path.name)
    if not found:
        raise ValueError(f"there are no recorded CPU results in {RESULTS}: python -m bench loss makes them")
    text = (
        f"this CPU, {torch.get_num_threads()} threads: products and copy measured now; efficiency of one process, "
        f"measured, from {', '.join(names)}"
    )
    return Rates(products, 2 * _COPY_BYTES / seconds, text, recorded=tuple(found))


def head_seconds(run: Run, rates: Rates) -> tuple[float, float]:
    """Forward and backward pass of a rank: the time, and the floor of what it computes."""
    rows, dim, classes = run.rows, run.dim, run.columns
    if rates.recorded:
        floor = 6 * rows * dim * classes / rates.products
        return floor * _times_floor(run, rates), floor
    assert rates.card is not None
    card = replace(rates.card, products=rates.products, copy=rates.copy, float32=rates.products)
    kind = str(run.compute_dtype).removeprefix("torch.")
    share = run.kept / classes
    # Between all terms kept and none: what is not kept is computed again.
    steps = [estimate.step(card, rows, dim, classes, kept, kind) for kept in (True, False)]
    weights = (share, 1 - share)
    time, floor = (sum(w * each[name] for w, each in zip(weights, steps, strict=True)) for name in ("total_s", "floor_s"))
    return time, floor


def _times_floor(run: Run, rates: Rates) -> float:
    """The recorded time over the floor, of the shape nearest to this one's in logarithms."""

    def distance(row: dict[str, Any]) -> float:
        shape = ((row["B"], run.rows), (row["D"], run.dim), (row["C"], run.drawn))
        return sum(abs(math.log(a / b)) for a, b in shape)

    name = "ours, save_bytes=0" if run.kept < run.columns / 2 else "ours"
    nearest = min((row for row in rates.recorded if row["peer"] == name), key=distance)
    return float(nearest["of_floor"])


def update_bytes(run: Run) -> int:
    """Read and written by the optimizer's step, and by the copies of rows where classes are drawn."""
    states, size = OPTIMIZERS[run.optimizer], run.dim * run.dtype.itemsize
    dense = (3 + 2 * states) * size  # centres and gradient read, centres written, states read and written
    if run.fused:  # in the backward pass, which has the centres at hand and writes no gradient
        gather = 2 * size * run.drawn if run.sampled else 0
        return gather + run.drawn * 2 * states * size
    if not run.sampled:
        return run.classes * dense
    gather = 2 * size * run.drawn
    return gather + size * (run.classes + 2 * run.drawn) + run.classes * dense  # a gradient of zeros, rows put in


def wire_bytes(run: Run) -> dict[str, int]:
    """Received by a rank in a step."""
    others, ranks = run.ranks - 1, run.ranks
    return {
        "all-gather of features and labels": others * run.batch * (run.dim * run.compute_dtype.itemsize + 8),
        "all-reduce of z and t": 2 * others * 8 * run.rows // ranks,
        "reduce-scatter of the features' gradient": others * run.rows * run.dim * 4 // ranks,
        "sizes of the batches": others * 16,
    }


def step(run: Run, rates: Rates, link: float) -> dict[str, float]:
    """Seconds of a step by its parts, one after the other; ``link`` in bytes/s that a rank receives."""
    head, floor = head_seconds(run, rates)
    parts = {
        "head_s": head, "update_s": update_bytes(run) / rates.copy, "wire_s": sum(wire_bytes(run).values()) / link,
    }  # fmt: skip
    total = sum(parts.values())
    return {**parts, "step_s": total, "floor_s": floor, "samples_per_s": run.rows / total}
