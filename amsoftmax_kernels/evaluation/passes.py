"""Passes over tiles of cosines: all pairs of one set of rows, or of a few rows with many that are streamed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..backends import streams
from ..backends.products import product_nt
from . import counting
from .counting import BINS, KEPT, NO_SCORE, UNITS, Array, Budget, Interval, Tally
from .search import Pass, Sample

T = TypeVar("T")
_SAMPLED = (2048, 8192)  # rows of each side of a sample, at least and at most
_APART = 8  # places that genuine pairs of a sample are apart, at most


class Progress:
    """A line on the standard error with the time left, where a pass takes longer than a few seconds.

    Args:
        name: of the work.
        total: number of tiles.
        shown: whether to write at all.
    """

    def __init__(self, name: str, total: int, shown: bool) -> None:
        self._name, self._total, self._shown = name, total, shown
        self._done, self._lock = 0, threading.Lock()
        self._start = self._drawn = time.monotonic()

    def step(self) -> None:
        if not self._shown:
            return
        with self._lock:
            self._done += 1
            now = time.monotonic()
            if now - self._start < 3 or (now - self._drawn < 1 and self._done < self._total):
                return
            self._drawn = now
            left = round((now - self._start) * (self._total - self._done) / self._done)
            line = f"{self._name}: {self._done / self._total:4.0%}, {left // 60}:{left % 60:02d} left"
            terminal = sys.stderr.isatty()
            end = "\n" if self._done == self._total or not terminal else ""
            print(f"\r{line}" if terminal else line, end=end, file=sys.stderr, flush=True)


def new_pass(intervals: Sequence[Interval], histogram: bool, dtype: torch.dtype, budget: Budget) -> Pass:
    return Pass(*(Tally(intervals, histogram, dtype, budget) for _ in range(2)))


def merge_passes(parts: Sequence[Pass]) -> Pass:
    """The first, with what the others have counted."""
    for part in parts[1:]:
        for mine, theirs in zip(parts[0], part, strict=True):
            mine.merge(theirs)
    return parts[0]


class AllPairs:
    """All pairs of rows, each once, never a row with itself.

    Args:
        rows: ``[N, D]`` unit rows, in the order of their labels, so that few tiles have genuine pairs.
        labels: ``[N]`` numbers of people from 0 on, on the CPU, sorted.
        progress: whether to show it.
    """

    def __init__(self, rows: Tensor, labels: Tensor, progress: bool) -> None:
        self.rows, self.labels, self.progress = rows, labels.numpy().astype(np.int32), progress
        self.size = 768 if rows.device.type == "cpu" else 8192

    def scan(self, intervals: Sequence[Interval], histogram: bool) -> Pass:
        """A pass over all tiles of the lower triangle."""
        blocks = -(-len(self.rows) // self.size)
        tiles = [(first, second) for first in range(blocks) for second in range(first + 1)]
        progress = Progress("verification", len(tiles), self.progress)
        budget = Budget(KEPT)

        def work(numbers: Iterable[int]) -> Pass:
            found = new_pass(intervals, histogram, self.rows.dtype, budget)
            for number in numbers:
                genuine, impostors = self._tile(*tiles[number])
                if genuine is not None:
                    found.genuine.add(genuine)
                found.impostors.add(impostors)
                progress.step()
            return found

        return merge_passes(run(self.rows.device, len(tiles), work))

    def _tile(self, first: int, second: int) -> tuple[Tensor | None, Tensor]:
        """Scores of the genuine and of the impostor pairs between two blocks of rows."""
        size = self.size
        left, right = slice(first * size, (first + 1) * size), slice(second * size, (second + 1) * size)
        scores = product_nt(self.rows[left] * UNITS, self.rows[right])
        if first != second and self.labels[right][-1] < self.labels[first * size]:
            return None, scores
        same = self.labels[left, None] == self.labels[None, right]
        if not counting.in_numpy(scores):
            mask = torch.from_numpy(same).to(scores.device)
            if first == second:
                scores.masked_fill_(torch.ones_like(mask).triu_(), NO_SCORE)
            return scores[mask], scores.masked_fill_(mask, NO_SCORE)
        array = scores.numpy()
        if first == second:
            np.copyto(array, NO_SCORE, where=np.tri(len(array), dtype=np.bool_).T)
        genuine = torch.from_numpy(array[same])
        np.copyto(array, NO_SCORE, where=same)
        return genuine, scores

    def sample(self) -> Sample:
        """Impostor pairs of some rows with some others, and genuine pairs of rows a few places apart."""
        count = len(self.rows)
        step = max(count // min(max(count // 16, _SAMPLED[0]), _SAMPLED[1]), 1)  # under a hundredth of the pairs
        chosen = [torch.arange(start, count, step) for start in (0, step // 2)]
        impostors = sampled(self.rows, chosen[0], self.rows, chosen[1], self.labels)
        apart = range(1, min(_APART + 1, count))
        found = [
            each for part in run(self.rows.device, len(apart), lambda n: [self._apart(apart[i]) for i in n]) for each in part
        ]
        genuine = sum((each[0] for each in found), np.zeros(BINS))
        number = sum(each[1] for each in found)
        counts = int(impostors.sum()), number
        return Sample(impostors / max(counts[0], 1), genuine / max(genuine.sum(), 1), *counts, len(chosen[0]))

    def _apart(self, places: int) -> tuple[Array, int]:
        """Genuine pairs so many places apart: the histogram of some, weighted by all that a person has, and their number."""
        first = np.flatnonzero(self.labels[places:] == self.labels[:-places])
        first = first[:: len(first) // _SAMPLED[1] + 1]
        sizes = np.bincount(self.labels)[self.labels[first]]
        index = torch.from_numpy(first).to(self.rows.device)
        scores = (self.rows[index] * self.rows[index + places]).sum(1) * UNITS
        weights = torch.from_numpy(sizes * (sizes - 1.0) / np.minimum(sizes - 1.0, _APART)).double()
        return torch.bincount(scores.cpu().to(torch.int64) + BINS // 2, weights, BINS).numpy(), len(first)


def sampled(first: Tensor, rows: Tensor, second: Tensor, columns: Tensor, labels: Array | None = None) -> Array:
    """The histogram of the scores of some rows with some others; with labels, of those that differ."""
    parts, right = rows.split(256), second[columns.to(second.device)]

    def work(numbers: Iterable[int]) -> Array:
        counts = np.zeros(BINS)
        for number in numbers:
            scores = product_nt(first[parts[number].to(first.device)] * UNITS, right)
            if labels is not None:
                same = torch.from_numpy(labels[parts[number].numpy(), None] == labels[None, columns.numpy()])
                scores.masked_fill_(same.to(scores.device), NO_SCORE)
            counts += torch.bincount(scores.view(-1).to(torch.int16).add_(BINS // 2), minlength=BINS).cpu().numpy()
        return counts

    total: Array = np.sum(run(first.device, len(parts), work), 0)
    total[0] = 0  # NO_SCORE
    return total


def run(device: torch.device, count: int, work: Callable[[Iterable[int]], T]) -> list[T]:
    """``work`` on the tiles of each thread; on a GPU, on all."""
    return streams.run(torch.get_num_threads() if device.type == "cpu" else 1, count, work)


def alone(device: torch.device, work: Callable[[], T]) -> T:
    """``work()`` on one thread: those that share an operation spin for a while, where a pass wants the cores."""
    return streams.alone(work) if device.type == "cpu" else work()
