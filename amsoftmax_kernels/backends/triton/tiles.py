"""Tile sizes of the two kernels with a product, by compute capability and operand dtype.

``python -m bench tune`` measures the candidates on a GPU and prints the table; there is no autotuning at run time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..chunking import kind as kind


@dataclass(frozen=True)
class Config:
    """How :func:`.forward.cosine_exp` is cut and compiled."""

    rows: int  # of the batch in a tile
    classes: int  # in a tile
    depth: int  # embedding dimensions a step
    stages: int  # tiles of operands in flight
    warps: int
    bulk: bool  # tiles move by the bulk copy engine (Hopper and newer), not by ordinary loads
    split: bool = False  # E leaves in halves: half the shared memory for it
    resident: int = 1  # programs that an SM holds
    masked: bool = False  # for maxima every tile's targets and ends are masked, not only where there are any


# Not tuned on a GPU yet: chosen by what the compiled code needs (python -m bench kernels): no spills, registers and shared
# memory for the programs said to be resident, and the least traffic of operands that leaves room for three stages.
TABLE: dict[tuple[int, str], Config] = {
    (8, "half"): Config(rows=128, classes=128, depth=32, stages=4, warps=8, bulk=False),
    (8, "tf32"): Config(rows=64, classes=128, depth=32, stages=3, warps=8, bulk=False),
    (8, "float32"): Config(rows=128, classes=64, depth=16, stages=3, warps=8, bulk=False),
    (9, "half"): Config(rows=128, classes=256, depth=64, stages=3, warps=8, bulk=True, split=True, masked=True),
    (9, "tf32"): Config(rows=128, classes=128, depth=32, stages=3, warps=8, bulk=True, split=True, masked=True),
    (10, "half"): Config(rows=128, classes=128, depth=64, stages=4, warps=8, bulk=True),
    (10, "tf32"): Config(rows=128, classes=128, depth=32, stages=3, warps=8, bulk=True),
    (10, "float32"): Config(rows=64, classes=64, depth=32, stages=3, warps=8, bulk=False),
}

# Consumer Blackwell has the older cards' shared memory and instructions.
TABLE |= {(12, how): entry for (major, how), entry in TABLE.items() if major == 8}


@dataclass(frozen=True)
class GradientConfig:
    """How :func:`.backward.grad_centres` is cut and compiled: half-precision operands, centres of 2 or 4 bytes."""

    rows: int  # of the batch a step
    classes: int  # in a tile
    columns: int  # embedding dimensions in a tile, at most
    stages: int
    warps: int
    most_rows: int  # of the batch, for the widest tile; of others in proportion
    most_columns: int  # of the centres
    product_rows: int  # of a tile of E·ŵ beside it, as wide as its own
    product_depth: int  # classes a step of that

    def serves(self, batch: int, width: int) -> bool:
        """Whether it is used; else a library's product and a pass are, as where many columns of its tiles would be idle."""
        columns = self.columns_for(width)
        filled = 8 * -(-width // columns) * columns <= 9 * width
        return filled and width <= self.most_columns and batch * self.columns <= self.most_rows * columns

    def columns_for(self, width: int) -> int:
        """Of a tile, a power of 2, for centres of this width."""
        return min(self.columns, max(1 << (width - 1).bit_length(), 32))

    def product_tiles(self, batch: int, width: int) -> int:
        """Of E·ŵ."""
        return -(-batch // self.product_rows) * -(-width // self.columns_for(width))

    def parts_beside(self, batch: int, width: int, classes: int, multiprocessors: int, size: int = 4) -> int:
        """Parts of the classes in which E·ŵ is made beside the gradient of few centres, which leaves SMs idle.

        The fewest that take no longer than it, of centres of ``size`` bytes an element. 0 where it leaves too few: a product
        of its own takes all of them, and its launch and that of a library's sum of parts, some eight steps of these tiles.
        """
        if batch == 0:
            return 0
        tiles, steps = self.product_tiles(batch, width), -(-classes // self.product_depth)
        idle = (multiprocessors - -(-classes // self.classes)) // tiles
        if idle < 1:
            return 0
        # Of a program of the gradient; its centres are read and written in the time of some twelve, or of four a tile if
        # they are of two bytes. A part's tile leaves in that of four.
        across = -(-width // self.columns_for(width))
        of_gradient = -(-batch // self.rows) * across + (12 if size == 4 else 4 * across)
        parts = min(idle, -(-steps // (of_gradient - 4)))
        return parts if -(-steps // parts) + 4 <= of_gradient + tiles * steps // multiprocessors + 8 else 0


# By the same counts (bench/estimate.py). A library's product has clusters of blocks that share what they load: it draws less
# from the L2 cache, which is worth more than the pass that is spared where the batch is large; and E, read once a tile of
# columns, must lie in that cache meanwhile. Where none is listed neither has been counted.
GRADIENT: dict[int, GradientConfig] = {
    9: GradientConfig(
        rows=64,
        classes=128,
        columns=256,
        stages=4,
        warps=8,
        most_rows=1024,
        most_columns=512,
        product_rows=128,
        product_depth=64,
    ),
}


@functools.cache
def config(capability: tuple[int, int], how: str) -> Config:
    """The entry of the newest architecture not newer than ``capability``."""
    major = max((each for each, k in TABLE if k == how and each <= capability[0]), default=8)
    return TABLE[major, how]
