"""Sub-centres (Deng et al. 2020, equation 3): a class has K centres, and its cosine is the largest of theirs.

The centres of class j are rows j·K to j·K + K − 1. A row's target becomes one of them, and of each other class all but the
nearest centre are left out of the terms of z: from there on a centre is what a class is elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import is_traced, register
from . import Problem
from .targets import TargetPair, unit_rows


def nearest(features: Tensor, weight: Tensor, labels: Tensor, subcentres: int) -> Tensor:
    """The centre ``[B]`` that is nearest of those of each row's class, the first of equals, by exact cosines.

    Where a label is no class of this ``weight [C·K, D]`` the result is no centre of it: negative or C·K.
    """
    op = torch.ops.amsoftmax_kernels.nearest_centres if is_traced(features) else _nearest
    found: Tensor = op(features, weight, labels, subcentres)
    return found


def _nearest(features: Tensor, weight: Tensor, labels: Tensor, subcentres: int) -> Tensor:
    num_classes = weight.shape[0] // subcentres
    present = (labels >= 0) & (labels < num_classes)
    first = torch.where(present, labels * subcentres, 0)
    pair = TargetPair.of(features, weight, first)
    found, best = first, pair.cosine
    for place in range(1, subcentres):
        w = unit_rows(weight.index_select(0, first + place).to(torch.float64))[0]
        cosine = (pair.x * w).sum(1)
        better = (cosine > best) | (cosine.isnan() & ~best.isnan())  # a NaN is to be seen
        found, best = torch.where(better, first + place, found), torch.where(better, cosine, best)
    return torch.where(present, found, torch.where(labels < 0, labels, weight.shape[0]))


class Columns(NamedTuple):
    """How the kernels see the centres: a column each, a class's in a group of a power of two, padded by zeros."""

    subcentres: int  # K

    @property
    def group(self) -> int:
        return 1 << (self.subcentres - 1).bit_length()

    def count(self, centres: int) -> int:
        return centres // self.subcentres * self.group

    def centres(self, columns: range | slice) -> slice:
        """Those of some columns, which are whole groups."""
        return slice(*(each // self.group * self.subcentres for each in (columns.start, columns.stop)))

    def problem(self, problem: Problem) -> Problem:
        """The problem with its labels as columns."""
        if self.group == self.subcentres:
            return problem
        labels, K = problem.labels, self.subcentres
        columns = labels.div(K, rounding_mode="floor") * self.group + labels.remainder(K)
        return problem._replace(labels=torch.where(labels < 0, labels, columns))

    def spread(self, centres: Tensor, out: Tensor) -> None:
        """Rows ``[n·K, D]`` into their groups' places in ``out``, between rows of zeros."""
        groups = out.unflatten(0, (-1, self.group))
        groups[:, : self.subcentres] = centres.unflatten(0, (-1, self.subcentres))
        groups[:, self.subcentres :] = 0

    def gather(self, rows: Tensor) -> Tensor:
        """Of rows of all columns those of centres, in order."""
        if self.group == self.subcentres:
            return rows
        groups: Tensor = rows.unflatten(0, (-1, self.group))
        return groups[:, : self.subcentres].flatten(0, 1)


def keep_largest_(panel: Tensor, subcentres: int) -> None:
    """In a panel ``[n·K, B]`` of logits all but the largest of each class's K, the first of equals, become −∞."""
    groups = panel.unflatten(0, (-1, subcentres))
    largest, place = groups.max(1, keepdim=True)
    groups.fill_(-torch.inf).scatter_(1, place, largest)


register(
    "nearest_centres",
    "(Tensor features, Tensor weight, Tensor labels, int subcentres) -> Tensor",
    _nearest,
    lambda features, weight, labels, subcentres: torch.empty_like(labels),
    differentiable=False,
)
