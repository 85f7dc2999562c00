"""The MegaFace protocol: identification and verification of a few probes among up to millions of distractors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backends.products import product_nt
from . import inputs
from .all_pairs import rates, roc_curve, search
from .counting import KEPT, UNITS, Array, Budget, Interval
from .feature_files import Stream
from .passes import AllPairs, Progress, alone, merge_passes, new_pass, run, sampled
from .results import Curve, Result, at_threshold, percent
from .search import Counts, Pass, Sample

SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
_ROWS = 512  # distractors of a tile
_PROBES = 1024  # of a tile
_BLOCKS, _BLOCK = 16, 128  # of distractors that a sample reads, and their rows


@dataclass
class MegaFace(Result):
    """Rates of probes among distractors.

    Attributes:
        rank1: by number of distractors, the share of the ordered pairs (probe, mate) whose cosine exceeds the probe's
            largest with the first so many distractors.
        tar: by FAR, the share of pairs of the same person that are accepted, with all distractors.
        threshold: by FAR, the cosine from which on pairs are accepted.
        genuine: number of pairs of probes of the same person.
        impostors: number of pairs of probes of different people, and of probes with distractors.
    """

    rank1: dict[int, float]
    tar: dict[float, float]
    threshold: dict[float, float]
    genuine: int
    impostors: int

    def rows(self) -> list[tuple[str, ...]]:
        rank1 = [(f"rank-1, {size:,} distractors", percent(rate)) for size, rate in self.rank1.items()]
        tar = [(f"TAR at FAR {far:g}", percent(rate), at_threshold(self.threshold[far])) for far, rate in self.tar.items()]
        return [("genuine pairs", f"{self.genuine:,}"), ("impostor pairs", f"{self.impostors:,}"), *rank1, *tar]


def megaface(
    probes: Any, probe_labels: Any, distractors: Any, sizes: Any = SIZES, far: Any = (1e-6,), *, progress: bool = False
) -> MegaFace:
    """Rank-1 identification and verification of the MegaFace challenge (Kemelmacher-Shlizerman et al. 2016).

    Distractors are streamed: neither they nor their cosines need fit in memory. For each person every ordered pair of images
    is a probe and its mate, to be found among the distractors; a tie is lost. In verification, impostors are the pairs of
    different people's probes and of probes with all distractors, and the threshold at a FAR is the k-th highest of their
    cosines with k = round(FAR·impostors); what equals it is accepted too.

    Args:
        probes: ``[P, D]`` features, any floating-point dtype, a tensor on any device or an array; normalized inside.
        probe_labels: ``[P]`` integers, one a person.
        distractors: ``[M, D]``, a tensor or an array, ``numpy.load(path, mmap_mode="r")`` say, or a list of MegaFace's
            feature files; of people who are not among the probes.
        sizes: numbers of distractors, one or several; the first so many are taken.
        far: false acceptance rates in (0, 1], one or several.
        progress: whether to show the time left on the standard error, if it takes long.

    Returns:
        A :class:`MegaFace`. A rate with too few pairs or distractors is NaN, and ``notes`` says why.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: shapes do not fit, a feature is not finite, a file is no feature, or a number is out of range.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import evaluation as ev
        >>> people = torch.arange(5).repeat_interleave(3)
        >>> probes = torch.eye(16)[people] + 0.05 * torch.randn(15, 16)
        >>> result = ev.megaface(probes, people, torch.randn(1000, 16), sizes=(10, 1000), far=1e-3)
        >>> result.genuine, result.impostors
        (15, 15090)
    """
    matrix = inputs.matrix("probes", probes)
    people = inputs.people("probe_labels", probe_labels, len(matrix))
    stream = Stream("distractors", distractors, matrix.shape[1])
    chosen, fars = inputs.sizes("sizes", sizes), inputs.rates("far", far)
    order = people.argsort(stable=True)
    rows = alone(matrix.device, lambda: inputs.unit_rows("probes", matrix)[order.to(matrix.device)])
    people = people[order]
    counts = torch.bincount(people)
    genuine = int((counts * (counts - 1) // 2).sum())
    total = Counts(len(rows) * (len(rows) - 1) // 2 - genuine + len(rows) * len(stream), genuine)
    scores = _Scores(rows, people, stream, [size for size in chosen if size <= len(stream)], progress)
    with inputs.exact_products(matrix.device):
        points, _, counted = search(fars, [], scores, total)
        mates = _mates(rows, people)
    verified = rates(fars, points, total)
    result = MegaFace({}, verified.vr, verified.threshold, total.genuine, total.impostors, notes=verified.notes)
    for size in chosen:
        if size > len(stream):
            result.notes.append(f"no rank-1 with {size:,} distractors: there are {len(stream):,}")
        result.rank1[size] = scores.rank1(size, mates) if size <= len(stream) else math.nan
    found = {size: rate for size, rate in result.rank1.items() if not math.isnan(rate)}
    if found:
        result.curves.append(Curve("rank-1", "distractors", "rate", list(found), list(found.values())))
    if genuine and total.impostors:
        result.curves.append(roc_curve(counted))
    return result


def _mates(rows: Tensor, people: Tensor) -> list[tuple[int, Tensor]]:
    """For each person the first row, and the scores ``[n, n]`` of the person's n rows with each other."""
    sizes = torch.bincount(people).tolist()
    firsts = np.cumsum([0, *sizes]).tolist()
    return [
        (first, product_nt(rows[first : first + size] * UNITS, rows[first : first + size]))
        for first, size in zip(firsts[:-1], sizes, strict=True)
        if size > 1
    ]


class _Part(NamedTuple):
    """Distractors that are read at once, and the number of ``sizes`` that end before them."""

    start: int
    stop: int
    segment: int


class _Scores:
    """Scores of probes with each other and with distractors, and each probe's largest with those."""

    def __init__(self, rows: Tensor, people: Tensor, stream: Stream, sizes: Sequence[int], progress: bool) -> None:
        self.rows, self.stream, self.sizes, self.progress = rows, stream, sorted(set(sizes)), progress
        self.among = AllPairs(rows, people, False)
        self.left = rows * UNITS
        self.largest: Tensor | None = None  # [segments, P], after the first pass
        ends = sorted({*self.sizes, len(stream)})
        self.parts = [
            _Part(start, min(start + _ROWS, end), segment)
            for segment, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
            for start in range(first, end, _ROWS)
        ]

    def scan(self, intervals: Sequence[Interval], histogram: bool) -> Pass:
        """A pass over all pairs."""
        probes, budget = self.among.scan(intervals, histogram), Budget(KEPT)
        shown = Progress("megaface", len(self.parts), self.progress)

        def work(numbers: Iterable[int]) -> tuple[Pass, Tensor]:
            found = new_pass(intervals, histogram, self.rows.dtype, budget)
            shape = (len(self.sizes) + 1, len(self.rows))
            largest = torch.full(shape, -math.inf, dtype=self.rows.dtype, device=self.rows.device)
            for number in numbers:
                part = self.parts[number]
                right = self.stream.unit(part.start, part.stop, self.rows)
                for start in range(0, len(self.rows), _PROBES):
                    scores = product_nt(self.left[start : start + _PROBES], right)
                    best = largest[part.segment, start : start + _PROBES]
                    torch.maximum(best, scores.amax(1), out=best)
                    found.impostors.add(scores)
                shown.step()
            return found, largest

        parts = run(self.rows.device, len(self.parts), work)
        if self.largest is None:
            self.largest = torch.stack([part[1] for part in parts]).amax(0).cummax(0).values
        return merge_passes([probes, *(part[0] for part in parts)])

    def rank1(self, size: int, mates: Sequence[tuple[int, Tensor]]) -> float:
        """The share of ordered pairs that beat the first ``size`` distractors."""
        assert self.largest is not None
        largest = self.largest[self.sizes.index(size)]
        hits = pairs = 0
        for first, scores in mates:
            beaten = scores > largest[first : first + len(scores), None]
            hits += int(beaten.sum()) - int(beaten.diagonal().sum())
            pairs += len(scores) * (len(scores) - 1)
        return hits / pairs if pairs else math.nan

    def sample(self) -> Sample:
        """Some probes with a few blocks of distractors, and the probes' own genuine pairs."""
        own = self.among.sample()
        starts = np.linspace(0, max(len(self.stream) - _BLOCK, 0), _BLOCKS).astype(int).tolist()
        blocks = [self.stream.unit(start, min(start + _BLOCK, len(self.stream)), self.rows) for start in sorted(set(starts))]
        distractors = torch.cat(blocks)
        chosen = torch.arange(0, len(self.rows), max(len(self.rows) // 2048, 1))
        counts: Array = sampled(self.rows, chosen, distractors, torch.arange(len(distractors)))
        total = counts.sum()
        return Sample(counts / max(total, 1), own.genuine, int(total), own.genuine_count, min(len(chosen), len(distractors)))
