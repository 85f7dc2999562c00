"""Parts of each row's sum and maximum that the cosine kernel leaves, chunk by chunk of the classes.

Each chunk has a place of its own while that takes little memory. Where there are more chunks, full places are added up into
the first, in a fixed order, so that memory does not grow with rows times classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import Kernels

# Of each. 10 million classes in a batch of 4,096 have some 5 million sums.
PART_BYTES = 1 << 26


def places_for(chunks: int, elements: int) -> int:
    """Chunks whose parts, of so many elements of 8 bytes, stand beside one another."""
    return min(chunks, max(PART_BYTES // max(elements * 8, 1), 2))


class Sums:
    """Float64 ``[streams, B]`` a chunk."""

    def __init__(self, like: Tensor, chunks: int, streams: int, batch: int) -> None:
        self._parts = like.new_empty((places_for(chunks, streams * batch), streams, batch), dtype=torch.float64)
        self._used = 0

    def next(self) -> Tensor:
        """The next chunk's, to be written whole."""
        if self._used == self._parts.shape[0]:
            total = self._parts.sum((0, 1))
            self._parts[0].zero_()
            self._parts[0, 0] = total
            self._used = 1
        self._used += 1
        return self._parts[self._used - 1]

    @property
    def parts(self) -> Tensor:
        return self._parts[: self._used]


class Maxima:
    """Float32 cosines ``[streams, B]`` a chunk, and their classes."""

    def __init__(self, kernels: Kernels, like: Tensor, labels: Tensor, chunks: int, streams: int, batch: int) -> None:
        shape = (places_for(chunks, streams * batch), streams, batch)
        self._kernels = kernels
        self._best, self._classes = like.new_empty(shape, dtype=torch.float32), labels.new_empty(shape)
        self._used = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """The next chunk's, to be written whole."""
        if self._used == self._best.shape[0]:
            best, classes = self._best.new_empty(self._best.shape[2]), self._classes.new_empty(self._best.shape[2])
            self._kernels.reduce_best(self._best, self._classes, best, classes)
            self._best[0].fill_(-torch.inf)
            self._classes[0].fill_(-1)
            self._best[0, 0], self._classes[0, 0] = best, classes
            self._used = 1
        self._used += 1
        return self._best[self._used - 1], self._classes[self._used - 1]

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        return self._best[: self._used], self._classes[: self._used]
