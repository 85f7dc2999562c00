"""Synthetic identities: any number of them, drawn by number from a hash, none of them stored.

An identity is a point on a sphere in a latent space, a function of (seed, its number) alone. A sample of it is that point
with a little noise, beside nuisance coordinates that are drawn anew for every sample and say nothing of the identity (as
pose and light do of a face), sent through a fixed random nonlinear map that mixes the two. In the space of the samples
the nuisance dominates: two samples of one identity are hardly nearer than two of different ones, and a network must
learn to undo the map and to leave the nuisance out. What it learns holds for identities never seen, with which it is tested.

Training draws identities with a long tail, as they come in real collections of faces: the r-th most frequent with
probability ∝ 1/(r + q)² (Mandelbrot's law). Where there are many, the q = 1,000 most frequent make up half of the samples,
and from those a network learns within a few hundred steps, with all the others as negatives. Were a million equally likely,
a short run would see each once or never, and nobody could learn anything from it; with q far above their number they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LATENT, NUISANCE, HIDDEN, INPUTS = 24, 24, 256, 128
NOISE = 0.25  # standard deviation around the identity's point, whose coordinates have a root mean square of 1
NUISANCE_SIZE = 2.0  # standard deviation of each nuisance coordinate
GAIN = 0.4  # how far the map is from linear
FREQUENT = 1000.0  # classes that make up half of the samples
MAX_IDENTITIES = 1 << 50  # coordinates are numbered in 64 bits


class Identities:
    """The identities of one seed.

    Args:
        seed: of the identities and of the map from the latent space to samples.
        device: where samples are made.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.device = seed, torch.device(device)
        generator = torch.Generator().manual_seed(_mix_int(seed))
        latent = LATENT + NUISANCE
        first = torch.randn(latent, HIDDEN, generator=generator) / math.sqrt(latent)
        second = torch.randn(HIDDEN, INPUTS, generator=generator) / math.sqrt(HIDDEN)
        self._first, self._second = first.to(self.device), second.to(self.device)

    def points(self, identities: Tensor) -> Tensor:
        """The identities' points on the sphere of radius √LATENT, ``[n, LATENT]``, for numbers ``[n]`` (int64)."""
        coordinates = torch.arange(LATENT, device=identities.device)
        counters = 2 * (identities[:, None] * LATENT + coordinates)
        radius, angle = (_uniform(counters + i, self.seed) for i in (0, 1))
        normal = torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)  # Box and Muller 1958
        points: Tensor = normal * (math.sqrt(LATENT) / normal.norm(dim=1, keepdim=True))
        return points.float()

    def samples(self, identities: Tensor, generator: torch.Generator) -> Tensor:
        """One new sample of each identity ``[n]``: ``[n, INPUTS]``."""
        noise = torch.randn(len(identities), LATENT + NUISANCE, generator=generator)  # on the CPU: alike on every device
        latent = noise.to(self.device)
        latent[:, :LATENT] = self.points(identities.to(self.device)) + NOISE * latent[:, :LATENT]
        latent[:, LATENT:] *= NUISANCE_SIZE
        return torch.tanh(GAIN * latent @ self._first) @ self._second


def draw_classes(num_classes: int, count: int, generator: torch.Generator, frequent: float = FREQUENT) -> Tensor:
    """``count`` of ``num_classes``, the r-th most frequent with probability ∝ 1/(r + frequent)²: ``[count]`` int64."""
    random = torch.rand(count, generator=generator, dtype=torch.float64)
    share = random * (num_classes / (num_classes + frequent))
    order = (frequent * share / (1 - share)).long().clamp_(0, num_classes - 1)  # the distribution function's inverse
    # The most frequent classes are spread over all ranks' shards by a permutation.
    step = max(round(0.618034 * num_classes), 1)
    while math.gcd(step, num_classes) > 1:
        step += 1
    return order * step % num_classes


def generator_of(*numbers: int) -> torch.Generator:
    """A generator whose numbers are a function of these alone, such as (seed, rank, step)."""
    state = 0
    for number in numbers:
        state = _mix_int(state ^ _mix_int(number & _MASK))
    return torch.Generator().manual_seed(state >> 1)


_MASK = (1 << 64) - 1
# Increment and multipliers of SplitMix64 (Steele, Lea, Flood 2014).
_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix_int(x: int) -> int:
    x = (x + _INCREMENT) & _MASK
    x = (x ^ x >> 30) * _FIRST & _MASK
    x = (x ^ x >> 27) * _SECOND & _MASK
    return x ^ x >> 31


def _uniform(counters: Tensor, seed: int) -> Tensor:
    """A float64 in (0, 1) for each counter, by SplitMix64 started from the seed."""
    x = counters * _signed(_INCREMENT) + _signed(_mix_int(seed))
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    x = x ^ _shift(x, 31)
    return (_shift(x, 11).double() + 0.5) * 2.0**-53


def _shift(x: Tensor, bits: int) -> Tensor:
    """To the right, bringing in zeros: int64 stands for uint64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
