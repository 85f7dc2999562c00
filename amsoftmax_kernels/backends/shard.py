"""One shard of classes for plain PyTorch: its chunks, the streams of them, and the dtypes they are computed in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..arguments import accumulate_dtype
from . import Problem, host_scale, streams
from .budget import BOUNDED_SCALE
from .norms import scaled
from .products import product_nt
from .subcentres import keep_largest_
from .targets import TargetPair, Targets

# Elements of a chunk of classes and its panel, chunk·(B + D): what a core's caches hold; enough to fill a GPU elsewhere.
_CHUNK_ELEMENTS = {"cpu": 3 << 18}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 26
# Streams of chunks on a CPU: for as many cores there is work, and each stream has a sum [B, D] of its own.
_STREAMS, _STREAM_BYTES = (8, 16), 8 << 20
_SMALL = 1 << 28  # B·C·D of a problem whose operations are better split over threads than its chunks

LOG2E = math.log2(math.e)
_T = TypeVar("_T")


def stream_count(batch: int, dim: int, num_classes: int, device: torch.device, subcentres: int = 1) -> int:
    """Streams of chunks, each with a sum [B, D] of its own: their number depends on the shapes alone."""
    if device.type != "cpu" or batch * dim * num_classes < _SMALL:
        return 1
    least, most = _STREAMS
    chunks = -(-num_classes // chunk_size(batch, dim, num_classes, device, subcentres))
    return min(max(min(most, _STREAM_BYTES // max(4 * batch * dim, 1)), least), chunks)


def chunk_size(batch: int, dim: int, num_classes: int, device: torch.device, subcentres: int = 1) -> int:
    """Classes a chunk: a multiple of 64 that depends on the shapes and the kind of device alone.

    With sub-centres it is their number, of whole classes.
    """
    unit = 64 * subcentres
    size = -(-_chunk_size(batch, dim, device) // subcentres) * subcentres
    if device.type == "cpu" and num_classes <= 2 * size:
        return 2 * size  # all of them: see one_chunk.py
    if device.type != "cpu" or batch * dim * num_classes < _SMALL:
        return size
    # For a thread, twice what is best where operations are split: so many fewer times it waits for Python's lock.
    return min(2 * size, -(-num_classes // (_STREAMS[0] * unit)) * unit)  # and work for several threads


def _chunk_size(batch: int, dim: int, device: torch.device) -> int:
    """The largest whose operands stay where they should."""
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    return max(elements // (batch + dim) // 64, 1) * 64


def chunk_of(problem: Problem) -> int:
    """:func:`chunk_size` of a problem."""
    (B, D), C = problem.features.shape, problem.weight.shape[0]
    return chunk_size(B, D, C, problem.features.device, problem.subcentres)


def streams_of(problem: Problem) -> int:
    """:func:`stream_count` of a problem."""
    (B, D), C = problem.features.shape, problem.weight.shape[0]
    return stream_count(B, D, C, problem.features.device, problem.subcentres)


def panel_dtype(compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    # float16 cannot hold the range of E.
    dtype = accumulate_dtype(compute_dtype)
    return dtype if compute_dtype == dtype or device.type == "cpu" else torch.bfloat16


@dataclass
class Shard:
    """The inputs of both passes, in the dtypes the chunks are computed in."""

    weight: Tensor  # [C, D] as given
    x: Tensor  # [B, D] x̂ in the accumulate dtype, zero where the row is ignored
    operand: Tensor  # [B, D] what stands for the rows in the cosines' product
    scale: float | Tensor  # s, or ‖x‖ [B] without normalize_features
    dtype: torch.dtype  # accumulate dtype
    half: bool  # products have operands of half precision
    panel_dtype: torch.dtype  # of E in products
    bounded: bool  # no running maximum is needed
    interclass_filter: float
    subcentres: int
    chunk: int  # classes a chunk
    targets: Targets

    @classmethod
    def of(cls, pair: TargetPair, problem: Problem) -> Shard:
        weight, normalize, compute_dtype = problem.weight, problem.normalize_features, problem.compute_dtype
        dtype, device = accumulate_dtype(compute_dtype), weight.device
        half = compute_dtype != dtype and device.type != "cpu"
        known = host_scale(problem)  # that of a scale on a GPU is not read: it may be large
        norm = pair.x_norm.to(dtype)
        s: float | Tensor = norm + (norm - norm)  # NaN where it overflows
        if normalize:
            s = problem.scale.to(dtype) if known is None and problem.scale is not None else known or 0.0
        x = pair.x.to(dtype)
        chunk = chunk_of(problem)
        return cls(
            weight, x, x.to(compute_dtype) if half else times(x, s, LOG2E), s, dtype, half,
            panel_dtype=panel_dtype(compute_dtype, device),
            bounded=normalize and known is not None and known <= BOUNDED_SCALE,
            interclass_filter=problem.interclass_filter, subcentres=problem.subcentres, chunk=chunk,
            targets=Targets(problem.labels, weight.shape[0], chunk, problem.subcentres),
        )  # fmt: skip

    def chunks(self) -> int:
        return -(-self.weight.shape[0] // self.chunk) if len(self.x) else 0

    def centres(self, w: Tensor) -> Tensor:
        """A chunk of the weight in the accumulate dtype, contiguous ``[chunk, D]``."""
        if w.dtype == self.dtype and w.is_contiguous():
            return w
        return self.temporary("centres", *w.shape).copy_(w)

    def in_products(self, w: Tensor, inverse: Tensor) -> Tensor:
        """What stands for a chunk's centres in products. In float32 1/‖w‖ is multiplied into the panel instead."""
        return (w * inverse).to(self.operand.dtype) if self.half else w

    def logits(self, centres: Tensor, inverse: Tensor) -> Tensor:
        """log2(e) times a chunk's logits, ``[chunk, B]``, before the filter."""
        panel = product_nt(centres, self.operand)
        if self.half:  # x itself may be past float16's range
            return panel.mul_(self.scale * LOG2E)
        return panel.mul_(inverse)

    def keep_nearest_(self, panel: Tensor) -> None:
        """Leave out of a chunk's logits all but each class's largest."""
        if self.subcentres > 1:
            keep_largest_(panel, self.subcentres)

    def filter_(self, panel: Tensor) -> None:
        """Leave out of a chunk's logits those of a larger cosine than the filter allows."""
        if math.isfinite(self.interclass_filter):
            panel.masked_fill_(panel > self.scale * (self.interclass_filter * LOG2E), -math.inf)
            if self.interclass_filter < 0 and isinstance(self.scale, Tensor):  # ‖x‖ = 0: cosines of 0, and logits too
                panel.masked_fill_(self.scale == 0, -math.inf)

    def temporary(self, name: str, *shape: int) -> Tensor:
        """Of undefined values, in the accumulate dtype; on a CPU in memory that the thread keeps."""
        if self.weight.device.type == "cpu":
            return streams.workspace(name, shape, self.x)
        return self.x.new_empty(shape)


def prepared(problem: Problem, count: int) -> tuple[TargetPair, Shard]:
    def work() -> tuple[TargetPair, Shard]:
        pair = TargetPair.of(problem.features, problem.weight, problem.labels)
        return pair, Shard.of(pair, problem)

    return alone(count, work)


@dataclass
class Pieces:
    """What has a row a class, in chunks: to cut it once takes less than to cut it in every chunk."""

    weight: tuple[Tensor, ...]  # [chunk, D]
    inverse: tuple[Tensor, ...]  # [chunk, 1] 1/‖w‖
    kept: tuple[Tensor, ...]  # [chunk, B] the terms that are kept, of the first chunks

    @classmethod
    def of(cls, shard: Shard, inverse_norm: Tensor, kept: Tensor) -> Pieces:
        chunk = shard.chunk
        kept_pieces = kept.split(chunk) if len(kept) else ()
        return cls(shard.weight.split(chunk), inverse_norm[:, None].split(chunk), kept_pieces)

    def measured(self, shard: Shard, index: int) -> tuple[Tensor, Tensor]:
        """A chunk's centres, scaled where float32 wants it, and their 1/‖w‖; the given ones' is written down."""
        rows = scaled(shard.centres(self.weight[index]))
        inverse = rows.inverse[:, None]
        self.inverse[index].copy_(inverse if rows.power is None else inverse * rows.power[:, None])
        return rows.rows, inverse

    def centres(self, shard: Shard, index: int, usual: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same from what was written down where all norms are usual, and the powers that the centres are scaled by."""
        w = shard.centres(self.weight[index])
        if usual:
            return w, self.inverse[index], None
        rows = scaled(w)
        return rows.rows, rows.inverse[:, None], None if rows.power is None else rows.power[:, None]


def times(x: Tensor, scale: float | Tensor, factor: float) -> Tensor:
    """Rows ``x [B, D]`` times a scale for all or for each."""
    scale = scale * factor
    return x * (scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale)


def alone(count: int, work: Callable[[], _T]) -> _T:
    """Vectors and [B, D] matrices beside chunks on threads: by one thread too."""
    return work() if count == 1 else streams.alone(work)
