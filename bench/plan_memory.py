"""Memory that a rank of the sharded head needs, counted tensor by tensor from what a training step allocates.

Bytes above those of the process, the backbone and its activations. A step has its peak at the end of the backward pass,
where the kept terms and the gradient are there together, or in the optimizer's step, which has temporaries of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from amsoftmax_kernels.backends import chunked, chunking
from amsoftmax_kernels.backends.budget import kept_classes
from amsoftmax_kernels.backends.parts import places_for
from amsoftmax_kernels.backends.triton import tiles as triton_configs
from amsoftmax_kernels.functional import DEFAULT_SAVE_BYTES
from amsoftmax_kernels.optim import UPDATE_ELEMENTS
from amsoftmax_kernels.sharded.sampling import draw_size

from . import estimate

OPTIMIZERS = {"sgd": 0, "momentum": 1, "adamw": 2}  # states of a centre's size
# On a CPU the products' own buffers, and small tensors that the allocator keeps: a few MB where they were measured.
_CPU_BUFFERS = 6 << 20
_STREAMS = 64  # partial sums of a row on a GPU, at most about this many


@dataclass(frozen=True)
class Run:
    """A training of the head: shapes, options, and where."""

    num_classes: int
    dim: int
    batch: int  # samples a rank
    ranks: int
    optimizer: str = "momentum"
    weight_decay: bool = False
    sample_rate: float = 1.0
    sampling_correction: bool = False
    rowwise_gradient: bool = False
    dtype: torch.dtype = torch.float32  # of the centres
    compute_dtype: torch.dtype = torch.float32
    save_bytes: int = DEFAULT_SAVE_BYTES
    device: str = "cpu"

    @property
    def rows(self) -> int:
        """B: the samples of all ranks, which every rank computes with."""
        return self.batch * self.ranks

    @property
    def classes(self) -> int:
        """Of the largest shard."""
        return -(-self.num_classes // self.ranks)

    @property
    def drawn(self) -> int:
        """Classes a step computes with."""
        return self.classes if self.sample_rate == 1 else self._draw_size

    @property
    def _draw_size(self) -> int:
        return draw_size(self.sample_rate, self.classes, self.rows, self.sampling_correction)

    @property
    def sampled(self) -> bool:
        return self.drawn < self.classes

    @property
    def kept(self) -> int:
        """Of them, those whose B×C terms are kept for the backward pass."""
        if self.device == "cpu":
            chunk = chunked._chunk_size(self.rows, self.dim, torch.device("cpu"))
            return kept_classes(self.rows, self.drawn, torch.float32, self.save_bytes, chunk)
        return min(chunking.kept_count(self.rows, self.drawn, self.dim, self.compute_dtype, self.save_bytes), self.drawn)


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for."""

    held: dict[str, int]  # between steps
    backward: dict[str, int]  # at the end of the backward pass
    update: dict[str, int]  # in the optimizer's step

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.held.values()) + max(sum(self.backward.values()), sum(self.update.values()))


def memory(run: Run) -> Memory:
    """What a rank needs."""
    states, rowwise = OPTIMIZERS[run.optimizer], run.sampled and run.rowwise_gradient
    whole = run.classes * run.dim * run.dtype.itemsize  # bytes of the shard's centres
    drawn = run.drawn * run.dim * run.dtype.itemsize
    held = {"centres": whole, f"optimizer state ({run.optimizer})": states * whole}
    backward, update = {}, {}
    if rowwise:
        held["gradient, kept between steps"] = whole
        # What was drawn of centres, gradient and state is updated in copies, a part at a time.
        part = min(drawn, UPDATE_ELEMENTS * run.dtype.itemsize)
        update["drawn rows of centres, gradient, state"] = (2 + states) * part
        if run.optimizer == "adamw" or run.weight_decay:
            update["optimizer's temporaries"] = part
    else:
        backward["gradient"] = update["gradient"] = whole
        update["optimizer's temporaries"] = 2 * whole if run.optimizer == "adamw" else whole if run.weight_decay else 0
    if run.sampled:
        backward["drawn rows of centres"] = drawn
        copies = 2 if run.sampling_correction else 1  # certain and drawn classes come apart and are put together
        backward["gradient of the drawn rows"] = copies * drawn
    backward |= _workspace(run)
    return Memory(held, backward, update)


def _workspace(run: Run) -> dict[str, int]:
    """What the backend allocates."""
    rows, dim, classes = run.rows, run.dim, run.drawn
    parts = {"1/‖w‖": 4 * classes}
    if run.device == "cpu":
        chunk = min(chunked._chunk_size(rows, dim, torch.device("cpu")), classes)
        parts["kept terms E"] = 4 * run.kept * rows
        parts["features of all ranks, their gradient"] = rows * dim * 48  # much of it in float64, for exact targets
        parts["chunks"] = 3 * 4 * chunk * (rows + dim) + _CPU_BUFFERS
        return parts
    compute, panel = run.compute_dtype.itemsize, chunking.panel_dtype(run.compute_dtype).itemsize
    width, all_kept = chunking.padded(dim), run.kept == classes
    chunk = min(chunking.chunk_size(rows, dim), chunking.padded(classes))
    parts["kept terms E"] = panel * rows * chunking.padded(run.kept)
    # Gathered; in float32; x̂; a∘x̂; E·ŵ; the gradient.
    parts["features of all ranks, their gradient"] = rows * width * (compute + 4 + compute + panel + 4 + 4)
    in_place = run.dtype == torch.float32 and width == dim
    finish = 0 if in_place else 4 * min(chunking.FINISH_ELEMENTS, classes * width)
    gradient, card = triton_configs.GRADIENT[9], estimate.CARDS["sm_90"]
    if panel == 2 and run.dtype == torch.float32 and width == dim and gradient.serves(rows, width):
        columns = gradient.columns_for(width)  # a program's tiles, all but the last, wait in memory
        finish = 4 * card.multiprocessors * gradient.classes * (-(-width // columns) - 1) * columns
    chunks, spans = -(-classes // chunk), chunking.forward_spans(rows, dim, classes, run.kept)
    # The terms of a chunk, made again in the backward pass, what the forward pass has left of ŵ, and another chunk of it
    # where the gradient has no room.
    made = chunks > 1 and dim * run.dtype.itemsize < width * compute
    again = max(map(len, spans)) * width * compute + chunk * (rows * panel + (width * compute if made else 0))
    parts["chunks"] = (0 if all_kept else again) + finish
    products = 4 * rows * width * places_for(chunks, rows * width, 4) if chunks > 1 else 0
    parts["partial sums"] = 8 * rows * _STREAMS * places_for(chunks, rows * _STREAMS) + products
    return parts


def smallest_ranks(run: Run, limit: int, most: int = 1 << 16) -> int | None:
    """The fewest ranks on which a run of this batch a rank fits ``limit`` bytes; None if ``most`` do not do."""
    for ranks in range(1, most + 1):
        if memory(replace(run, ranks=ranks)).total <= limit:
            return ranks
    return None
