"""Which classes the fused kernels take at a time, and the buffers that those pass through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import Problem
from .budget import kept_classes
from .kernels import Kernels

# Classes a chunk: what is not kept of E takes at most this many elements (256 classes at the least), and so does ŵ.
CHUNK_ELEMENTS = 1 << 27
# Classes of which dŵ is computed at a time, in elements: still in the L2 cache when the Jacobian reads it.
FINISH_ELEMENTS = 1 << 23
_ALIGN = 16  # elements: rows of operands start at multiples of 16 bytes, as bulk copies want


def panel_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of E."""
    return torch.float32 if compute_dtype == torch.float32 else torch.bfloat16


def kind(dtype: torch.dtype) -> str:
    """How operands of this dtype are multiplied; float32 as PyTorch's own setting says."""
    if dtype != torch.float32:
        return "half"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since PyTorch 2.9; follows the older setting, which must not be read beside it
        return "tf32" if matmul.fp32_precision == "tf32" else "float32"
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def padded(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // _ALIGN) * _ALIGN


def chunk_size(batch: int, dim: int) -> int:
    """Classes a chunk, a multiple of 256; of ŵ alone, without E, for a batch of 0."""
    return max(CHUNK_ELEMENTS // max(batch, dim, 1) // 256, 1) * 256


def finish_size(width: int) -> int:
    """Classes of which dŵ is computed at a time, where that is not done at once."""
    return max(FINISH_ELEMENTS // width // 256, 1) * 256


def kept_count(batch: int, num_classes: int, dim: int, compute_dtype: torch.dtype, save_bytes: int) -> int:
    """Classes of which E is kept: whole chunks, or all."""
    count = kept_classes(batch, padded(num_classes), panel_dtype(compute_dtype), save_bytes, chunk_size(batch, dim))
    return num_classes if count == padded(num_classes) else count


def forward_spans(batch: int, dim: int, num_classes: int, stored: int) -> list[range]:
    """The classes that the forward pass takes at a time.

    The first ``stored`` (whole chunks, or all), whose E goes to memory, by chunks; the others by as many of these as ŵ has
    room for, the last as many as there can be: its ŵ serves the backward pass too.
    """
    chunk = chunk_size(batch, dim)
    spans = [range(start, min(start + chunk, num_classes)) for start in range(0, stored, chunk)]
    together = _together(chunk, dim)
    start = stored
    while start < num_classes:
        chunks = -(-(num_classes - start) // chunk)
        stop = min(start + ((chunks - 1) % together + 1) * chunk, num_classes)
        spans.append(range(start, stop))
        start = stop
    return spans


def last_span(batch: int, dim: int, num_classes: int, stored: int) -> int:
    """Classes of the last of :func:`forward_spans`, some of them not stored; of sizes that may be symbolic."""
    chunk = chunk_size(batch, dim)
    left = num_classes - stored
    chunks = -(-left // chunk)
    return left - (chunks - min(chunks, _together(chunk, dim))) * chunk


def _together(chunk: int, dim: int) -> int:
    """Chunks that ŵ has room for."""
    return max(chunk_size(0, padded(dim)) // chunk, 1)


@dataclass
class Shard:
    """The classes in chunks, and the buffers for those that are not kept."""

    weight: Tensor
    compute_dtype: torch.dtype
    panel_dtype: torch.dtype  # of E, and of the products with it
    width: int  # D, padded
    chunk: int  # classes
    terms: Tensor  # [B, chunk] for what is not kept
    spare: Tensor | None = None  # [chunk, width], where ŵ has no other room

    @classmethod
    def of(cls, problem: Problem, terms_needed: bool) -> Shard:
        weight = problem.weight
        (batch, dim), num_classes = problem.features.shape, weight.shape[0]
        chunk, dtype = chunk_size(batch, dim), panel_dtype(problem.compute_dtype)
        classes = min(chunk, padded(num_classes))
        return cls(
            weight, problem.compute_dtype, dtype, padded(dim), chunk,
            weight.new_empty((batch, classes) if terms_needed else 0, dtype=dtype),
        )  # fmt: skip

    @property
    def chunks(self) -> list[range]:
        num_classes = self.weight.shape[0]
        return [range(start, min(start + self.chunk, num_classes)) for start in range(0, num_classes, self.chunk)]

    def room(self, classes: int) -> Tensor:
        """For ŵ of as many classes."""
        return self.weight.new_empty(classes, self.width, dtype=self.compute_dtype)

    def room_in(self, grad_weight: Tensor, classes: range) -> Tensor:
        """The same in the memory of these classes' gradient, which is written later; a spare buffer if it does not fit."""
        mine = grad_weight[classes.start : classes.stop]
        size = len(classes) * self.width * self.compute_dtype.itemsize
        # A single chunk may be replayed (:mod:`.replay`), where each memory is of one dtype.
        if self.weight.shape[0] > self.chunk and mine.numel() * mine.element_size() >= size and mine.data_ptr() % 16 == 0:
            return mine.view(-1).view(torch.uint8)[:size].view(self.compute_dtype).view(len(classes), self.width)
        if self.spare is None:
            self.spare = self.room(min(self.chunk, self.weight.shape[0]))
        return self.spare[: len(classes)]

    def prepare(
        self, kernels: Kernels, classes: range, w_hat: Tensor, inverse_norm: Tensor, unless_bounded: Tensor | None = None
    ) -> Tensor:
        """ŵ of these classes, ``[n, width]``, into the first rows of ``w_hat``, which are returned."""
        w_hat, mine = w_hat[: len(classes)], slice(classes.start, classes.stop)
        kernels.prepare_centres(self.weight[mine], w_hat, inverse_norm[mine], unless_bounded)
        return w_hat
