"""Exact order statistics of two populations of scores, genuine and impostor, in as few passes over them as it takes.

A goal is the highest score at which a condition on the counts holds: as many impostors at or above it as a FAR accepts, or
FAR ≥ FRR. A sample says in which interval to look for it, the first pass keeps the scores there, and where the sample was
wrong or the scores were too many, a further pass looks in one bin of the histogram, then in a cell of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .counting import BINS, EVERYTHING, Array, Inside, Interval, Tally, edge

Condition = Callable[[int, int], bool]  # of the number of impostors and of genuine pairs at or above a score
_TOGETHER = 1 << 21  # two intervals with so few scores between them become one
_PASSES = 12  # float64's range in cells of cells takes five
_FEW = 1 << 14


class Counts(NamedTuple):
    """Numbers of scores: of impostors and of genuine pairs."""

    impostors: int
    genuine: int


class Point(NamedTuple):
    """The highest score at which a condition holds, the counts at or above it, and those above it."""

    score: float
    at: Counts
    above: Counts


class Pass(NamedTuple):
    """What a pass over all scores has counted."""

    genuine: Tally
    impostors: Tally


class Sample(NamedTuple):
    """Histograms of some scores, each as shares of its population, how many scores each stands on, and of how many rows."""

    impostors: Array
    genuine: Array
    impostor_count: int
    genuine_count: int
    rows: int


def rank(k: int) -> Condition:
    """The k-th highest impostor score."""
    return lambda impostors, genuine: impostors >= k


def crossing(total: Counts) -> Condition:
    """The highest score at which FAR ≥ FRR, in whole numbers."""
    return lambda impostors, genuine: (
        impostors * total.genuine + genuine * total.impostors >= total.impostors * total.genuine
    )


def find(
    goals: Sequence[Condition], scan: Callable[[Sequence[Interval], bool], Pass], total: Counts, sample: Sample | None
) -> tuple[list[Point], Pass]:
    """The point of each goal, and the first pass, which has the histograms.

    Args:
        goals: conditions that hold where all scores are counted.
        scan: a pass over all scores that keeps those in the given intervals, and makes histograms if asked.
        total: numbers of scores.
        sample: of them; None to keep all scores, where they are few.

    Raises:
        RuntimeError: scores change from pass to pass.
    """
    points: dict[int, Point] = {}
    looks = {index: EVERYTHING if sample is None else _guess(goal, total, sample) for index, goal in enumerate(goals)}
    intervals = _merged(looks.values(), total, sample) if looks else []
    first = found = scan(intervals, True)
    for _ in range(_PASSES):
        for index, goal in enumerate(goals):
            if index in points:
                continue
            point = _resolve(goal, found)
            if isinstance(point, Point):
                points[index] = point
            elif point is not None:
                looks[index] = point
            else:  # it is in none of the intervals
                looks[index] = _bin(goal, first, found.impostors.inside[0].dtype)
        if len(points) == len(goals):
            return [points[index] for index in range(len(goals))], first
        intervals = sorted({looks[index] for index in looks if index not in points})
        found = scan(intervals, False)
    raise RuntimeError("the same pair's score differs from pass to pass: the device's products must give the same bits")


def _resolve(goal: Condition, found: Pass) -> Point | Interval | None:
    """The goal's point, or the narrower interval in which it is, or None if it is in none of the intervals."""
    for impostors, genuine in zip(found.impostors.inside, found.genuine.inside, strict=True):
        above = Counts(impostors.above, genuine.above)
        if goal(*above) or not goal(above.impostors + impostors.number, above.genuine + genuine.number):
            continue
        if impostors.interval.single(impostors.dtype):
            at = Counts(above.impostors + impostors.number, above.genuine + genuine.number)
            return Point(impostors.interval.low, at, above)
        scores = impostors.scores(), genuine.scores()
        if scores[0] is not None and scores[1] is not None:
            return _highest(goal, scores[0], scores[1], above)
        return _cell(goal, impostors, genuine, above)
    return None


def _highest(goal: Condition, impostors: Array, genuine: Array, above: Counts) -> Point:
    """The point among scores that are all at hand, of which ``above`` says how many more are higher."""
    while len(impostors) + len(genuine) > _FEW:  # halves, by the median of a few: sorting all takes longer than the pass
        longer = max(impostors, genuine, key=len)
        pivot = np.median(longer[:: len(longer) // 1024 + 1]).astype(longer.dtype)
        upper = impostors >= pivot, genuine >= pivot
        counts = Counts(*(int(np.count_nonzero(each)) for each in upper))
        reached = goal(above.impostors + counts.impostors, above.genuine + counts.genuine)
        kept = (upper[0], upper[1]) if reached else (~upper[0], ~upper[1])
        if kept[0].all() and kept[1].all():  # ties
            break
        impostors, genuine = impostors[kept[0]], genuine[kept[1]]
        if not reached:
            above = Counts(above.impostors + counts.impostors, above.genuine + counts.genuine)
    impostors, genuine = np.sort(impostors), np.sort(genuine)
    values = np.unique(np.concatenate([impostors, genuine]))

    def counted(score: float, side: str) -> Counts:
        numbers = (len(each) - int(np.searchsorted(each, score, side)) for each in (impostors, genuine))  # type: ignore[call-overload]
        return Counts(*(high + number for high, number in zip(above, numbers, strict=True)))

    low, high = 0, len(values)  # the condition holds at low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if goal(*counted(values[middle], "left")) else (low, middle)
    return Point(float(values[low]), counted(values[low], "left"), counted(values[low], "right"))


def _cell(goal: Condition, impostors: Inside, genuine: Inside, above: Counts) -> Interval:
    """The cell in which the point is, of an interval with too many scores."""
    return impostors.cell(_first(goal, impostors.count(), genuine.count(), above))


def _bin(goal: Condition, counted: Pass, dtype: np.dtype[Any]) -> Interval:
    assert counted.impostors.histogram is not None and counted.genuine.histogram is not None
    index = _first(goal, counted.impostors.histogram.numpy(), counted.genuine.histogram.numpy(), Counts(0, 0))
    return Interval(edge(index, dtype), edge(index + 1, dtype))


def _first(goal: Condition, impostors: Array, genuine: Array, above: Counts) -> int:
    """The highest bin at which the condition holds."""
    high = [np.cumsum(each[::-1])[::-1] for each in (impostors, genuine)]
    low, end = 0, len(impostors)
    while end - low > 1:
        middle = (low + end) // 2
        holds = goal(above.impostors + int(high[0][middle]), above.genuine + int(high[1][middle]))
        low, end = (middle, end) if holds else (low, middle)
    return low


def _guess(goal: Condition, total: Counts, sample: Sample) -> Interval:
    """Where the sample says the point is, with some slack: a row is in many pairs, so that they stand for fewer."""
    kind = np.dtype(np.float32)
    shares = [np.cumsum(each[::-1])[::-1] for each in (sample.impostors, sample.genuine)]
    numbers = (sample.impostor_count, sample.genuine_count)

    def slack(share: float, number: int) -> float:
        return min(4 * share, 0.2) / math.sqrt(sample.rows) + 6 * math.sqrt(share / max(number, 1)) + 10 / max(number, 1)

    def holds(index: int, sign: int) -> bool:
        found = []
        for share, number, all_ in zip(shares, numbers, total, strict=True):
            likely = min(float(share[index]), 1.0)
            off = slack(min(likely, 1 - likely) if number else 1.0, number)
            found.append(round(all_ * min(max(likely + sign * off, 0.0), 1.0)))
        return goal(*found)

    ends: list[int] = []
    for sign in (-1, 1):
        low, end = -1, BINS
        while end - low > 1:
            middle = (low + end) // 2
            low, end = (middle, end) if holds(middle, sign) else (low, middle)
        ends.append(low)
    from_ = edge(ends[0], kind) if ends[0] > 0 else EVERYTHING.low
    return Interval(from_, edge(ends[1] + 1, kind) if ends[1] + 1 < BINS else math.inf)


def _merged(intervals: Iterable[Interval], total: Counts, sample: Sample | None) -> list[Interval]:
    """Neighbours with few scores between them as one: an interval costs a comparison of every score."""
    merged: list[Interval] = []
    for interval in sorted(intervals):
        if merged and _between(merged[-1].high, interval.low, total, sample) <= _TOGETHER:
            merged[-1] = Interval(merged[-1].low, max(merged[-1].high, interval.high))
        else:
            merged.append(interval)
    if merged and _between(merged[-1].high, math.inf, total, sample) <= _TOGETHER:
        merged[-1] = Interval(merged[-1].low, math.inf)
    return merged


def _between(low: float, high: float, total: Counts, sample: Sample | None) -> float:
    """About how many scores are in an interval."""
    if sample is None:
        return 0.0
    ends = [BINS if end == math.inf else min(max(math.ceil(end) + BINS // 2, 0), BINS) for end in (low, high)]
    shares = [float(each[ends[0] : ends[1]].sum()) for each in (sample.impostors, sample.genuine)]
    return total.impostors * shares[0] + total.genuine * shares[1]
