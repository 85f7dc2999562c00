"""What a step should take on a GPU that is not at hand: each kernel's flops, bytes and the rate it is counted at.

Products are counted at rates that libraries are known to reach at such shapes, not at that of a large square product; each
assumption is a constant here with its source. An estimate is no measurement: it is written down to be compared with one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

from amsoftmax_kernels.backends.chunking import finish_size, padded, spans
from amsoftmax_kernels.backends.triton import tiles
from amsoftmax_kernels.backends.triton.tiles import Config

# (B, D, C): bfloat16 compute, float32 centres.
SHAPES = [
    (256, 512, 10_516),
    (1024, 512, 93_431),
    (1024, 512, 1_000_000),
    (4096, 512, 2_059_906),
    (4096, 512, 10_000_000),
]

# Of the rate of a large square product, 790 TFLOP/s in bfloat16 as measured on an H200:
# a product of depth 512 or 1,024. cuBLAS reaches 584 TFLOP/s at (65536, 1024, 1024); nothing is published for depth 512.
SHALLOW = 584 / 790
# E·ŵ, deep and of few tiles. The three products of Liger's linear cross-entropy reach 661 TFLOP/s together at H = 2048.
DEEP = 661 / 790
# Triton beside cuBLAS: its persistent product with tensor descriptors at depth 512.
TRITON = 0.92
# Time that the exponentials, the row sums and the store of a tile add to its products where nothing hides them: a quarter to
# a half by the clocks that they take on Hopper. The C++ kernel lets two warpgroups take turns, and hides them.
EPILOGUE = {"Triton": 0.35, "C++": 0.0}
# A kernel's start and end inside a CUDA graph. Assumed.
SECONDS_A_LAUNCH = 2.5e-6
# PyTorch's own small kernels of a step: labels 12, reduction 2, upstream gradients 3. Counted in the code.
TORCH_LAUNCHES = 17
# Rows and classes of a tile of the C++ cosine kernel: an SM's share of a cluster's tile.
CPP_TILE = (128, 128)
# Hopper's shared memory, and what wgmma multiplies in bfloat16, a clock and SM.
SHARED_BYTES, TENSOR_FLOPS = 128, 4096


@dataclass(frozen=True)
class Card:
    """One GPU's ceilings."""

    name: str
    source: str
    capability: tuple[int, int]
    tensor_instruction: str
    multiprocessors: int
    clock: float  # Hz
    products: float  # flop/s of a large square bfloat16 product
    copy: float  # bytes/s read and written
    shared_memory: int  # bytes an SM
    float32: float | None = None  # flop/s in IEEE float32, if known

    def programs_resident(self, registers: int, shared_memory: int, warps: int) -> int:
        """Programs that fit an SM: registers are given out to a warp in lots of 256, shared memory with 1 KiB beside it."""
        by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
        by_memory = self.shared_memory // (shared_memory + 1024)
        return min(by_registers, by_memory, 64 // warps, 32)

    def config(self, launch: Any) -> Config:
        """The table's entry that a cosine kernel, a :class:`.launches.Launch`, was launched with."""
        half = "fp32" not in dict(launch.signature)["x_hat"]
        how = "half" if half else "tf32" if launch.constant("PRECISION") == "tf32" else "float32"
        return tiles.config(self.capability, how)

    def rounds(self, count: int) -> float:
        """What ``count`` tiles take in whole rounds over the SMs, over what they would take spread evenly."""
        return -(-count // self.multiprocessors) * self.multiprocessors / count


CARDS = {
    "sm_80": Card(
        "A100 80 GB", "peak 312 TFLOP/s at 1.41 GHz and 2.0 TB/s by its datasheet; product 80%, copy 85% assumed",
        (8, 0), "HMMA", 108, 1.41e9, 250e12, 1.7e12, 164 << 10,
    ),
    "sm_90": Card(
        "H200", "large product 790 TFLOP/s and copy 4.3 TB/s as measured on one",
        (9, 0), "HGMMA", 132, 1.755e9, 790e12, 4.3e12, 228 << 10,
    ),
    "sm_100": Card(
        "B200", "peak 2.25 PFLOP/s and 8 TB/s by its datasheet; product 75%, copy 85% assumed",
        (10, 0), "UTCMMA", 148, 1.85e9, 1700e12, 6.8e12, 228 << 10,
    ),
    "sm_120": Card(
        "RTX 5090", "peak 210 TFLOP/s and 1.8 TB/s by its datasheet; product 80%, copy 85% assumed",
        (12, 0), "HMMA", 170, 2.4e9, 168e12, 1.5e12, 100 << 10,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """The operands of a step's products."""

    how: str  # as in tiles.TABLE
    size: int  # bytes of an element of x̂, ŵ
    e_size: int  # and of E and a∘x̂
    converted: bool = False  # ŵ is copied to E's dtype for E·ŵ

    def rate(self, card: Card) -> float:
        """Flop/s of a large square product.

        TF32 has half the rate of bfloat16 on each card by its datasheet. IEEE float32 runs on the ordinary units, 64
        multiply-adds a clock and SM on an A100 and 128 on the others, of which 80% are assumed to be reached.
        """
        if self.how == "float32":
            return card.float32 or 0.8 * 2 * (64 if card.capability == (8, 0) else 128) * card.multiprocessors * card.clock
        return card.products / (2 if self.how == "tf32" else 1)


KINDS = {
    "bfloat16": Kind("half", 2, 2),
    "float16": Kind("half", 2, 2, converted=True),  # E cannot be float16
    "TF32": Kind("tf32", 4, 4),
    "float32": Kind("float32", 4, 4),
}


class Work(NamedTuple):
    """What one kernel does in a step, over all chunks of classes."""

    kernel: str
    flops: float
    rate: float  # flop/s it is counted at
    moved: float  # bytes read and written
    seconds: float


def work(
    card: Card, B: int, D: int, C: int, kept: bool, kind: str = "bfloat16", kernels: str = "Triton", centre: int = 4
) -> list[Work]:  # fmt: skip
    """Every kernel of a step with all of E kept, or none. ``centre``: bytes of an element of the centres."""
    how, flops, passes = KINDS[kind], 2.0 * B * C * D, 1 if kept else 2
    large = how.rate(card)
    at_once = _at_once(card, D, how)
    shallow = large * SHALLOW * (TRITON if kernels == "Triton" else 1)
    rows, classes = _tile(card, how, kernels)
    chunks = [len(span) for span in spans(B, D, C)]

    def waits(tiles_of: list[int]) -> float:
        """Of chunks with so many tiles, by their sizes: rounds that are not full."""
        return sum(size * card.rounds(count) for size, count in zip(chunks, tiles_of, strict=True)) / C

    if kernels == "C++":
        shallow = min(shallow, shared_memory_bound(card, D, how))
    cosine = shallow / (1 + EPILOGUE[kernels]) / waits([-(-B // rows) * -(-each // classes) for each in chunks])
    terms = how.e_size * B * C
    prepared = passes * (centre + how.size) * C * D
    found = [
        Work("prepare_centres", 0, 0, prepared, prepared / card.copy),
        # Storing E and its products overlap: the longer of both is what it takes.
        Work("cosine_exp", passes * flops, cosine, terms, passes * max(flops / cosine, terms / card.copy)),
    ]
    converted = 4 * C * D if how.converted else 0
    moved = terms + converted
    found.append(Work("product E·ŵ", flops, large * DEEP, moved, flops / (large * DEEP) + converted / card.copy))
    if at_once:
        gradient = shallow / waits([-(-each // tiles.GRADIENT[card.capability[0]].classes) for each in chunks])
        moved = 2 * centre * C * D  # the centres read, their gradient written, after the products
    else:
        gradient, moved = large * SHALLOW, (4 + 2 * centre) * C * D  # dŵ is written; read again out of the L2 cache
    found.append(Work("centres' gradient", flops, gradient, moved + terms, flops / gradient + moved / card.copy))
    count = launches(B, D, C, kept, at_once) + (kernels == "C++")  # there z is added up in a launch of its own
    found.append(Work("launches", 0, 0, 0, count * SECONDS_A_LAUNCH))
    return found


def shared_memory_bytes(D: int, size: int) -> float:
    """Bytes a clock that the C++ cosine kernel's shared memory on Hopper moves at the tensor cores' full rate.

    Counted: products of 64 x 128 read 32 of x̂ and 64 of ŵ; bulk copies write 32 of ŵ, and of x̂ where a row of more than
    1,024 bytes comes again with each tile; each box of E is written, and read by a bulk copy. ``size``: bytes of an element.
    """
    rows, classes = CPP_TILE
    clocks = 2 * rows * classes * D / (TENSOR_FLOPS * 2 / size)
    filled = 32 * (1 if D * size <= 1024 else 2)
    return 32 + 64 + filled + 2 * rows * classes * size / clocks


def shared_memory_bound(card: Card, D: int, how: Kind) -> float:
    """Flop/s that the C++ cosine kernel's use of shared memory leaves it on Hopper; infinite elsewhere."""
    if card.capability != (9, 0):
        return float("inf")
    full = TENSOR_FLOPS * 2 / how.size * card.multiprocessors * card.clock
    return full * min(1.0, SHARED_BYTES / shared_memory_bytes(padded(D), how.size))


def _at_once(card: Card, D: int, how: Kind) -> bool:
    """Whether the centres' gradient is made in one kernel."""
    config = tiles.GRADIENT.get(card.capability[0])
    return config is not None and how.how == "half" and config.serves(padded(D))


def _tile(card: Card, how: Kind, kernels: str) -> tuple[int, int]:
    """Rows and classes of the cosine kernel's tile."""
    config = tiles.config(card.capability, how.how)
    return CPP_TILE if kernels == "C++" else (config.rows, config.classes)


def own_launches(B: int, D: int, C: int, kept: bool, at_once: bool) -> int:
    """Triton's kernels in a step. ``at_once``: one kernel a chunk makes the centres' gradient, in place of one a piece."""
    chunks = spans(B, D, C)
    pieces = sum(-(-len(span) // finish_size(padded(D))) for span in chunks)
    # prepare_rows, additive_margin, factor_rows and finish_rows; prepare_centres and cosine_exp a chunk and pass.
    return 4 + 2 * len(chunks) * (1 if kept else 2) + (len(chunks) if at_once else pieces)


def launches(B: int, D: int, C: int, kept: bool, at_once: bool) -> int:
    """All of a step: our own kernels, the library's products and the sums of them, PyTorch's small ones."""
    chunks = spans(B, D, C)
    products = 2 * len(chunks) - 1  # E·ŵ, and what adds it to the chunks before
    pieces = 0 if at_once else sum(-(-len(span) // finish_size(padded(D))) for span in chunks)
    return own_launches(B, D, C, kept, at_once) + products + pieces + TORCH_LAUNCHES


def floor(card: Card, B: int, D: int, C: int, kept: bool, kind: str = "bfloat16", centre: int = 4) -> float:
    """Seconds of the products at a large one's rate, and of w read once a pass and dw written."""
    return (3 if kept else 4) * 2 * B * C * D / KINDS[kind].rate(card) + 3 * centre * C * D / card.copy


def step(card: Card, B: int, D: int, C: int, kept: bool, kind: str = "bfloat16", kernels: str = "Triton") -> dict[str, Any]:
    """One step's seconds, kernel by kernel, beside the floor."""
    pieces = {each.kernel: each.seconds for each in work(card, B, D, C, kept, kind, kernels)}
    total, least = sum(pieces.values()), floor(card, B, D, C, kept, kind)
    return {
        "kernels": kernels, "B": B, "D": D, "C": C, "kept": kept, "dtype": kind, "pieces_s": pieces,
        "total_s": total, "floor_s": least, "of_floor": least / total,
    }  # fmt: skip


def table(arch: str) -> list[dict[str, Any]]:
    """Every shape, E kept and recomputed; the other dtypes at the second; on Hopper the C++ kernels too."""
    card = CARDS[arch]
    rows = [step(card, *shape, kept) for shape, kept in itertools.product(SHAPES, (True, False))]
    others = [kind for kind in KINDS if kind != "bfloat16"]
    rows += [step(card, *SHAPES[1], kept, kind) for kind, kept in itertools.product(others, (True, False))]
    if arch == "sm_90":
        rows += [step(card, *shape, kept, kernels="C++") for shape, kept in itertools.product(SHAPES, (True, False))]
    return rows


def printed(rows: list[dict[str, Any]], card: Card) -> str:
    """The table as text, after one step kernel by kernel."""
    B, D, C = SHAPES[2]
    lines = [
        f"Estimated, not measured: {card.name}; {card.source}.",
        f"One step in Triton, B = {B:,}, D = {D}, C = {C:,}, bfloat16, E kept:",
        f"{'kernel':18} {'TFLOP':>7} {'at TFLOP/s':>10} {'GB':>7} {'ms':>8}",
    ]
    for each in work(card, B, D, C, True):
        lines.append(
            f"{each.kernel:18} {each.flops / 1e12:7.2f} {each.rate / 1e12:10.0f} {each.moved / 1e9:7.2f}"
            f" {1e3 * each.seconds:8.3f}"
        )
    names = list(rows[0]["pieces_s"])
    if card.capability == (9, 0):
        lines.append(
            f"C++: at the tensor cores' full rate cosine_exp wants {shared_memory_bytes(D, 2):.0f} of shared memory's"
            f" {SHARED_BYTES} bytes a clock: {shared_memory_bound(card, D, KINDS['bfloat16']) / 1e12:.0f} TFLOP/s at most"
        )
    lines += [
        "",
        "All shapes, milliseconds; the floor: products at a large one's rate, and the bytes that must move",
        f"{'':6} {'B':>5} {'C':>11} {'dtype':>8} {'E':>10} " + " ".join(f"{name:>17}" for name in names)
        + f" {'total':>8} {'floor':>8} {'share':>6}",
    ]  # fmt: skip
    for row in rows:
        pieces = " ".join(f"{1e3 * value:17.3f}" for value in row["pieces_s"].values())
        lines.append(
            f"{row['kernels']:6} {row['B']:5} {row['C']:11,} {row['dtype']:>8} {'kept' if row['kept'] else 'recomputed':>10}"
            f" {pieces} {1e3 * row['total_s']:8.3f} {1e3 * row['floor_s']:8.3f} {row['of_floor']:6.2f}"
        )
    return "\n".join(lines)
