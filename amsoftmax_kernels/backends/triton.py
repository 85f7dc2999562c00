"""The decomposition on Triton kernels: CUDA GPUs of compute capability 8.0 and up, or a CPU under TRITON_INTERPRET=1.

    forward     for each chunk of classes: ŵ; E = 2^(log2(e)·logit − shift) and z in one kernel; Eŵ by a library product
    backward    for each chunk: E kept, or ŵ and E again; dŵ = Eᵀ(a∘x̂) by a library product, then the Jacobian while
                dŵ is in the cache; dx and the targets' part of dw by one small kernel

Normalization is a pass of its own (6 bytes a weight) and not part of the fused kernel: there each block of rows would read
the float32 centres again out of the L2 cache, at twice the bytes of ŵ, and the L2 cache is what bounds that kernel.

Eŵ needs no gradient from above, so it is made in the forward pass, where E and ŵ are at hand: the backward pass of a kept
E then reads neither ŵ nor x̂. Where E is computed again, it goes through a chunk of memory: 8 bytes a logit of traffic
beside 8·D flops. Fused dx̂ and dŵ kernels would save it, but read their operands from the L2 cache half as efficiently as a
library product does (a tile of 64 x 512 carries 58 flops a byte, one of 128 x 256 carries 85).

Logits past scale 64 take a first pass for the row maxima alone (also without feature normalization), so that E has one
shift a row and stays a plain matrix. E is bfloat16 for half-precision operands: float16 cannot hold its range.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..arguments import no_autocast
from ..operators import GRADS_SCHEMA, LABELS_SCHEMA, PROBLEM_SCHEMA, is_traced, register
from . import Forward, Problem
from .budget import BOUNDED_SCALE, kept_classes
from .triton_configs import CHUNK_ELEMENTS, FINISH_ELEMENTS, Config, config, kind

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from . import triton_kernels as kernels
except ImportError as error:
    _import_error: str | None = f"{error}; pip install triton"
else:
    _import_error = None

_MIN_CAPABILITY = (8, 0)
_INTERPRETED = Config(rows=16, classes=32, depth=16, stages=1, warps=4, bulk=True, split=True)
_ALIGN = 16  # elements: rows of operands start at multiples of 16 bytes, as bulk copies want


def unavailable_reason() -> str | None:
    if _import_error is not None:
        return _import_error
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA GPU that this PyTorch can use (TRITON_INTERPRET=1 emulates one, slowly)"
    if torch.version.hip is not None:
        return "ROCm has not been tried"
    reason = _build_failure()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        return f"needs compute capability 8.0 or newer, but this GPU has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _build_failure() -> str | None:
    """Why Triton cannot launch here: it builds its driver with a C compiler when it is first needed."""
    try:
        _ = triton.runtime.driver.active.utils
    except Exception as error:  # whatever that compiler or the driver says
        return (
            f"Triton cannot build its launcher ({type(error).__name__}: {error}); it needs a C compiler and Python's headers"
        )
    return None


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cpu":  # the interpreter multiplies bfloat16 matrices wrongly
        return _interpreted() and dtype in (torch.float32, torch.float16)
    return (
        device.type == "cuda"
        and not _interpreted()
        and dtype in (torch.float32, torch.float16, torch.bfloat16)
        and _capability(device) >= _MIN_CAPABILITY
    )


def canonical_labels(labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    if labels.device.type == "cpu":  # whose values are checked
        return arguments.canonical_labels(labels, num_classes, ignore_index)
    op: Any = torch.ops.amsoftmax_kernels.triton_canonical_labels if is_traced(labels) else _labels
    result: tuple[Tensor, Tensor] = op(labels, num_classes, ignore_index)
    return result


def forward(problem: Problem, save_bytes: int, predict: bool, need_rows: bool) -> Forward:
    op = torch.ops.amsoftmax_kernels.triton_forward if is_traced(problem.features) else _forward
    return Forward(*op(*problem, save_bytes, predict, need_rows))


def constant_margin(
    problem: Problem, saved: Forward, num_rows: Tensor, margin: float, reduction: str, need_scale: bool
) -> tuple[Tensor, Tensor]:
    op: Any = torch.ops.amsoftmax_kernels.triton_constant_margin if is_traced(saved.z) else _constant_margin
    result: tuple[Tensor, Tensor] = op(
        saved.z, saved.shift, saved.cosine, saved.norm, problem.labels, num_rows, problem.scale,
        problem.weight.shape[0], problem.normalize_features, margin, reduction, need_scale,
    )  # fmt: skip
    return result


def backward(
    problem: Problem,
    saved: Forward,
    row_factor: Tensor,
    grad_cosine: Tensor,
    grad_norm: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    op: Any = torch.ops.amsoftmax_kernels.triton_backward if is_traced(problem.features) else _backward
    grads: tuple[Tensor, Tensor, Tensor] = op(
        *problem, saved.shift, saved.cosine, saved.norm, saved.inverse_norm, saved.kept, saved.rows,
        row_factor, grad_cosine, grad_norm, *needs,
    )  # fmt: skip
    return grads


@dataclass
class _Shard:
    """The classes in chunks, and the buffers that each chunk passes through."""

    problem: Problem
    config: Config
    operand_dtype: torch.dtype  # of x̂ and ŵ
    panel_dtype: torch.dtype  # of E, and of the products with it
    width: int  # D, padded
    chunk: int  # classes
    w_hat: Tensor  # [chunk, width]
    terms: Tensor  # [B, chunk] for what is not kept
    programs: tuple[int, int]  # blocks of rows, streams of classes

    @classmethod
    def of(cls, problem: Problem, w_hat_needed: bool, terms_needed: bool) -> _Shard:
        weight = problem.weight
        (batch, dim), num_classes = problem.features.shape, weight.shape[0]
        chosen = _config(weight.device, problem.compute_dtype)
        width, chunk = _padded(dim, _ALIGN), _chunk_size(batch, dim)
        panel_dtype = _panel_dtype(problem.compute_dtype)
        blocks = -(-batch // chosen.rows)
        classes = min(chunk, _padded(num_classes, _ALIGN))
        return cls(
            problem, chosen, problem.compute_dtype, panel_dtype, width, chunk,
            weight.new_empty((classes, width) if w_hat_needed else 0, dtype=problem.compute_dtype),
            weight.new_empty((batch, classes) if terms_needed else 0, dtype=panel_dtype),
            (blocks, _streams(_multiprocessors(weight.device) * chosen.resident, blocks, -(-classes // chosen.classes))),
        )  # fmt: skip

    @property
    def tf32(self) -> bool:
        return kind(self.operand_dtype) == "tf32"

    @property
    def chunks(self) -> range:
        return range(0, self.problem.weight.shape[0], self.chunk)

    def classes(self, start: int) -> int:
        return min(self.chunk, self.problem.weight.shape[0] - start)

    def prepare(self, start: int, inverse_norm: Tensor, only_unbounded: Tensor | None = None) -> Tensor:
        """ŵ of a chunk, ``[n, width]``; undefined if s, given on the device, turns out to need no shift."""
        weight, n = self.problem.weight, self.classes(start)
        block, rows = _rows_a_program(self.width)
        kernels.prepare_centres[(-(-n // rows),)](
            weight[start:],
            *weight.stride(),
            self.w_hat,
            inverse_norm[start:],
            inverse_norm if only_unbounded is None else only_unbounded,
            n,
            weight.shape[1],
            self.width,
            only_unbounded is not None,
            self.tf32,
            rows,
            block,
        )
        return self.w_hat[:n]

    def cosine_exp(
        self,
        start: int,
        x_hat: Tensor,
        w_hat: Tensor,
        factor: Tensor,
        shift: Tensor | None,
        terms: Tensor | None = None,
        z: Tensor | None = None,
        best: Tensor | None = None,
        best_class: Tensor | None = None,
        only_unbounded: bool = False,
    ) -> None:
        """Piece 2 on one chunk, into whichever of ``terms``, ``z`` and ``best`` are given."""
        c, empty = self.config, factor
        stored = x_hat if terms is None else terms
        operands: list[Any] = [x_hat, w_hat, stored]
        if c.bulk:
            columns = c.classes // 2 if c.split else c.classes
            tiles = ([c.rows, c.depth], [c.classes, c.depth], [c.rows, columns])
            operands = [TensorDescriptor.from_tensor(*each) for each in zip(operands, tiles, strict=True)]
        kernels.cosine_exp[self.programs](
            *operands,
            self.problem.labels, factor, factor if shift is None else shift,
            empty if z is None else z, empty if best is None else best, empty if best_class is None else best_class,
            len(x_hat), len(w_hat), self.width, stored.shape[1], stored.stride(0), start, self.problem.interclass_filter,
            ONLY_UNBOUNDED=only_unbounded, SHIFT=shift is not None, SUM=z is not None, STORE=terms is not None,
            BEST=best is not None, FILTER=self.problem.interclass_filter <= 1, BULK=c.bulk,
            PRECISION="tf32" if self.tf32 else "ieee",
            BLOCK_B=c.rows, BLOCK_C=c.classes, BLOCK_D=c.depth, SPLIT=c.split, FLATTEN=c.bulk,
            num_stages=c.stages, num_warps=c.warps,
        )  # fmt: skip


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (save_bytes, predict, need_rows) = Problem(*arguments[:7]), arguments[7:]
    features, weight, labels, scale, normalize = problem[:5]
    (B, D), C = features.shape, weight.shape[0]
    with no_autocast(features.device), _on(features.device):
        kept_count = _kept(B, C, D, problem.compute_dtype, save_bytes)
        shard = _Shard.of(problem, True, terms_needed=need_rows and kept_count < C)
        z, cosine, norm, factor = (features.new_empty(B, dtype=torch.float32) for _ in range(4))
        shift = torch.zeros_like(z)
        inverse_norm = features.new_empty(C, dtype=torch.float32)
        kept = features.new_empty(B, _padded(kept_count, _ALIGN), dtype=shard.panel_dtype)
        rows = features.new_empty((B, shard.width) if need_rows else 0, dtype=torch.float32)
        best = features.new_empty(B if predict else 0, dtype=torch.float32)
        best_class = labels.new_empty(B if predict else 0)
        results = (z, shift, cosine, norm, inverse_norm, kept, z.new_empty(0), rows, best, best_class)
        if B == 0:
            return results
        x_hat = features.new_empty(B, shard.width, dtype=shard.operand_dtype)
        s, on_device = _scale(scale, normalize)
        kernels.prepare_rows[(B,)](
            features, *features.stride(), weight, *weight.stride(), labels, s,
            x_hat, cosine, norm, factor, C, D, shard.width, on_device, normalize,
            shard.tf32, triton.next_power_of_2(shard.width),
        )  # fmt: skip
        bounded = _bounded(s, normalize)
        streams = shard.programs[1]
        parts = len(shard.chunks) * streams
        z_parts = features.new_empty(len(shard.chunks), streams, B, dtype=torch.float64)
        if not bounded or predict:
            best_parts = features.new_empty(z_parts.shape, dtype=torch.float32)
            class_parts = labels.new_empty(z_parts.shape)
        one_chunk = len(shard.chunks) == 1
        w_hat = shard.prepare(0, inverse_norm) if one_chunk else None
        if not bounded:
            unless = s if isinstance(s, Tensor) else None
            for i, start in enumerate(shard.chunks):
                shard.cosine_exp(
                    start, x_hat, shard.prepare(start, inverse_norm, unless) if w_hat is None else w_hat,
                    factor, None, best=best_parts[i], best_class=class_parts[i], only_unbounded=True,
                )  # fmt: skip
            kernels.reduce_best[(-(-B // 32),)](
                best_parts, class_parts, factor, shift, shift, shift, B, parts, SHIFT=True, ROWS=32, PARTS=32
            )
        for i, start in enumerate(shard.chunks):
            w_hat = w_hat if one_chunk and w_hat is not None else shard.prepare(start, inverse_norm)
            keep = start < kept_count
            terms = kept[:, start : start + shard.chunk] if keep else shard.terms
            shard.cosine_exp(
                start, x_hat, w_hat, factor, None if bounded else shift, terms=terms if keep or need_rows else None,
                z=z_parts[i], best=best_parts[i] if predict else None, best_class=class_parts[i] if predict else None,
            )  # fmt: skip
            if need_rows:
                product = _product(terms[:, : len(w_hat)], w_hat.to(shard.panel_dtype), rows if i == 0 else None)
                if i > 0:
                    rows += product
        kernels.reduce_sums[(-(-B // 32),)](z_parts, labels, z, B, parts, ROWS=32, PARTS=32)
        if predict:
            kernels.reduce_best[(-(-B // 32),)](
                best_parts, class_parts, factor, best, best_class, shift, B, parts, SHIFT=False, ROWS=32, PARTS=32
            )
        return results


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, saved, grads, needs = Problem(*arguments[:7]), arguments[7:13], arguments[13:16], arguments[16:]
    features, weight, labels, scale, normalize = problem[:5]
    shift, cosine, norm, inverse_norm, kept, rows = saved
    row_factor, grad_cosine, grad_norm = (None if each is None else each.contiguous() for each in grads)
    need_features, need_weight, need_scale = needs
    (B, D), C = features.shape, weight.shape[0]
    with no_autocast(features.device), _on(features.device):
        grad_features = features.new_empty((B, D) if need_features else 0)
        grad_weight = weight.new_empty((C, D) if need_weight else 0)
        grad_scale = scale.new_zeros(() if need_scale else 0)
        if B == 0:
            return grad_features, grad_weight.zero_(), grad_scale
        kept_count = min(kept.shape[1], C)
        recompute = need_weight and kept_count < C
        shard = _Shard.of(problem, recompute, recompute)
        s, on_device = _scale(scale, normalize)
        x_factored = features.new_empty(B, shard.width, dtype=shard.panel_dtype)
        x_hat = features.new_empty((B, shard.width) if recompute else 0, dtype=shard.operand_dtype)
        factor = features.new_empty(B if recompute else 0, dtype=torch.float32)
        block = triton.next_power_of_2(shard.width)
        if need_weight:
            kernels.factor_rows[(B,)](
                features, *features.stride(), labels, norm, row_factor, s, x_factored, x_hat, factor,
                D, shard.width, on_device, normalize, recompute, shard.tf32, block,
            )  # fmt: skip
            for start in shard.chunks:
                if start < kept_count:
                    terms = kept[:, start : start + shard.chunk]
                else:
                    terms = shard.terms
                    w_hat = shard.prepare(start, inverse_norm)
                    shard.cosine_exp(start, x_hat, w_hat, factor, None if _bounded(s, normalize) else shift, terms=terms)
                _grad_centres(shard, start, terms, x_factored, inverse_norm, grad_weight)
        if need_features or need_weight or need_scale:
            parts = features.new_empty(B if need_scale else 0, dtype=torch.float64)
            kernels.finish_rows[(B,)](
                features, *features.stride(), weight, *weight.stride(), labels, norm, cosine, s,
                row_factor, grad_cosine, row_factor if grad_norm is None else grad_norm, rows,
                grad_features, grad_weight, parts, B, C, D, shard.width,
                on_device, normalize, grad_norm is not None, need_features, need_weight, need_scale and normalize,
                block, 1024,
            )  # fmt: skip
            if need_scale and normalize:
                grad_scale = parts.sum().to(scale.device, scale.dtype)
        return grad_features, grad_weight, grad_scale


def _grad_centres(
    shard: _Shard, start: int, terms: Tensor, x_factored: Tensor, inverse_norm: Tensor, grad_weight: Tensor
) -> None:
    """The gradient of a chunk's centres but for the targets' part, a few thousand classes at a time."""
    weight, dim, width = shard.problem.weight, shard.problem.weight.shape[1], shard.width
    block, rows = _rows_a_program(width)
    piece = max(FINISH_ELEMENTS // width // 256, 1) * 256
    in_place = grad_weight.dtype == torch.float32 and dim == width
    count = shard.classes(start)
    buffer = x_factored.new_empty(0 if in_place else min(piece, count), width, dtype=torch.float32)
    for first in range(0, count, piece):
        n = min(piece, count - first)
        target = grad_weight[start + first : start + first + n]
        unit = target if in_place else buffer[:n]
        _product(terms[:, first : first + n].T, x_factored, unit)
        kernels.finish_centres[(-(-n // rows),)](
            unit,
            weight[start + first :],
            *weight.stride(),
            inverse_norm[start + first :],
            target,
            n,
            dim,
            width,
            rows,
            block,
        )


def _product(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """``a @ b`` in float32, into ``out`` if it is given."""
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # interpreted: there is no such product here
        return torch.mm(a.float(), b.float(), out=out)
    torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    return out


def _constant_margin(
    z: Tensor,
    shift: Tensor,
    cosine: Tensor,
    norm: Tensor,
    labels: Tensor,
    num_rows: Tensor,
    scale: Tensor,
    num_classes: int,
    normalize: bool,
    margin: float,
    reduction: str,
    need_scale: bool,
) -> tuple[Tensor, Tensor]:
    B = len(z)
    loss, derivatives = _constant_margin_fake(z, reduction, need_scale)
    with _on(z.device):
        s, on_device = _scale(scale, normalize)
        kernels.constant_margin[(1,)](
            z, shift, cosine, norm, labels, num_rows, s, margin, loss, derivatives, B, num_classes,
            on_device, normalize, reduction != "none", reduction == "mean", need_scale, 1024,
        )  # fmt: skip
    return loss, derivatives


def _labels(labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """One launch in the place of ten."""
    result = torch.empty(labels.shape, dtype=torch.int64, device=labels.device)
    count = torch.empty((), dtype=torch.int64, device=labels.device)
    with _on(labels.device):
        kernels.canonical_labels[(1,)](labels.contiguous(), ignore_index, result, count, len(labels), num_classes, 1024)
    return result, count


def _scale(scale: Tensor, normalize: bool) -> tuple[float | Tensor, bool]:
    """s as the kernels take it, a number or a pointer, and whether it is a pointer."""
    if not normalize:
        return 1.0, False
    if scale.device.type != "cpu":
        return scale, True
    s = scale.item()
    if not s > 0:
        raise ValueError(f"scale must be positive and finite, but it is {s}")
    return s, False


def _bounded(s: float | Tensor, normalize: bool) -> bool:
    """Whether no row can need a shift: known only for a scale that is a number."""
    return normalize and isinstance(s, float) and s <= BOUNDED_SCALE


def _interpreted() -> bool:
    return _import_error is None and triton.knobs.runtime.interpret


def _config(device: torch.device, dtype: torch.dtype) -> Config:
    return _INTERPRETED if device.type == "cpu" else config(_capability(device), kind(dtype))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _panel_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if compute_dtype == torch.float32 else torch.bfloat16


@functools.cache
def _streams(slots: int, blocks: int, tiles: int) -> int:
    """Streams of classes for each block of rows: those that leave the least of the GPU idle, the fewest of equals."""

    def rounds(streams: int) -> int:
        return -(-blocks * streams // slots) * -(-tiles // streams)

    return min(range(1, min(tiles, max(8 * slots // max(blocks, 1), 1)) + 1), key=rounds)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _rows_a_program(width: int) -> tuple[int, int]:
    """Columns, padded to a power of two, and centres that one program of the memory-bound passes takes."""
    block = triton.next_power_of_2(width)
    return block, max(2048 // block, 1)


def _chunk_size(batch: int, dim: int) -> int:
    return max(CHUNK_ELEMENTS // max(batch, dim, 1) // 256, 1) * 256


def _kept(batch: int, num_classes: int, dim: int, compute_dtype: torch.dtype, save_bytes: int) -> int:
    padded = _padded(num_classes, _ALIGN)
    count = kept_classes(batch, padded, _panel_dtype(compute_dtype), save_bytes, _chunk_size(batch, dim))
    return num_classes if count == padded else count


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (save_bytes, predict, need_rows) = Problem(*arguments[:7]), arguments[7:]
    features, weight, labels = problem[:3]
    (B, D), C = features.shape, weight.shape[0]
    vectors = [features.new_empty(B, dtype=torch.float32) for _ in range(4)]
    kept = _padded(_kept(B, C, D, problem.compute_dtype, save_bytes), _ALIGN)
    return (
        *vectors,
        features.new_empty(C, dtype=torch.float32),
        features.new_empty(B, kept, dtype=_panel_dtype(problem.compute_dtype)),
        features.new_empty(0, dtype=torch.float32),
        features.new_empty((B, _padded(D, _ALIGN)) if need_rows else 0, dtype=torch.float32),
        features.new_empty(B if predict else 0, dtype=torch.float32),
        labels.new_empty(B if predict else 0),
    )


def _backward_fake(features: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    need_features, need_weight, need_scale = rest[-3:]
    return (
        features.new_empty(features.shape if need_features else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        scale.new_empty(() if need_scale else 0),
    )


def _constant_margin_fake(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    reduction, need_scale = rest[-2:]
    return z.new_empty(len(z) if reduction == "none" else ()), z.new_empty(3 if need_scale else 2, len(z))


register("triton_canonical_labels", LABELS_SCHEMA, _labels, arguments.canonical_labels_fake, differentiable=False)
_VECTORS = "Tensor shift, Tensor cosine, Tensor norm"
register(
    "triton_forward",
    f"({PROBLEM_SCHEMA}, SymInt save_bytes, bool predict, bool need_rows) -> ({', '.join(['Tensor'] * 10)})",
    _forward,
    _forward_fake,
)
register(
    "triton_backward",
    f"({PROBLEM_SCHEMA}, {_VECTORS}, Tensor inverse_norm, Tensor kept, Tensor rows, {GRADS_SCHEMA})"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register(
    "triton_constant_margin",
    f"(Tensor z, {_VECTORS}, Tensor labels, Tensor num_rows, Tensor scale, SymInt num_classes, bool normalize, "
    "float margin, str reduction, bool need_scale) -> (Tensor, Tensor)",
    _constant_margin,
    _constant_margin_fake,
)
