"""Memory that a rank of the sharded head needs, counted tensor by tensor from what a training step allocates.

Bytes above those of the process, the backbone and its activations. A step has its peak at the end of the backward pass,
where the kept terms and the gradient are there together, or in the optimizer's step, which has temporaries of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from amsoftmax_kernels.autograd import DEFAULT_SAVE_BYTES
from amsoftmax_kernels.backends import chunking, shard, update
from amsoftmax_kernels.backends.budget import kept_classes
from amsoftmax_kernels.backends.subcentres import Columns
from amsoftmax_kernels.backends.triton import tiles as triton_tiles
from amsoftmax_kernels.sharded.sampling import draw_size

OPTIMIZERS = {"sgd": 0, "momentum": 1, "adamw": 2, "fused-sgd": 1, "fused-adamw": 2}  # states of a centre's size
# On a CPU the products' own buffers, and small tensors that the allocator keeps: a few MB where they were measured.
_CPU_BUFFERS = 6 << 20


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
    dtype: torch.dtype = torch.float32  # of the centres
    compute_dtype: torch.dtype = torch.float32
    save_bytes: int = DEFAULT_SAVE_BYTES
    device: str = "cpu"
    generation: int = 9  # of a GPU: its compute capability's major number
    subcentres: int = 1  # centres a class; below, classes are counted by their centres

    @property
    def rows(self) -> int:
        """B: the samples of all ranks, which every rank computes with."""
        return self.batch * self.ranks

    @property
    def classes(self) -> int:
        """Of the largest shard."""
        return -(-self.num_classes // self.ranks) * self.subcentres

    @property
    def drawn(self) -> int:
        """Classes a step computes with."""
        return self.classes if self.sample_rate == 1 else self._draw_size

    @property
    def _draw_size(self) -> int:
        classes = self.classes // self.subcentres
        return draw_size(self.sample_rate, classes, self.rows, self.sampling_correction) * self.subcentres

    @property
    def sampled(self) -> bool:
        return self.drawn < self.classes

    @property
    def fused(self) -> bool:
        """Whether centres are updated in the backward pass, so that there is no gradient of their size."""
        return self.optimizer.startswith("fused")

    @property
    def columns(self) -> int:
        """Of E: those classes, on a GPU with their centres padded to a power of two."""
        return self.drawn if self.device == "cpu" else Columns(self.subcentres).count(self.drawn)

    @property
    def kept(self) -> int:
        """Of them, those that are kept for the backward pass."""
        if self.device == "cpu":
            chunk = shard.chunk_size(self.rows, self.dim, self.drawn, torch.device("cpu"), self.subcentres)
            return kept_classes(self.rows, self.drawn, torch.float32, self.save_bytes, chunk)
        count = chunking.kept_count(self.rows, self.columns, self.dim, self.compute_dtype, self.save_bytes)
        return min(count, self.columns)


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
    states = OPTIMIZERS[run.optimizer]
    whole = run.classes * run.dim * run.dtype.itemsize  # bytes of the shard's centres
    drawn = run.drawn * run.dim * run.dtype.itemsize
    held = {"centres": whole, f"optimizer state ({run.optimizer})": states * whole}
    backward, step = {}, {}
    if not run.fused:
        backward["gradient"] = step["gradient"] = whole
        step["optimizer's temporaries"] = 2 * whole if run.optimizer == "adamw" else whole if run.weight_decay else 0
    if run.sampled:
        backward["drawn rows of centres"] = drawn
    if run.sampled and not run.fused:
        copies = 2 if run.sampling_correction else 1  # certain and drawn classes come apart and are put together
        backward["gradient of the drawn rows"] = copies * drawn
    backward |= _workspace(run)
    return Memory(held, backward, step)


def _workspace(run: Run) -> dict[str, int]:
    """What the backend allocates."""
    rows, dim, classes = run.rows, run.dim, run.drawn
    parts = {"1/‖w‖": 4 * classes}
    if run.device == "cpu":
        chunk = shard.chunk_size(rows, dim, classes, torch.device("cpu"), run.subcentres)
        parts["kept terms E"] = 4 * run.kept * rows
        parts["features of all ranks, their gradient"] = rows * dim * 48  # much of it in float64, for exact targets
        count = shard.stream_count(rows, dim, classes, torch.device("cpu"), run.subcentres)
        parts["sums of the streams"] = count * rows * (4 * dim + 32)
        threads = max(torch.get_num_threads() // run.ranks, 1)  # ranks share the machine
        # E, its terms; the gradient before and after the Jacobian, converted centres.
        widths = 2 * rows + dim * (2 if run.dtype == torch.float32 else 3)
        parts["chunks, one a thread"] = threads * 4 * chunk * widths + _CPU_BUFFERS
        if run.fused and (run.sampled or run.dtype != torch.float32):  # copies of centres and state
            block = 4 * min(update.ELEMENTS, classes * dim)
            parts["classes that are updated"] = threads * (3 + OPTIMIZERS[run.optimizer]) * block
        return parts
    compute, panel = run.compute_dtype.itemsize, chunking.panel_dtype(run.compute_dtype).itemsize
    width, again = chunking.padded(dim), run.kept < run.columns
    chunk = min(chunking.chunk_size(rows, dim), chunking.padded(run.columns))
    parts["kept terms E"] = panel * rows * chunking.padded(run.kept)
    # Gathered; in float32; a∘x̂; E·ŵ, and the part of a chunk that is added to it; the gradient. Computed again: x̂, and E·ŵ
    # in a copy, as what the forward pass saved stays as it is.
    parts["features of all ranks, their gradient"] = rows * width * (compute + 4 + panel + 4 + 4 + 4)
    if again:
        parts["features of all ranks, their gradient"] += rows * width * (compute + 4)
        # E and ŵ of one chunk; ŵ in E's dtype too where E cannot have its own.
        converted = panel if run.compute_dtype == torch.float16 else 0
        parts["E and ŵ of a chunk"] = chunk * (rows * panel + width * (compute + converted))
    padded = chunk // Columns(run.subcentres).group * run.subcentres if run.columns > classes else 0
    if padded:
        parts["ŵ of a chunk before it is padded"] = padded * width * compute
    gradient = triton_tiles.GRADIENT.get(run.generation)  # Hopper's: a chunk's gradient at once, without a buffer
    at_once = gradient is not None and panel == 2 and width == dim and gradient.serves(width) and not padded
    in_place = run.dtype == torch.float32 and width == dim and not padded
    if run.fused:
        parts["targets' part, and which classes have one"] = 4 * classes + rows * dim * (4 + run.dtype.itemsize)
    if run.fused or not (at_once or in_place):
        copies = 2 if padded else 1
        parts["gradient of a few thousand classes"] = copies * 4 * min(chunking.finish_size(width), chunk) * width
    return parts


def smallest_ranks(run: Run, limit: int, most: int = 1 << 16) -> int | None:
    """The fewest ranks on which a run of this batch a rank fits ``limit`` bytes; None if ``most`` do not do."""
    for ranks in range(1, most + 1):
        if memory(replace(run, ranks=ranks)).total <= limit:
            return ranks
    return None
