"""What is to be reached on an H200, beside the estimates: met or missed. And the backward pass that was not chosen."""

from __future__ import annotations

import itertools
from typing import Any

from amsoftmax_kernels.backends.chunking import chunk_size

from . import estimate_peers as peers
from . import gpu_targets
from .estimate import SHAPES, Card, chunks, cosine_exp, step
from .estimate_hopper import hopper_cosine_exp, hopper_step

# A library might reach this share of its rate in E·ŵ, whose tiles are few: what would be left.
SLOW = 0.6
SMALL, MILLION = SHAPES[0], SHAPES[2]


def _total(
    card: Card, backend: str, shape: tuple[int, int, int], kept: bool, launches: Any, of_rate: float, centre: int = 4
) -> Any:
    of = step if backend == "Triton" else hopper_step
    return of(card, *shape, kept, launches[kept], of_rate=of_rate, centre=centre)


def held(B: int, D: int, C: int) -> int:
    """Bytes of a step with all of E kept, beside what any way to compute it has: E, ŵ of a chunk, and 1/‖w‖."""
    return 2 * B * C + 2 * min(chunk_size(B, D), C) * D + 4 * C


def targets(card: Card, launches: dict[bool, dict[bool, int]]) -> list[dict[str, Any]]:
    """Each with its estimate, and with that for E·ŵ at 60% of the rate assumed (the peers' as well).

    ``launches``: :func:`.estimate.few_launches`.
    """
    rows: list[dict[str, Any]] = []

    def add(name: str, backend: str, shape: tuple[int, int, int], unit: str, limit: float, *values: float) -> None:
        most = unit != "of the floor" and not unit.startswith("times")
        found = [("met" if (value <= limit if most else value >= limit) else "missed") for value in values]
        rows.append(
            {"target": name, "backend": backend, "shape": shape, "unit": unit, "limit": limit,
             "estimate": values[0], "slow_product": values[1], "verdict": found[0], "slow_verdict": found[1]}
        )  # fmt: skip

    for name, backend in (("triton", "Triton"), ("cuda", "C++")):
        totals = {
            (shape, kept, rate): _total(card, backend, shape, kept, launches, rate)
            for shape in SHAPES for kept in (True, False) for rate in (1, SLOW)
        }  # fmt: skip
        for kept, limit in ((True, gpu_targets.KEPT[name]), (False, gpu_targets.RECOMPUTED[name])):
            for shape in SHAPES[1:]:
                shares = (totals[shape, kept, rate]["of_floor"] for rate in (1, SLOW))
                add("E kept" if kept else "recomputed", backend, shape, "of the floor", limit, *shares)
        add("replayed", backend, SMALL, "ms", 0.06, *(1e3 * totals[SMALL, True, rate]["total_s"] for rate in (1, SLOW)))
        theirs = {rate: peers.partial_fc(card, *MILLION, rate) for rate in (1, SLOW)}
        add("PartialFC's time", backend, MILLION, "times as fast", 3,
            *(theirs[rate]["total_s"] / totals[MILLION, True, rate]["total_s"] for rate in (1, SLOW)))  # fmt: skip
        add("PartialFC's memory", backend, MILLION, "of it", 0.25, *[held(*MILLION) / theirs[1]["held"]] * 2)
        for (how, centre), shape in itertools.product((("", 4), (", bare", 4), (", bare, bf16", 2)), SHAPES):
            more = 0 if how else peers.normalization(card, *shape[1:])
            least, slow = ({name: of(card, *shape, rate) + more for name, of in peers.PEERS.items()} for rate in (1, SLOW))
            best = min(least, key=lambda name: least[name])
            ours = (_total(card, backend, shape, True, launches, rate, centre)["total_s"] for rate in (1, SLOW))
            ratios = (mine / min(theirs.values()) for mine, theirs in zip(ours, (least, slow), strict=True))
            add(f"{best}{how}", backend, shape, "of its time", 1, *ratios)
    for shape in SHAPES[1:]:
        cpp = max(hopper_cosine_exp(card, *shape).values())
        add(
            "Triton's kernel",
            "C++",
            shape,
            "times as fast",
            gpu_targets.CUDA_TIMES,
            *[cosine_exp(card, *shape)["total"] / cpp] * 2,
        )
    return rows


def printed(rows: list[dict[str, Any]], card: Card) -> str:
    """The table as text, and the peers' times."""
    lines = [
        f"To reach on an {card.name}, by these estimates, and with E·ŵ at {SLOW:.0%} of the rate assumed; of CCE (which",
        "leaves out what it filters), Liger and quack the best, bare: given normalized centres, as ours is not, in bf16, as",
        "ours are in the last comparison. 0.15 ms launched one by one is up to the host: python -m bench host.",
        f"{'target':18} {'backend':7} {'B':>5} {'C':>11} {'limit':>6} {'estimate':>8}         {'60%':>8}",
    ]
    for row in rows:
        B, _, C = row["shape"]
        lines.append(
            f"{row['target']:18} {row['backend']:7} {B:5} {C:11,} {row['limit']:6} {row['estimate']:8.3f} {row['verdict']:6}"
            f"  {row['slow_product']:8.3f} {row['slow_verdict']:6}  {row['unit']}"
        )
    lines += ["", "Others' steps: milliseconds, with PyTorch's normalization; bare in brackets"]
    names = [*peers.PEERS, "CCE, all of it"]
    lines.append(f"{'B':>5} {'C':>11} {'eager':>8} {'PartialFC':>9} " + " ".join(f"{name:>19}" for name in names))
    for B, D, C in SHAPES:
        bare = [of(card, B, D, C) for of in peers.PEERS.values()] + [peers.cce(card, B, D, C, filtered=False)]
        more = peers.normalization(card, D, C)
        pairs = " ".join(f"{1e3 * (each + more):9.3f} {f'({1e3 * each:.3f})':>9}" for each in bare)
        eager, partial_fc = peers.eager(card, B, D, C), peers.partial_fc(card, B, D, C)["total_s"]
        lines.append(f"{B:5} {C:11,} {1e3 * eager:8.3f} {1e3 * partial_fc:9.3f} {pairs}")
    lines += [
        "",
        "The backward pass with nothing kept, milliseconds: E again by chunks, then products; or in a kernel for dx̂ and one",
        "for dŵ, which make it twice and store none; and this with all but the bytes overlapped",
    ]
    for B, D, C in SHAPES[1:]:
        ours, fused = backward(card, B, D, C), fused_backward(card, B, D, C)
        values = (ours, fused["total"], fused["least"])
        lines.append(f"{B:5} {C:11,} " + " ".join(f"{1e3 * value:8.3f}" for value in values))
    return "\n".join(lines)


def backward(card: Card, B: int, D: int, C: int) -> float:
    """Seconds of Triton's backward pass with nothing kept, without its launches: of the step's pieces but the first ones."""
    nothing = {True: 0, False: 0}
    kept, recomputed = (step(card, B, D, C, how, nothing)["pieces_s"] for how in (True, False))
    again = recomputed["prepare"] - kept["prepare"] + kept["cosine_exp"]
    return float(again + recomputed["product with centres"] + recomputed["gradient"])


def fused_backward(card: Card, B: int, D: int, C: int) -> dict[str, float]:
    """Seconds of two kernels, for dx̂ and for dŵ, that each make E anew and store none of it.

    Four products in place of three. A program holds 64 rows of its gradient in float32, as many as two warpgroups have
    registers for at D = 512, and loads the other operand once for both of its products: 2·64 flops a byte, where one
    product of tiles of 64 x 512 has 57 and one of 128 x 256 has 85. Exponentials follow the products, 16 a clock and SM;
    ``least`` has everything at once but the bytes of the Jacobian, and of ŵ made again where it was not one chunk.
    """
    products, logits = 4 * B * C * D / card.products, B * C
    exponentials = logits / 16 / card.multiprocessors / card.clock
    l2 = logits * D * 2 / 64 / card.l2
    moved = 8 * C * D + (6 * C * D if len(chunks(B, D, C)) > 1 or chunks(B, D, C)[0][1] > 1 else 0)
    return {
        "total": 2 * max(products + exponentials, l2) + moved / card.copy,
        "least": 2 * max(products, exponentials, l2) + moved / card.copy,
    }
