"""Tile sizes of the two kernels with a product, by compute capability and operand kind. There is no autotuning at run time;
``python -m bench tune`` measures candidates on a GPU.

Nothing here has been tuned on a GPU. The sizes are chosen by what the compiled code needs: no spills, registers and shared
memory for the resident programs, and the least traffic of operands that leaves room for three stages.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..chunking import kind as kind


@dataclass(frozen=True)
class Config:
    """How :func:`.forward_kernels.cosine_exp` is cut and compiled."""

    rows: int  # of the batch in a tile
    classes: int  # in a tile
    depth: int  # embedding dimensions a step
    stages: int  # tiles of operands in flight
    warps: int
    bulk: bool  # tiles move by the bulk copy engine (Hopper and newer), not by ordinary loads
    resident: int = 1  # programs that an SM holds


# By compute capability's major version and the operands' kind.
TABLE: dict[tuple[int, str], Config] = {
    (8, "half"): Config(rows=128, classes=128, depth=32, stages=4, warps=8, bulk=False),
    (8, "tf32"): Config(rows=64, classes=128, depth=32, stages=3, warps=8, bulk=False),
    (8, "float32"): Config(rows=128, classes=64, depth=16, stages=3, warps=8, bulk=False),
    (9, "half"): Config(rows=128, classes=256, depth=64, stages=3, warps=8, bulk=True),
    (9, "tf32"): Config(rows=128, classes=128, depth=32, stages=3, warps=8, bulk=True),
    (10, "half"): Config(rows=128, classes=128, depth=64, stages=4, warps=8, bulk=True),
    (10, "tf32"): Config(rows=128, classes=64, depth=32, stages=3, warps=8, bulk=True),
    (10, "float32"): Config(rows=64, classes=64, depth=32, stages=3, warps=8, bulk=False),
}

# Consumer Blackwell has the older cards' shared memory and instructions, but there the larger tile of halves spills.
TABLE |= {(12, how): entry for (major, how), entry in TABLE.items() if major == 8}
TABLE[12, "half"] = Config(rows=64, classes=128, depth=32, stages=4, warps=8, bulk=False)


@dataclass(frozen=True)
class GradientConfig:
    """How :func:`.backward_kernels.grad_centres` is cut and compiled, for half-precision operands."""

    rows: int  # of the batch a step
    classes: int  # in a tile, which holds their whole rows
    columns: int  # embedding dimensions at most
    stages: int
    warps: int

    def serves(self, width: int) -> bool:
        """Whether it is used for centres of this padded width; else a library's product and a pass after it are."""
        return width <= self.columns


# By compute capability's major version; where none is listed a library's product serves.
GRADIENT: dict[int, GradientConfig] = {9: GradientConfig(rows=32, classes=64, columns=512, stages=4, warps=8)}


@functools.cache
def config(capability: tuple[int, int], how: str) -> Config:
    """The entry of the newest architecture not newer than ``capability``."""
    major = max((each for each, k in TABLE if k == how and each <= capability[0]), default=8)
    return TABLE[major, how]
