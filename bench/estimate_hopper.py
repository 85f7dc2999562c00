"""The C++ kernels for Hopper estimated as :mod:`.estimate` does Triton's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from amsoftmax_kernels.backends.fused import streams_for

from .estimate import (
    SECONDS_A_LAUNCH,
    SHAPES,
    Card,
    chunks,
    cosine_exp,
    few_launches,
    floor,
    more_launches,
    prepare_bytes,
    product_with_centres,
)

BOUNDS = ("busy", "l2", "memory")


def hopper_cosine_exp(card: Card, B: int, D: int, C: int, size: int = 2, stored: bool = True) -> dict[str, float]:
    """Seconds of a launch of the C++ kernel for Hopper (csrc/kernel_sm90.cuh) by what could bound it.

    All overlaps but its ends. Operands and E, if ``stored``, take ``size`` bytes an element: 4 in TF32, whose products take
    twice as long.
    """
    e = size if stored else 0
    tile, cluster = 128, 2 if B > 128 else 1
    rows, tiles = -(-B // tile), -(-C // tile)
    blocks, slots = -(-rows // cluster), card.multiprocessors // cluster
    streams = streams_for(slots, blocks, tiles)
    rounds = -(-blocks * streams // slots)
    # A tile takes what its products take at a library's rate, or its epilogue if that is longer: 16 exponentials a clock, or
    # a warp's instructions, 800 in the machine code, one warp to each of an SM's schedulers. The ends: x̂ at 64 bytes a
    # clock, and the last epilogue.
    products = size * tile * tile * D / (card.products / card.multiprocessors / card.clock)
    clocks = max(products, tile * tile / 16, 800)
    ends = tile * D * size / 64 + 1500
    x_again = 0 if D * size <= 1024 else tile * D * size
    return {
        "busy": rounds * (-(-tiles // streams) * clocks + ends) / card.clock,
        "l2": rows * tiles * (tile * D * size / cluster + x_again + tile * tile * e) / card.l2,
        "memory": (size * C * D + e * B * C) / card.copy,
    }


def hopper_grad_centres(card: Card, B: int, D: int, C: int, centre: int = 4) -> dict[str, float]:
    """Seconds of a launch of the C++ kernel for the centres' gradient (csrc/gradient_sm90.cuh), to a width of 512."""
    halves, columns, together = 2 if D > 256 else 1, 256 if D > 128 else 128, 512
    tiles = -(-C // together)
    rounds = -(-tiles // (card.multiprocessors // (4 * halves)))
    # A block's tile, at a library's rate, whose products of 128 x 256 ask the same of an SM's shared memory.
    products = 2 * 128 * columns * B / (card.products / card.multiprocessors / card.clock)
    # After it, the centres: eight rounds of 16 loads under way together, each some 800 clocks as the L2 cache is busy; dw is
    # stored meanwhile. Assumed.
    epilogue = 8 * 800
    return {
        "busy": rounds * (products + epilogue) / card.clock,
        "l2": tiles * (2 * B * (together + halves * columns) + 3 * centre * together * D) / card.l2,  # the centres twice, dw
        "memory": (2 * centre * C * D + 2 * B * C) / card.copy,
    }


def _over_chunks(kernel: Callable[..., dict[str, float]], card: Card, B: int, D: int, C: int, **how: Any) -> float:
    return sum(count * max(kernel(card, B, D, classes, **how).values()) for classes, count in chunks(B, D, C))


def hopper_step(
    card: Card, B: int, D: int, C: int, kept: bool, launches: dict[bool, int], of_rate: float = 1, centre: int = 4
) -> dict[str, Any]:  # fmt: skip
    """As :func:`.estimate.step` in bfloat16, with the C++ kernels for Hopper."""
    pieces = {
        "prepare": prepare_bytes(B, D, C, kept, centre=centre) / card.copy,
        "cosine_exp": _over_chunks(hopper_cosine_exp, card, B, D, C),
        "product with centres": product_with_centres(card, B, D, C, of_rate=of_rate),
        "grad_centres": _over_chunks(hopper_grad_centres, card, B, D, C, centre=centre),
        "launches": (launches[True] + more_launches(B, D, C, kept, at_once=True)) * SECONDS_A_LAUNCH,
    }
    if not kept:
        pieces["cosine_exp"] += _over_chunks(hopper_cosine_exp, card, B, D, C, stored=False)
    total, least = sum(pieces.values()), floor(card, B, D, C, kept, centre=centre)
    return {"pieces_s": pieces, "total_s": total, "floor_s": least, "of_floor": least / total}


def printed_hopper(card: Card) -> str:
    """The estimates of the C++ kernels, the first beside that of Triton's, as text."""
    launches = few_launches("sm_90")
    lines = [
        "cosine_exp alone, E stored: estimated milliseconds, in C++ by what could bound it, in Triton, and in C++ in TF32"
    ]
    lines.append(f"{'B':>5} {'D':>4} {'C':>11} {'busy':>8} {'l2':>8} {'memory':>8} {'C++':>8} {'Triton':>8} {'C++ TF32':>8}")
    for B, D, C in SHAPES:
        bounds = [sum(n * hopper_cosine_exp(card, B, D, c)[name] for c, n in chunks(B, D, C)) for name in BOUNDS]
        of_cpp, tf32 = (_over_chunks(hopper_cosine_exp, card, B, D, C, size=size) for size in (2, 4))
        values = (*bounds, of_cpp, cosine_exp(card, B, D, C)["total"], tf32)
        lines.append(f"{B:5} {D:4} {C:11,} " + " ".join(f"{1e3 * value:8.3f}" for value in values))
    lines += [
        "",
        "A step on the C++ kernels for Hopper, estimated: milliseconds. The floor adds products and bytes; grad_centres has"
        " both at once",
        f"{'B':>5} {'D':>4} {'C':>11} {'E':>10} {'prepare':>8} {'cosine_exp':>10} {'product':>8} {'grad_centres':>12}"
        f" {'launches':>8} {'total':>8} {'floor':>8} {'share':>6}",
    ]
    for (B, D, C), kept in itertools.product(SHAPES, (True, False)):
        of = hopper_step(card, B, D, C, kept, launches[kept])
        p = [1e3 * value for value in of["pieces_s"].values()]
        lines.append(
            f"{B:5} {D:4} {C:11,} {'kept' if kept else 'recomputed':>10} {p[0]:8.3f} {p[1]:10.3f} {p[2]:8.3f} {p[3]:12.3f}"
            f" {p[4]:8.3f} {1e3 * of['total_s']:8.3f} {1e3 * of['floor_s']:8.3f} {of['of_floor']:6.2f}"
        )
    return "\n".join(lines)
