"""Tile sizes of the cosine kernel, by compute capability and operand dtype, and the sizes of chunks.

``python -m bench tune`` measures the candidates on a GPU and prints the table; there is no autotuning at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """How :func:`.triton_kernels.cosine_exp` is cut and compiled."""

    rows: int  # of the batch in a tile
    classes: int  # in a tile
    depth: int  # embedding dimensions a step
    stages: int  # tiles of operands in flight
    warps: int
    split: bool  # E leaves in halves: half the shared memory for it
    resident: int  # programs that an SM holds


# Classes a chunk: what is not kept of E, and ŵ, take at most this many elements.
CHUNK_ELEMENTS = 1 << 27
# Classes of which dŵ is computed at a time, so that it is still in the L2 cache when the Jacobian reads it.
FINISH_ELEMENTS = 1 << 23

_HALF = "half"
# Not tuned on a GPU yet: chosen from shared memory, registers and the traffic that each tile causes (see the README).
TABLE: dict[tuple[int, str], Config] = {
    (8, _HALF): Config(rows=128, classes=128, depth=32, stages=4, warps=4, split=False, resident=2),
    (8, "float32"): Config(rows=64, classes=64, depth=32, stages=3, warps=4, split=False, resident=2),
    (9, _HALF): Config(rows=128, classes=256, depth=64, stages=3, warps=8, split=True, resident=1),
    (9, "float32"): Config(rows=128, classes=128, depth=32, stages=3, warps=8, split=True, resident=1),
    (10, _HALF): Config(rows=128, classes=256, depth=64, stages=3, warps=8, split=True, resident=1),
    (10, "float32"): Config(rows=128, classes=128, depth=32, stages=3, warps=8, split=True, resident=1),
}


def config(capability: tuple[int, int], dtype: torch.dtype) -> Config:
    """The entry of the newest architecture not newer than ``capability``."""
    kind = "float32" if dtype == torch.float32 else _HALF
    major = max((each for each, k in TABLE if k == kind and each <= capability[0]), default=8)
    return TABLE[major, kind]
