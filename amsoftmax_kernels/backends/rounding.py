"""Stochastic rounding to bfloat16: up or down at random, so that what is added in small steps is not lost.

A float32 plus 16 random bits below bfloat16's last, truncated, is rounded up with the probability by which it exceeds its
lower neighbour: its expectation is itself (Gupta et al. 2015, "Deep learning with limited numerical precision", section 3).
The bits are a hash of seed, step, class and column: the same on any number of ranks, chunks and threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..hashing import mix, mix_int

COLUMN = 0x9E3779B1  # 2^32 over the golden ratio: what tells columns apart


def key(seed: int, step: int, tensor: int) -> int:
    """The int64 that stands for one of a step's tensors."""
    return mix_int(mix_int(seed) + 4 * step + tensor)


def round_(target: Tensor, value: Tensor, classes: Tensor, key: int) -> None:
    """Round float32 ``value [n, D]`` of ``classes [n]`` into bfloat16 ``target [n, D]``. Overwrites ``value``."""
    columns = (torch.arange(value.shape[1], device=value.device) * COLUMN).to(torch.int32)
    bits = mix(classes + key).to(torch.int32)[:, None] + columns
    # lowbias32 (Wellons 2018, "Prospecting for hash functions"), of which the high half is used.
    bits = (bits ^ (bits >> 16 & 0xFFFF)).mul_(0x7FEB352D)
    bits = (bits ^ (bits >> 15 & 0x1FFFF)).mul_(0x846CA68B - (1 << 32))
    raised = value.view(torch.int32).add_(bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF))
    target.view(torch.int16).copy_(raised.bitwise_right_shift_(16))
