"""What a step should cost on a GPU that is not at hand: bytes, flops and cycles, counted; and the floor beside it.

Each ceiling says where it is from. An estimate is not a measurement: it is written down to be compared with one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from amsoftmax_kernels.backends.chunking import chunk_size, finish_size, forward_spans, padded
from amsoftmax_kernels.backends.fused import streams_for
from amsoftmax_kernels.backends.parts import places_for
from amsoftmax_kernels.backends.triton import tiles as triton_configs
from amsoftmax_kernels.backends.triton.tiles import Config

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
    chunk, spans = chunk_size(B, D), forward_spans(B, D, C, C if kept else 0)
    chunks = -(-C // chunk)
    pieces = sum(-(-min(chunk, C - first) // finish_size(padded(D))) for first in range(0, C, chunk))
    # The forward pass: E and what it is made of; ŵ of the first of several too, which is else prepared with the rows; all
    # their z a sum. The backward pass, where E is made again: E, and ŵ but for what the forward pass has left.
    each = 2 * (len(spans) - 1) + 2 * (len(spans) > 1)
    each += 0 if kept else chunks - 1 + chunks - -(-len(spans[-1]) // chunk)
    each += chunks - 1 + (chunks > 1) + 2 * _sums_between(B, D, chunks)  # E·ŵ and their sum
    return each + (chunks - 1 if at_once else 2 * (pieces - 1))


def _sums_between(B: int, D: int, chunks: int) -> int:
    """Times that the parts of E·ŵ are added up because there is no place for more."""
    places = places_for(chunks, B * padded(D), 4)
    return max(-(-(chunks - places) // (places - 1)), 0) if places > 1 else 0


@dataclass(frozen=True)
class Kind:
    """How a step is computed: the operands of its products, and how fast a library multiplies them."""

    how: str  # as in triton_configs
    size: int  # bytes of an element of x̂, ŵ
    e_size: int  # and of E and a∘x̂
    converted: bool = False  # ŵ is copied to E's dtype for E·ŵ

    def rate(self, card: Card) -> float:
        """Flop/s of a large product.

        TF32 has half the rate of bfloat16 on each of the cards by their datasheets. IEEE float32 runs on the ordinary
        units, 64 multiply-adds a clock and SM on an A100 and 128 on the others, of which 80% are assumed to be reached.
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


def chunks(B: int, D: int, C: int) -> list[tuple[int, int]]:
    """Classes of a chunk and how many such there are: what one launch of a kernel is given."""
    chunk = chunk_size(B, D)
    return [each for each in ((chunk, C // chunk), (C % chunk, 1)) if each[0] and each[1]]


def prepare_bytes(B: int, D: int, C: int, kept: bool, size: int = 2, centre: int = 4) -> int:
    """Of the passes that make ŵ: centres read, ŵ written; again in the backward pass but for what was made last.

    ``centre``, here and below: bytes of an element of the centres and of their gradient.
    """
    again = 0 if kept else C - len(forward_spans(B, D, C, 0)[-1])
    return (centre + size) * (C + again) * D


def floor(
    card: Card, B: int, D: int, C: int, kept: bool, kind: Kind = KINDS["bfloat16"], centre: int = 4
) -> float:  # fmt: skip
    """Seconds of the products, and of w read once a pass and dw written."""
    return (3 if kept else 4) * 2 * B * C * D / kind.rate(card) + 3 * centre * C * D / card.copy


def library_product(card: Card, rows: int, columns: int, depth: int, kind: Kind = KINDS["bfloat16"]) -> float:
    """Seconds of a library's product, whose output is float32.

    Assumed: tiles of 128 x 256, each as fast on its SM as in a large product (blocks share what they load, so that the L2
    cache is not waited for), in whole rounds over the SMs. Where there are fewer tiles than SMs, as of E·ŵ, the depth is
    split into the number of parts that is quickest; each part's tile goes to memory in float32 and is read again by one
    more kernel. That is at most a tile an SM, 17 MB on an H200, and so the L2 cache's.
    """
    tiles = -(-rows // 128) * -(-columns // 256)

    def split(parts: int) -> float:
        rounds = -(-tiles * parts // card.multiprocessors)
        products = rounds * 2 * 128 * 256 * -(-depth // parts) / (kind.rate(card) / card.multiprocessors)
        return products + (8 * parts * rows * columns / card.l2 + SECONDS_A_LAUNCH if parts > 1 else 0)

    return min(map(split, range(1, max(card.multiprocessors // tiles, 1) + 1)))


def product_with_centres(card: Card, B: int, D: int, C: int, kind: Kind = KINDS["bfloat16"], of_rate: float = 1) -> float:
    """Seconds of E·ŵ, chunk by chunk, and of their sum.

    ``of_rate``: of the rate assumed what the library reaches.
    """
    found = chunks(B, D, C)
    products = sum(count * library_product(card, B, D, classes, kind) for classes, count in found) / of_rate
    parts = sum(count for _, count in found)
    summed = 4 * B * D * (parts + 1 + 4 * _sums_between(B, D, parts)) if parts > 1 else 0
    converted = 4 * C * D if kind.converted else 0
    return products + (converted + summed) / card.copy


def step(
    card: Card,
    B: int,
    D: int,
    C: int,
    kept: bool,
    launches: dict[bool, int],
    kind: str = "bfloat16",
    of_rate: float = 1,
    beside: bool = True,
    centre: int = 4,
) -> dict[str, Any]:
    """One step's pieces in seconds, its floor, and its share of it.

    ``launches``: :func:`few_launches` of this ``kept``; ``of_rate``: as in :func:`product_with_centres`. Without
    ``beside`` E·ŵ is never made beside the centres' gradient, as over ranks.
    """
    how = KINDS[kind]
    flops = 2 * B * C * D
    cosine = cosine_exp(card, B, D, C, kind=how)
    at_once = how.how == "half" and gradient_at_once(card, B, D)
    each = chunks(B, D, C)
    if at_once:
        gradient = sum(count * max(grad_centres(card, B, D, classes, centre).values()) for classes, count in each)
    else:  # a library's product, piece by piece; then dŵ written (read again out of the L2 cache), w read, dw written
        gradient, piece = (4 + 2 * centre) * C * D / card.copy, finish_size(padded(D))
        for classes, count in each:
            for rows, times in ((piece, classes // piece), (classes % piece, 1)):
                gradient += count * times * library_product(card, rows, D, B, how) if rows else 0
    converted = sum(count for _, count in each) if how.converted else 0
    product = product_with_centres(card, B, D, C, how, of_rate)
    both = grad_both(card, B, D, C, centre) if beside and kept and kind == "bfloat16" else None
    if both is not None:
        gradient, product = max(both.values()), 0.0
    launched = launches[at_once] + more_launches(B, D, C, kept, at_once) + converted - (both is not None)
    pieces = {
        "prepare": prepare_bytes(B, D, C, kept, how.size, centre) / card.copy,
        "cosine_exp": cosine["total"],
        "product with centres": product,
        "gradient": gradient,
        "launches": launched * SECONDS_A_LAUNCH,
    }
    if not kept:  # a pass for the sums alone comes first
        pieces["cosine_exp"] += cosine_exp(card, B, D, C, stored=False, kind=how)["total"]
    total, least = sum(pieces.values()), floor(card, B, D, C, kept, how, centre)
    return {
        "B": B, "D": D, "C": C, "kept": kept, "dtype": kind, "flops": (3 if kept else 4) * flops,
        "bytes": prepare_bytes(B, D, C, kept, how.size, centre) + (4 + 2 * centre) * C * D, "pieces_s": pieces,
        "cosine_exp_s": cosine,
        "total_s": total, "floor_s": least, "of_floor": least / total,
    }  # fmt: skip


def gradient_at_once(card: Card, B: int, D: int) -> bool:
    """Whether Triton's backend makes the centres' gradient in one kernel."""
    config = triton_configs.GRADIENT.get(card.capability[0])
    return config is not None and config.serves(B, padded(D))


def grad_centres(card: Card, B: int, D: int, C: int, centre: int = 4) -> dict[str, float]:
    """Seconds of a launch of Triton's kernel for the centres' gradient by what could bound it."""
    config = triton_configs.GRADIENT[card.capability[0]]
    columns = config.columns_for(padded(D))
    across, tiles = -(-D // columns), -(-C // config.classes)
    rounds = -(-tiles // card.multiprocessors)
    part = config.classes * columns
    products = 2 * part * across * B / (card.products / card.multiprocessors / card.clock)
    # Of a part: its centres read for dŵ·ŵ and again for dw, which is written; dŵ written and read but for the last one.
    moved = part * (3 * centre * across + 8 * (across - 1))
    return {
        "one after the other": rounds * products / card.clock + 2 * centre * C * D / card.copy,
        "of an SM": rounds * (products + moved / 64) / card.clock,  # 64 bytes a clock are its share of the L2 cache
        "l2": tiles * (2 * (config.classes + columns) * B * across + moved) / card.l2,
    }


def grad_both(card: Card, B: int, D: int, C: int, centre: int = 4) -> dict[str, float] | None:
    """Seconds of Triton's kernel for the gradient of few centres with E·ŵ beside it, by what could bound it; None if not so.

    The parts of E·ŵ go through the L2 cache once more, when they are summed. ŵ was written in the forward pass and may have
    to come from memory.
    """
    config = triton_configs.GRADIENT.get(card.capability[0])
    if config is None or not config.serves(B, padded(D)):
        return None
    parts = config.parts_beside(B, padded(D), C, card.multiprocessors, centre)
    columns = config.columns_for(padded(D))
    if not parts:
        return None
    tile, depth = config.product_rows * columns, -(-C // (parts * config.product_depth)) * config.product_depth
    of_parts = 4 * parts * B * D
    operands = 2 * (config.product_rows + columns) * C * config.product_tiles(B, padded(D))
    alone = grad_centres(card, B, D, C, centre)
    summed = of_parts / card.l2
    return {
        "gradient": max(alone["one after the other"] + 2 * C * D / card.copy, alone["of an SM"]) + summed,
        "product": 2 * tile * depth / (card.products / card.multiprocessors)
        + tile * 4 * card.multiprocessors / card.l2
        + summed,
        "l2": alone["l2"] + (operands + of_parts) / card.l2 + summed,
    }


def cosine_exp(
    card: Card, B: int, D: int, C: int, stored: bool = True, kind: Kind = KINDS["bfloat16"]
) -> dict[str, float]:  # fmt: skip
    """Seconds of the fused kernel by what could bound it, chunk by chunk, and their total.

    Its products are as fast as a library's (in float32 too, which flatters it), its epilogue comes after them, and the
    slowest SM's tiles are what is waited for.
    """
    config = triton_configs.config(card.capability, kind.how)
    slots, blocks = card.multiprocessors * config.resident, -(-B // config.rows)
    elements = config.rows * config.classes
    # 16 exponentials a clock and SM; a multiply, an add and half a conversion an element beside them, 128 a clock; the
    # rest (barriers, the tile's way to memory, filling the pipeline) assumed at 600 clocks a tile.
    epilogue = config.resident * (max(elements / 16, elements * 3.5 / 128) + 600) / card.clock
    products = 2 * elements * D / (kind.rate(card) / slots)
    operands = (config.rows + config.classes) * D * kind.size + (elements * kind.e_size if stored else 0)
    bounds = {"tensor": 0.0, "epilogue": 0.0, "l2": 0.0, "total": 0.0}
    for classes, count in chunks(B, D, C):
        tiles = -(-classes // config.classes)
        streams = streams_for(slots, blocks, tiles)
        rounds = -(-blocks * streams // slots) * -(-tiles // streams)
        of = {"tensor": rounds * products, "epilogue": rounds * epilogue, "l2": blocks * tiles * operands / card.l2}
        of["total"] = max(of["tensor"] + of["epilogue"], of["l2"])
        bounds = {name: bounds[name] + count * of[name] for name in bounds}
    return bounds


def few_launches(arch: str) -> dict[bool, dict[bool, int]]:
    """Those of a step of few classes: counted; E kept or not, and the centres' gradient in one kernel or two."""
    from .launches import of_a_step  # needs Triton

    card, counts = CARDS[arch], {}
    for kept in (True, False):
        launched = of_a_step(card.capability, card.multiprocessors, 256, 512, 2048, save_bytes=1 << 40 if kept else 0)
        others = [each for each in launched if each.kernel not in ("grad_centres", "grad_both", "finish_centres")]
        # E·ŵ by itself, the gradient of the loss by itself, and the centres' gradient.
        counts[kept] = {at_once: len(others) + 2 + (1 if at_once else 2) for at_once in (True, False)}
    return counts


def table(arch: str) -> list[dict[str, Any]]:
    """Estimates of every shape, E kept and recomputed; then of the other dtypes at the second."""
    card, counts = CARDS[arch], few_launches(arch)
    rows = [(*shape, kept, "bfloat16") for shape in SHAPES for kept in (True, False)]
    rows += [(*SHAPES[1], kept, kind) for kind in KINDS if kind != "bfloat16" for kept in (True, False)]
    return [step(card, B, D, C, kept, counts[kept], kind) for B, D, C, kept, kind in rows]


def printed(rows: list[dict[str, Any]], card: Card) -> str:
    """The table as text."""
    lines = [
        f"Estimated, not measured: {card.name}; {card.source}. Milliseconds.",
        "The product with centres, E·ŵ, has few tiles: a library is assumed to split its depth, partial sums in float32.",
        f"{'B':>5} {'D':>4} {'C':>11} {'dtype':>8} {'E':>10} {'prepare':>8} {'cosine_exp':>10} {'product':>8}"
        f" {'gradient':>8} {'launches':>8} {'total':>8} {'floor':>8} {'share':>6}",
    ]
    for row in rows:
        p = {name: 1e3 * value for name, value in row["pieces_s"].items()}
        lines.append(
            f"{row['B']:5} {row['D']:4} {row['C']:11,} {row['dtype']:>8} {'kept' if row['kept'] else 'recomputed':>10}"
            f" {p['prepare']:8.3f} {p['cosine_exp']:10.3f} {p['product with centres']:8.3f} {p['gradient']:8.3f}"
            f" {p['launches']:8.3f} {1e3 * row['total_s']:8.3f} {1e3 * row['floor_s']:8.3f} {row['of_floor']:6.2f}"
        )
    return "\n".join(lines)
