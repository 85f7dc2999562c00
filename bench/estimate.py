"""What a step should cost on a GPU that is not at hand: bytes, flops and cycles, counted; and the floor beside it.

Each ceiling says where it is from. An estimate is not a measurement: it is written down to be compared with one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from amsoftmax_kernels.backends import triton_configs
from amsoftmax_kernels.backends.fused import chunk_size, finish_size, padded, streams_for
from amsoftmax_kernels.backends.triton_configs import Config

# (B, D, C): bfloat16 compute, float32 centres.
SHAPES = [
    (256, 512, 10_516),
    (1024, 512, 93_431),
    (1024, 512, 1_000_000),
    (4096, 512, 2_059_906),
    (4096, 512, 10_000_000),
]
# One launch replayed in a CUDA graph: a kernel's start and drain. Assumed.
SECONDS_A_LAUNCH = 2.5e-6


@dataclass(frozen=True)
class Card:
    """One GPU's ceilings."""

    name: str
    source: str
    capability: tuple[int, int]
    tensor_instruction: str
    multiprocessors: int
    clock: float  # Hz
    products: float  # flop/s of a large bfloat16 product
    copy: float  # bytes/s read and written
    l2: float  # bytes/s out of the L2 cache
    shared_memory: int  # bytes an SM

    def programs_resident(self, registers: int, shared_memory: int, warps: int) -> int:
        """Programs that fit an SM: registers are given out to a warp in lots of 256, shared memory with 1 KiB beside it."""
        by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
        by_memory = self.shared_memory // (shared_memory + 1024)
        return min(by_registers, by_memory, 64 // warps, 32)

    def config(self, launch: Any) -> Config:
        """The table's entry that a cosine kernel, a :class:`.launches.Launch`, was launched with."""
        half = "fp32" not in dict(launch.signature)["x_hat"]
        how = "half" if half else "tf32" if launch.constant("PRECISION") == "tf32" else "float32"
        return triton_configs.config(self.capability, how)


CARDS = {
    "sm_80": Card(
        "A100 80 GB", "peak 312 TFLOP/s at 1.41 GHz and 2.0 TB/s by its datasheet; product 80%, copy 85%, L2 assumed",
        (8, 0), "HMMA", 108, 1.41e9, 250e12, 1.7e12, 3.5e12, 164 << 10,
    ),
    "sm_90": Card(
        "H200", "product and copy as measured on one (790 TFLOP/s, 4.3 TB/s); L2 as drawn by a float8 product of Triton's,"
        " tiles of 128 x 256 at most and nothing shared between blocks, on an H100 (1347 TFLOP/s, triton-lang/triton #5461)",
        (9, 0), "HGMMA", 132, 1.755e9, 790e12, 4.3e12, 7.9e12, 228 << 10,
    ),
    "sm_100": Card(
        "B200", "peak 2.25 PFLOP/s and 8 TB/s by its datasheet; product 75%, copy 85%, L2 assumed",
        (10, 0), "UTCMMA", 148, 1.85e9, 1700e12, 6.8e12, 10e12, 228 << 10,
    ),
    "sm_120": Card(
        "RTX 5090", "peak 210 TFLOP/s and 1.8 TB/s by its datasheet; product 80%, copy 85%, L2 assumed",
        (12, 0), "HMMA", 170, 2.4e9, 168e12, 1.5e12, 5e12, 100 << 10,
    ),
}  # fmt: skip


def more_launches(B: int, D: int, C: int, kept: bool, at_once: bool = False) -> int:
    """Of a step of many classes beside those of one of few: per chunk, and per piece of the centres' gradient.

    ``at_once``: one kernel a chunk makes that gradient, in place of two a piece.
    """
    chunk = chunk_size(B, D)
    chunks = -(-C // chunk)
    pieces = sum(-(-min(chunk, C - first) // finish_size(padded(D))) for first in range(0, C, chunk))
    # ŵ, E and Eŵ; where E is computed again, ŵ and z before. The first of several chunks has its ŵ, twice where E is made
    # again (a single one has it once), and all their z a sum.
    each = (3 if kept else 5) * (chunks - 1) + (2 if kept else 3) * (chunks > 1)
    return each + (chunks - 1 if at_once else 2 * (pieces - 1))


def prepare_bytes(B: int, D: int, C: int, kept: bool) -> int:
    """Of the passes that make ŵ: float32 read, bfloat16 written; again in the backward pass if it was not one chunk."""
    return (6 if kept or chunk_size(B, D) >= C else 12) * C * D


def floor(card: Card, B: int, D: int, C: int, kept: bool) -> float:
    """Seconds of the products, and of w read once a pass and dw written."""
    return (3 if kept else 4) * 2 * B * C * D / card.products + 12 * C * D / card.copy


def step(card: Card, B: int, D: int, C: int, kept: bool, launches: dict[bool, int]) -> dict[str, Any]:
    """One step's pieces in seconds, its floor, and its share of it; ``launches``: :func:`few_launches` of this ``kept``."""
    config = triton_configs.config(card.capability, "half")
    flops = 2 * B * C * D
    cosine = _cosine_exp(card, config, B, D, C)
    summed = _cosine_exp(card, config, B, D, C, stored=False)
    pieces = {
        "prepare": prepare_bytes(B, D, C, kept) / card.copy,
        "cosine_exp": max(cosine["tensor"] + cosine["epilogue"], cosine["l2"]),
        "product with centres": flops / card.products,
        # A library's product; then dŵ written (read again out of the L2 cache), w read, dw written.
        "gradient": flops / card.products + 12 * C * D / card.copy,
    }
    at_once = gradient_at_once(card, B, D)
    if at_once:
        pieces["gradient"] = max(grad_centres(card, B, D, C).values())
    pieces["launches"] = (launches[at_once] + more_launches(B, D, C, kept, at_once)) * SECONDS_A_LAUNCH
    if not kept:  # a pass for the sums alone comes first
        pieces["cosine_exp"] += max(summed["tensor"] + summed["epilogue"], summed["l2"])
    total, least = sum(pieces.values()), floor(card, B, D, C, kept)
    return {
        "B": B, "D": D, "C": C, "kept": kept, "flops": (3 if kept else 4) * flops,
        "bytes": prepare_bytes(B, D, C, kept) + 12 * C * D, "pieces_s": pieces, "cosine_exp_s": cosine,
        "total_s": total, "floor_s": least, "of_floor": least / total,
    }  # fmt: skip


def gradient_at_once(card: Card, B: int, D: int) -> bool:
    """Whether Triton's backend makes the centres' gradient in one kernel."""
    config = triton_configs.GRADIENT.get(card.capability[0])
    return config is not None and config.serves(B, padded(D))


def grad_centres(card: Card, B: int, D: int, C: int) -> dict[str, float]:
    """Seconds of Triton's kernel for the centres' gradient by what could bound it."""
    config = triton_configs.GRADIENT[card.capability[0]]
    columns = config.columns_for(padded(D))
    across, tiles = -(-D // columns), -(-C // config.classes)
    rounds = -(-tiles // card.multiprocessors)
    part = config.classes * columns
    products = 2 * part * across * B / (card.products / card.multiprocessors / card.clock)
    # Of a part: its centres read for dŵ·ŵ and again for dw, which is written; dŵ written and read but for the last one.
    moved = 4 * part * (3 * across + 2 * (across - 1))
    return {
        "one after the other": rounds * products / card.clock + 8 * C * D / card.copy,
        "l2": tiles * (2 * (config.classes + columns) * B * across + moved) / card.l2,
    }


def _cosine_exp(card: Card, config: Config, B: int, D: int, C: int, stored: bool = True) -> dict[str, float]:
    """Seconds of the fused kernel by what could bound it; its products as fast as a library's, its epilogue after them."""
    tiles = -(-B // config.rows) * -(-C // config.classes)
    elements = config.rows * config.classes
    waves = tiles / card.multiprocessors
    # 16 exponentials a clock and SM; a multiply, an add and half a conversion an element beside them, 128 a clock; the
    # rest (barriers, the tile's way to memory, filling the pipeline) assumed at 600 clocks a tile.
    epilogue = max(elements / 16, elements * 3.5 / 128) + 600
    operands = (config.rows + config.classes) * D * 2 + (elements * 2 if stored else 0)
    return {
        "tensor": 2 * B * C * D / card.products,
        "epilogue": waves * epilogue / card.clock,
        "l2": tiles * operands / card.l2,
    }


def hopper_cosine_exp(card: Card, B: int, D: int, C: int, size: int = 2, stored: bool = True) -> dict[str, float]:
    """Seconds of the C++ kernel for Hopper (csrc/kernel_sm90.cuh) by what could bound it; all overlaps but its ends.

    Operands and E, if ``stored``, take ``size`` bytes an element: 4 in TF32, whose products take twice as long.
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


def hopper_grad_centres(card: Card, B: int, D: int, C: int) -> dict[str, float]:
    """Seconds of the C++ kernel for the centres' gradient on Hopper (csrc/gradient_sm90.cuh), to a width of 512."""
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
        "l2": tiles * (2 * B * (together + halves * columns) + 12 * together * D) / card.l2,  # the centres twice, dw
        "memory": (8 * C * D + 2 * B * C) / card.copy,
    }


def hopper_step(card: Card, B: int, D: int, C: int, kept: bool, launches: dict[bool, int]) -> dict[str, Any]:
    """As :func:`step`, with the C++ kernels for Hopper."""
    product = 2 * B * C * D / card.products
    pieces = {
        "prepare": prepare_bytes(B, D, C, kept) / card.copy,
        "cosine_exp": max(hopper_cosine_exp(card, B, D, C).values()),
        "product with centres": product,
        "grad_centres": max(hopper_grad_centres(card, B, D, C).values()),
        "launches": (launches[True] + more_launches(B, D, C, kept, at_once=True)) * SECONDS_A_LAUNCH,
    }
    if not kept:
        pieces["cosine_exp"] += max(hopper_cosine_exp(card, B, D, C, stored=False).values())
    total, least = sum(pieces.values()), floor(card, B, D, C, kept)
    return {"pieces_s": pieces, "total_s": total, "floor_s": least, "of_floor": least / total}


def printed_hopper(card: Card) -> str:
    """The estimates of the C++ kernels, the first beside that of Triton's, as text."""
    launches = few_launches("sm_90")
    lines = [
        "cosine_exp alone, E stored: estimated milliseconds, in C++ by what could bound it, in Triton, and in C++ in TF32"
    ]
    lines.append(f"{'B':>5} {'D':>4} {'C':>11} {'busy':>8} {'l2':>8} {'memory':>8} {'C++':>8} {'Triton':>8} {'C++ TF32':>8}")
    for B, D, C in SHAPES:
        bounds = hopper_cosine_exp(card, B, D, C)
        of_triton = step(card, B, D, C, True, launches[True])["pieces_s"]["cosine_exp"]
        tf32 = max(hopper_cosine_exp(card, B, D, C, 4).values())
        values = (*bounds.values(), max(bounds.values()), of_triton, tf32)
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


# What the PartialFC algorithm (gpu_peers.partial_fc) reads and writes of each logit, operation by operation.
PARTIAL_FC_BYTES = {
    "product stored": 2, "to float32": 6, "clamp": 8, "scale": 8, "maximum": 4, "subtract": 8, "exponential": 8, "sum": 4,
    "divide": 8, "times the gradient": 8, "of the scale": 8, "of the margin": 8, "of the clamp": 12, "to float16": 6,
}  # fmt: skip
# And of each element of the centres: norm, division, cast; of the gradients the cast, and about 28 of the division and norm.
PARTIAL_FC_CENTRES_BYTES = 4 + 8 + 6 + 6 + 28


def partial_fc(card: Card, B: int, D: int, C: int) -> dict[str, float]:
    """Seconds and bytes of a step as InsightFace computes it; of its memory what is held at once: logits three times."""
    moved = B * C * sum(PARTIAL_FC_BYTES.values()) + C * D * PARTIAL_FC_CENTRES_BYTES
    return {"total_s": 6 * B * C * D / card.products + moved / card.copy, "held": (4 + 4 + 2) * B * C}


def few_launches(arch: str) -> dict[bool, dict[bool, int]]:
    """Those of a step of few classes: counted; E kept or not, and the centres' gradient in one kernel or two."""
    from .launches import of_a_step  # needs Triton

    card, counts = CARDS[arch], {}
    for kept in (True, False):
        launched = of_a_step(card.capability, card.multiprocessors, 256, 512, 2048, save_bytes=1 << 40 if kept else 0)
        others = [each for each in launched if each.kernel not in ("grad_centres", "finish_centres")]
        # E·ŵ, the gradient of the loss by itself, and the centres' gradient.
        counts[kept] = {at_once: len(others) + 2 + (1 if at_once else 2) for at_once in (True, False)}
    return counts


def table(arch: str) -> list[dict[str, Any]]:
    """Estimates of every shape, E kept and recomputed."""
    card, counts = CARDS[arch], few_launches(arch)
    return [step(card, B, D, C, kept, counts[kept]) for B, D, C in SHAPES for kept in (True, False)]


def printed(rows: list[dict[str, Any]], card: Card) -> str:
    """The table as text."""
    lines = [
        f"Estimated, not measured: {card.name}; {card.source}. Milliseconds.",
        f"{'B':>5} {'D':>4} {'C':>11} {'E':>10} {'prepare':>8} {'cosine_exp':>10} {'product':>8} {'gradient':>8}"
        f" {'launches':>8} {'total':>8} {'floor':>8} {'share':>6}",
    ]
    for row in rows:
        p = {name: 1e3 * value for name, value in row["pieces_s"].items()}
        lines.append(
            f"{row['B']:5} {row['D']:4} {row['C']:11,} {'kept' if row['kept'] else 'recomputed':>10} {p['prepare']:8.3f}"
            f" {p['cosine_exp']:10.3f} {p['product with centres']:8.3f} {p['gradient']:8.3f} {p['launches']:8.3f}"
            f" {1e3 * row['total_s']:8.3f} {1e3 * row['floor_s']:8.3f} {row['of_floor']:6.2f}"
        )
    return "\n".join(lines)
