"""One pass over scores that memory cannot hold: their number, a histogram, and those in a few intervals.

A score is a cosine times :data:`UNITS`, as the tiles have it: whole numbers are then the edges of the histogram's bins, and
multiplying by a power of two changes no bit. A pass keeps the scores themselves in the intervals that it is given, up to a
budget; where there are more it counts them in cells, in one of which a further pass looks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNITS = 2.0**13  # in which scores are counted: bins are 1.2e-4 of a cosine wide
_OFFSET = int(UNITS) + 2  # rounding may take a cosine a little past 1
BINS = 2 * _OFFSET + 1
NO_SCORE = -float(_OFFSET)  # stands in a tile for what is not to be counted: it has a bin of its own, below all intervals
KEPT = 1 << 25  # scores that a pass keeps in all: 128 MiB of float32
_CELLS = 1 << 16
_LARGEST = {4: (1 << 31) - 1, 8: (1 << 63) - 1}  # integer of so many bytes

Array = NDArray[Any]


class Interval(NamedTuple):
    """Scores from ``low`` to under ``high``, both of the scores' own dtype."""

    low: float
    high: float

    def single(self, dtype: np.dtype[Any]) -> bool:
        """Whether it holds one number alone."""
        return bool(np.nextafter(dtype.type(self.low), dtype.type(np.inf)) >= self.high)


EVERYTHING = Interval(1 - float(_OFFSET), math.inf)


def edge(index: int, dtype: np.dtype[Any]) -> float:
    """The smallest number in a bin: bins hold what truncation makes equal, so that the middle one is two units wide."""
    whole = index - _OFFSET
    return float(whole) if whole > 0 else float(np.nextafter(dtype.type(whole - 1), dtype.type(np.inf)))


class Budget:
    """How many scores a pass may keep; its threads share it."""

    def __init__(self, left: int) -> None:
        self._left, self._lock = left, threading.Lock()

    def take(self, count: int) -> bool:
        with self._lock:
            if count > self._left:
                return False
            self._left -= count
            return True


class Inside:
    """What a pass finds in one interval: how many scores are above and inside, and the scores or a count of each cell."""

    def __init__(self, interval: Interval, dtype: np.dtype[Any], budget: Budget) -> None:
        self.interval, self.dtype, self.budget = interval, dtype, budget
        self.above, self.number = 0, 0
        self.cells: Array | None = None
        self._parts: list[Array] = []
        self._single = interval.single(dtype)

    def add(self, scores: Array, above: int) -> None:
        self.above += above
        self.number += len(scores)
        if self._single or not len(scores):
            return
        if self.cells is None and self.budget.take(len(scores)):
            self._parts.append(scores)
        else:
            self.count(scores)

    def merge(self, other: Inside) -> None:
        self.above += other.above
        self.number += other.number
        self._parts += other._parts
        if other.cells is not None:
            self.count(other.cells)
        elif self.cells is not None:
            self.count()

    def scores(self) -> Array | None:
        """All scores inside, in no order; None if they were too many to keep."""
        if self.cells is not None:
            return None
        if self._single:
            return np.full(min(self.number, 1), self.interval.low, self.dtype)
        return np.concatenate(self._parts) if self._parts else np.empty(0, self.dtype)

    def cell(self, index: int) -> Interval:
        """The scores that one cell counts."""
        low, width = self._grid()
        high = _value(low + (index + 1) * width, self.dtype)
        return Interval(_value(low + index * width, self.dtype), min(high, self.interval.high))

    def count(self, more: Array | None = None) -> Array:
        """Count what is kept in cells, and scores or counts that come; nothing is kept from then on."""
        if self.cells is None:
            self.cells = np.zeros(_CELLS, np.int64)
        if more is not None and more.dtype == np.int64:
            self.cells += more
            more = None
        low, width = self._grid()
        for part in [*self._parts, *([] if more is None else [more])]:
            place = (_order(part) - np.int64(low)).view(np.uint64) // np.uint64(width)
            self.cells += np.bincount(place.astype(np.int64), minlength=_CELLS)
        self._parts.clear()
        return self.cells

    def _grid(self) -> tuple[int, int]:
        """The first number's place among the floating-point numbers, and the width of a cell, of as many numbers each."""
        ends = [int(_order(np.array([end], self.dtype))[0]) for end in (self.interval.low, min(self.interval.high, _OFFSET))]
        return ends[0], max(-(-(ends[1] - ends[0]) // _CELLS), 1)


def _order(scores: Array) -> Array:
    """Each number's place among all of its dtype, int64: the bits of a negative one count down."""
    kind, largest = (np.int64, _LARGEST[8]) if scores.dtype == np.float64 else (np.int32, _LARGEST[4])
    bits: Array = (scores + 0).view(kind)  # -0 becomes 0
    return np.where(bits < 0, bits ^ kind(largest), bits).astype(np.int64)


def _value(order: int, dtype: np.dtype[Any]) -> float:
    """The number that has this place."""
    bits = order if order >= 0 else order ^ _LARGEST[dtype.itemsize]
    return float(np.array([bits], np.int64 if dtype.itemsize == 8 else np.int32).view(dtype)[0])


def in_numpy(scores: Tensor) -> bool:
    """Whether NumPy may look at them: its comparisons take an eighth of PyTorch's time on a CPU."""
    return scores.device.type == "cpu"


class Tally:
    """One population's scores in one pass.

    Args:
        intervals: in which scores are kept.
        histogram: whether to count the scores of each bin.
        dtype: of the scores, float32 or float64.
        budget: of the pass.
    """

    def __init__(self, intervals: Sequence[Interval], histogram: bool, dtype: torch.dtype, budget: Budget) -> None:
        kind = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        self.inside = [Inside(interval, kind, budget) for interval in intervals]
        self.histogram = torch.zeros(BINS, dtype=torch.int64) if histogram else None  # but for the first bin, NO_SCORE
        self._spare: Tensor | None = None
        self._masks: list[Array] = []

    def add(self, scores: Tensor) -> None:
        """Count these scores, contiguous, of any shape, on any device."""
        scores = scores.view(-1)
        if not len(scores):
            return
        if self.histogram is not None:
            self.histogram += self._binned(scores)
        if in_numpy(scores):
            array = scores.numpy()
            for each in self.inside:
                each.add(*self._select(array, each.interval))
            return
        for each in self.inside:
            above = scores >= each.interval.high
            within = scores[(scores >= each.interval.low) & ~above]
            each.add(within.cpu().numpy(), int(above.sum()))

    def merge(self, other: Tally) -> None:
        if self.histogram is not None and other.histogram is not None:
            self.histogram += other.histogram
        for mine, theirs in zip(self.inside, other.inside, strict=True):
            mine.merge(theirs)

    def _binned(self, scores: Tensor) -> Tensor:
        if self._spare is None or len(self._spare) < len(scores) or self._spare.device != scores.device:
            self._spare = torch.empty(len(scores), dtype=torch.int16, device=scores.device)
        bins = self._spare[: len(scores)]
        return torch.bincount(bins.copy_(scores).add_(_OFFSET), minlength=BINS).cpu()

    def _select(self, scores: Array, interval: Interval) -> tuple[Array, int]:
        """The scores in an interval, and how many are above it.

        Few are in it, as a rule: the mask is read eight at a time.
        """
        length = len(scores)
        if not self._masks or len(self._masks[0]) < length:
            self._masks = [np.empty(-(-length // 8) * 8, np.bool_) for _ in range(2)]
        inside, above = (mask[:length] for mask in self._masks)
        np.greater_equal(scores, scores.dtype.type(interval.low), out=inside)
        higher = 0
        if interval.high < math.inf:
            np.greater_equal(scores, scores.dtype.type(interval.high), out=above)
            higher = int(np.count_nonzero(above))
            np.greater(inside, above, out=inside)
        if length % 8:
            return scores[inside], higher
        words = np.flatnonzero(inside.view(np.uint64) != 0)
        if 8 * len(words) > length // 4:
            return scores[inside], higher
        near = scores.reshape(-1, 8).take(words, 0)
        return near[inside.reshape(-1, 8).take(words, 0)], higher
