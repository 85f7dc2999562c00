"""A sharded head's first centres: drawn from a seed, the same whatever the number of ranks."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .shards import ClassShards

_BLOCK = 4096  # classes drawn from one seed, so that no value depends on where a shard begins


def draw_centres_(
    centres: Tensor,  # [c, K, D], this rank's
    shards: ClassShards,
    std: float,
    seed: int,
    draw: int,  # how often they were drawn from the seed before
) -> None:
    """Fill ``centres`` from a normal distribution, block by block as one process would fill all C classes."""
    again = f" {draw}" if draw else ""
    generator = torch.Generator(centres.device)
    for first in range(shards.start // _BLOCK * _BLOCK, shards.stop, _BLOCK):
        digest = hashlib.blake2b(f"{seed} {first}{again}".encode(), digest_size=7).digest()
        generator.manual_seed(int.from_bytes(digest, "big"))
        last = min(first + _BLOCK, shards.num_classes)
        block = torch.randn(
            last - first, *centres.shape[1:], generator=generator, device=centres.device, dtype=centres.dtype
        )
        begin, end = max(first, shards.start), min(last, shards.stop)
        own = centres[begin - shards.start : end - shards.start]
        torch.mul(block[begin - first : end - first], std, out=own)
