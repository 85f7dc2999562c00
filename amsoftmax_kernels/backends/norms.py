"""Norms of rows and their inverses, with what has no direction set apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import threshold

EPS = 1e-12  # the norm at which a row counts as zero, that of torch.nn.functional.normalize


def row_norms(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the rows and their inverses: 0 for a zero row, NaN where the norm overflows."""
    norm = torch.linalg.vector_norm(matrix, dim=1)
    inverse = threshold(norm, EPS, math.inf).reciprocal_()
    return norm, inverse.add_(norm - norm)  # inf - inf is NaN
