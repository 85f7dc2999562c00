"""Random numbers without a state: a hash of what they are for, the same on every device and any number of ranks.

SplitMix64's output function (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), of int64 tensors.
"""

from __future__ import annotations

from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def random_numbers(position: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """Int64 numbers from 0 to 2^63 − 1, one for each ``position``; ``seed`` and ``step`` are 0-d, all int64."""
    return mix(position + mix(step + mix(seed))) & ((1 << 63) - 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of int64 numbers of which each bit depends on all."""
    x = x * signed(_GOLDEN)
    x = (x ^ _right(x, 30)) * signed(_FIRST)
    x = (x ^ _right(x, 27)) * signed(_SECOND)
    return x ^ _right(x, 31)


def mix_int(x: int) -> int:
    """:func:`mix` of one Python int."""
    mask = (1 << 64) - 1
    x = x * _GOLDEN & mask
    x = (x ^ x >> 30) * _FIRST & mask
    x = (x ^ x >> 27) * _SECOND & mask
    return signed(x ^ x >> 31)


def _right(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value
