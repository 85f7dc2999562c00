"""Norms of rows and their inverses, whatever the rows' magnitude, with what has no direction set apart."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

# A row of this norm or less counts as zero: a gradient is divided by the norm and must stay in float32's range.
EPS = 1e-30
# The same where the host does not look at norms: there a row is not scaled, and float32 must hold the squares.
_EPS_UNSCALED = 1e-18
# Norms between 1/USUAL and USUAL: float32 holds products of several of them.
USUAL = 2.0**30


class Scaled(NamedTuple):
    """Rows whose norms float32 can work with."""

    rows: Tensor  # [N, D] as given, or times power
    norm: Tensor  # [N] of these rows
    inverse: Tensor  # [N] 1/norm, 0 for a zero row, NaN for one that is not finite
    power: Tensor | None  # [N] of two, 1 for a row of a usual norm; None where all are


def scaled(rows: Tensor) -> Scaled:
    """Scale the rows of an unusual norm. On a GPU the host would have to wait to know of any: there none is scaled."""
    norm = torch.linalg.vector_norm(rows, dim=1)
    if rows.device.type != "cpu":
        inverse = threshold(norm, _EPS_UNSCALED, math.inf).reciprocal_()
        return Scaled(rows, norm, inverse.add_(norm - norm), None)  # inf - inf is NaN
    if are_usual(norm):
        return Scaled(rows, norm, norm.reciprocal(), None)
    largest = torch.linalg.vector_norm(rows, math.inf, dim=1)
    limit = math.frexp(torch.finfo(rows.dtype).max)[1] - 2
    exponent = torch.frexp(largest).exponent.clamp_(-limit, limit)
    usual = (norm > 1 / USUAL) & (norm < USUAL)
    scale = ~usual & (largest > 0) & (largest < math.inf)
    power = torch.where(scale, torch.ldexp(torch.ones_like(norm), -exponent), 1.0)
    rows = rows * power[:, None]
    norm = torch.linalg.vector_norm(rows, dim=1)
    inverse = norm.reciprocal().masked_fill_(norm <= EPS * power, 0)
    return Scaled(rows, norm, inverse.add_(norm - norm), power)


def row_norms(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the rows, 0 for one that counts as zero, and their inverses as :class:`Scaled` has them."""
    _, norm, inverse, power = scaled(rows)
    if power is None:
        return norm, inverse
    return (norm / power).masked_fill_(inverse == 0, 0), inverse * power


def across(grad: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """``grad [N, D]`` without its part along each of ``rows``, of 1/norm ``inverse [N, 1]``; may overwrite ``grad``.

    A row that counts as zero, with the inverse 0, keeps its gradient.
    """
    if grad.device.type == "cpu":  # one pass: the derivative of g·v/‖v‖ by v, where g = ‖v‖
        norm = torch.where(inverse == 0, 1.0, 1 / inverse)
        result: Tensor = torch.ops.aten._weight_norm_interface_backward(grad, rows, norm, norm, 0)[0]
        return result
    return grad.addcmul_(rows, (grad * rows).sum(1, keepdim=True).mul_(inverse).mul_(inverse), value=-1)


def are_usual(norms: Tensor) -> bool:
    """Whether all norms, or all inverses of norms, are: none of a zero row, of one that is not finite, or not float32's."""
    if not norms.numel():
        return True
    smallest, largest = torch.aminmax(norms)
    return smallest.item() > 1 / USUAL and largest.item() < USUAL  # False for a NaN
