"""What chunks of classes come to, row by row: the sum of their terms, with its shift, and the best of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RowSums:
    """``[B]`` each."""

    z: Tensor  # float64, so that the error does not grow with C
    shift: Tensor
    best: Tensor  # the largest logit and its class; of size 0 if not asked for
    best_class: Tensor

    @classmethod
    def none(cls, x: Tensor, bounded: bool, predict: bool) -> RowSums:
        """Of no chunk, for rows ``x [B, D]``."""
        B, asked = len(x), len(x) if predict else 0
        return cls(
            x.new_zeros(B, dtype=torch.float64),
            x.new_full((B,), 0.0 if bounded else torch.finfo(x.dtype).min / 4),
            x.new_full((asked,), -math.inf),
            torch.full((asked,), -1, device=x.device),
        )

    def take_best(self, best: Tensor, best_class: Tensor) -> None:
        """The lowest class of equals; none, -1, where one is NaN, as such a row's prediction is."""
        larger = (best > self.best) | ((best == self.best) & (best_class < self.best_class)) | best.isnan()
        self.best = torch.where(larger, best, self.best)
        self.best_class = torch.where(larger, best_class, self.best_class).masked_fill_(self.best.isnan(), -1)

    def raise_shift(self, maximum: Tensor) -> None:
        shift = torch.maximum(self.shift, maximum)
        self.z *= torch.exp2(self.shift - shift)
        self.shift = shift

    def add(self, other: RowSums, bounded: bool) -> None:
        z = other.z
        if not bounded:
            self.raise_shift(other.shift)
            z = z * torch.exp2(other.shift - self.shift)
        self.z += z
        if len(self.best):
            self.take_best(other.best, other.best_class)
