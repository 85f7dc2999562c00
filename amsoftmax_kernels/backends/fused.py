"""The decomposition on fused kernels, whoever wrote them: what is launched on which chunk, and the buffers between.

    forward     for each chunk of classes: ŵ; E = 2^(log2(e)·logit − shift) and z in one kernel; Eŵ by a library product
    backward    for each chunk: E kept, or ŵ (unless there is one chunk), E and Eŵ again; dŵ = Eᵀ(a∘x̂) by a library product,
                then the Jacobian while dŵ is in the cache, or both by one kernel; dx and the targets' part of dw by one
                small kernel

Normalization is a pass of its own (6 bytes a weight) and not part of the fused kernel: there each block of rows would read
the float32 centres again out of the L2 cache, at twice the bytes of ŵ, and the L2 cache is what bounds that kernel.

Eŵ needs no gradient from above, so it is made in the forward pass where E is kept: the backward pass then reads neither ŵ
nor x̂. Where E is computed again, it is for both products at once, and the forward pass stores none of it (but where the
centres are frozen the forward pass makes all of Eŵ, and nothing is computed again). What is not kept goes through a chunk of
memory: 6 bytes a logit of traffic beside 8·D flops. dx̂ and dŵ kernels that make E themselves would save it, but each makes
it anew, four products in place of three: slower by the count of bench/estimate_targets.py (0.64 ms to 0.55 at B = 1,024,
C = 93,431, and 0.59 if all but the bytes overlapped). From E as it lies in memory, dŵ and its Jacobian in one kernel spare
dŵ's way to memory and back: in C++ by clusters of blocks that hold whole rows and share what they load; in Triton a program
makes a row's tiles one after the other, which loads as much as two products of such tiles, so for moderate batches only.

Logits past scale 64 take a first pass for the row maxima alone (also without feature normalization), so that E has one
shift a row and stays a plain matrix. E is bfloat16 for half-precision operands: float16 cannot hold its range.

What is launched depends on the layout of tensors and on plain values alone: for a small problem, which the host is slower at
than the GPU, it is noted and repeated (:mod:`.replay`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..arguments import no_autocast
from ..operators import GRADS_SCHEMA, LABELS_SCHEMA, PROBLEM_SCHEMA, gradients_fake, is_traced, register
from . import Derivatives, Forward, Problem
from . import margin as constant_margin
from .budget import BOUNDED_SCALE, kept_classes
from .kernels import Kernels
from .parts import Maxima, Sums
from .replay import Replayed, on_device
from .triton_configs import kind

# Classes a chunk: what is not kept of E, and ŵ, take at most this many elements.
CHUNK_ELEMENTS = 1 << 27
# Classes of which dŵ is computed at a time, in elements: still in the L2 cache when the Jacobian reads it.
FINISH_ELEMENTS = 1 << 23
# Logits up to which the host is the slower one and replays what it did: some 0.5 ms of an H200's time.
REPLAYED_LOGITS = 1 << 24
_ALIGN = 16  # elements: rows of operands start at multiples of 16 bytes, as bulk copies want


class Fused:
    """A backend's functions (:class:`amsoftmax_kernels.backends.Backend`), as operators named after it."""

    def __init__(self, name: str, kernels: Kernels) -> None:
        self.name, self.kernels = name, kernels
        self._replayed = {
            "canonical_labels": Replayed(self.labels, _of_labels),
            "forward": Replayed(self._forward, _of_problem),
            "backward": Replayed(self._backward, _of_problem),
            "forward_loss": Replayed(self._forward_loss, _of_problem),
            "backward_loss": Replayed(self._backward_loss, _of_problem),
        }
        vectors = "Tensor shift, Tensor cosine, Tensor norm"
        register(
            f"{name}_canonical_labels", LABELS_SCHEMA, self.labels, arguments.canonical_labels_fake, differentiable=False
        )
        register(
            f"{name}_forward",
            f"({PROBLEM_SCHEMA}, SymInt save_bytes, bool predict, bool need_rows, bool need_weight)"
            f" -> ({', '.join(['Tensor'] * 10)})",
            self._forward,
            _forward_fake,
        )
        register(
            f"{name}_backward",
            f"({PROBLEM_SCHEMA}, {vectors}, Tensor inverse_norm, Tensor kept, Tensor rows, {GRADS_SCHEMA})"
            " -> (Tensor, Tensor, Tensor)",
            self._backward,
            gradients_fake,
        )
        register(
            f"{name}_forward_loss",
            f"({PROBLEM_SCHEMA}, SymInt save_bytes, bool predict, bool need_rows, bool need_weight, Tensor num_rows, "
            f"float margin, str reduction, bool need_scale) -> ({', '.join(['Tensor'] * 16)})",
            self._forward_loss,
            _forward_loss_fake,
        )
        register(
            f"{name}_backward_loss",
            f"({PROBLEM_SCHEMA}, {vectors}, Tensor inverse_norm, Tensor kept, Tensor rows, Tensor derivatives, "
            "Tensor x_factored, Tensor x_hat, Tensor factor, Tensor w_hat, Tensor upstream, "
            "bool need_features, bool need_weight, bool need_scale) -> (Tensor, Tensor, Tensor)",
            self._backward_loss,
            gradients_fake,
        )

    def canonical_labels(self, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        if labels.device.type == "cpu":  # whose values are checked
            return arguments.canonical_labels(labels, num_classes, ignore_index)
        result: tuple[Tensor, Tensor] = self._call("canonical_labels", labels)(labels, num_classes, ignore_index)
        return result

    def forward(self, problem: Problem, save_bytes: int, predict: bool, need_rows: bool, need_weight: bool) -> Forward:
        call = self._call("forward", problem.features)
        return Forward(*call(*problem, save_bytes, predict, need_rows, need_weight))

    def loss_at_once(self, *unused: Any) -> None:
        """Not here: multiplying the finished gradients by the upstream one would read and write them once more."""

    def forward_loss(self, problem: Problem, *how: Any) -> tuple[Forward, Tensor, Derivatives]:
        """In fewer launches than :meth:`forward` and what would follow it."""
        results = self._call("forward_loss", problem.features)(*problem, *how)
        return Forward(*results[:10]), results[10], Derivatives(*results[11:])

    def backward_loss(
        self, problem: Problem, saved: Forward, derivatives: Derivatives, upstream: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if upstream.dim():  # one a row: none could be taken out of the sums over rows
            return constant_margin.backward_loss(self.backward, problem, saved, derivatives, upstream, needs)
        call = self._call("backward_loss", problem.features)
        result: tuple[Tensor, Tensor, Tensor] = call(*problem, *saved[1:6], saved.rows, *derivatives, upstream, *needs)
        return result

    def backward(
        self,
        problem: Problem,
        saved: Forward,
        row_factor: Tensor,
        grad_cosine: Tensor,
        grad_norm: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = self._call("backward", problem.features)
        result: tuple[Tensor, Tensor, Tensor] = call(
            *problem, *saved[1:6], saved.rows, row_factor, grad_cosine, grad_norm, *needs
        )
        return result

    def _call(self, name: str, tensor: Tensor) -> Callable[..., Any]:
        if not is_traced(tensor):
            return self._replayed[name]
        operator: Callable[..., Any] = getattr(torch.ops.amsoftmax_kernels, f"{self.name}_{name}")
        return operator

    def forget(self) -> None:
        """Programs that are replayed, where what they do not depend on has changed after all: a test's own chunks, say."""
        for each in self._replayed.values():
            each.forget()

    def labels(self, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        """One launch in the place of ten."""
        result = torch.empty(labels.shape, dtype=torch.int64, device=labels.device)
        count = torch.empty((), dtype=torch.int64, device=labels.device)
        with on_device(labels.device):
            self.kernels.canonical_labels(labels.contiguous(), ignore_index, num_classes, result, count)
        return result, count

    def _forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        return self._over_chunks(Problem(*arguments[:7]), *arguments[7:], finish=None)[0]

    def _forward_loss(self, *arguments: Any) -> tuple[Tensor, ...]:
        problem, how, (num_rows, margin, reduction, need_scale) = (
            Problem(*arguments[:7]),
            arguments[7:11],
            arguments[11:],
        )
        needed = how[3] and reduction != "none"
        loss, derivatives, x_factored = _loss_buffers(problem, reduction, needed, need_scale)
        s = scale_of(problem.scale, problem.normalize_features)

        def finish(saved: Forward, z_parts: Tensor | None) -> None:
            self.kernels.constant_margin(
                problem, saved, z_parts, num_rows, s, margin, reduction, loss, derivatives, x_factored if needed else None
            )

        saved, *prepared = self._over_chunks(problem, *how, finish=finish)
        recompute = needed and saved.kept.shape[1] < problem.weight.shape[0]
        # ŵ too, if it is in one piece: the backward pass would have to make it again, in memory as large.
        return *saved, loss, derivatives, x_factored, *(each if recompute else each.new_empty(0) for each in prepared)

    def _over_chunks(
        self,
        problem: Problem,
        save_bytes: int,
        predict: bool,
        need_rows: bool,
        need_weight: bool,
        *,
        finish: Callable[[Forward, Tensor | None], None] | None,
    ) -> tuple[Forward, Tensor, Tensor, Tensor]:
        """The forward pass, x̂, log2(e)·s, and ŵ if the classes are one chunk (else of size 0).

        ``finish`` is called at its end, to sum z if it is given the parts.
        """
        features, weight, labels, scale, normalize = problem[:5]
        (B, D), C = features.shape, weight.shape[0]
        kernels = self.kernels
        with no_autocast(features.device), on_device(features.device):
            count = kept_count(B, C, D, problem.compute_dtype, save_bytes)
            # Of what is not kept, E is made again for the centres' gradient, if that is wanted, and serves both there.
            at_once = need_rows and not need_weight
            shard = Shard.of(problem, True, terms_needed=at_once and count < C)
            z, cosine, norm, factor = (features.new_empty(B, dtype=torch.float32) for _ in range(4))
            shift = torch.empty_like(z)
            inverse_norm = features.new_empty(C, dtype=torch.float32)
            kept = features.new_empty(B, padded(count), dtype=shard.panel_dtype)
            has_rows = need_rows and (at_once or count > 0)
            rows = features.new_empty((B, shard.width) if has_rows else 0, dtype=torch.float32)
            best = features.new_empty(B if predict else 0, dtype=torch.float32)
            best_class = labels.new_empty(B if predict else 0)
            results = Forward(z, shift, cosine, norm, inverse_norm, kept, z.new_empty(0), rows, best, best_class)
            x_hat = features.new_empty(B, shard.width, dtype=problem.compute_dtype)
            one_chunk = len(shard.chunks) == 1
            whole = shard.w_hat[:C] if one_chunk else x_hat.new_empty(0)
            if B == 0:
                if finish is not None:
                    finish(results, None)
                return results, x_hat, factor, whole
            s = scale_of(scale, normalize)
            w_hat = whole if one_chunk else None
            kernels.prepare_rows(problem, s, x_hat, cosine, norm, factor, shift, w_hat, inverse_norm)
            bounded = _bounded(s, normalize)
            streams = kernels.streams(problem, shard.classes(0))
            sums = Sums(features, len(shard.chunks), streams, B)
            maxima = Maxima(kernels, features, labels, len(shard.chunks), streams, B) if predict or not bounded else None
            if maxima is not None and not bounded:
                unless = s if isinstance(s, Tensor) and normalize else None
                for start in shard.chunks:
                    centres = w_hat if w_hat is not None else shard.prepare(kernels, start, inverse_norm, unless)
                    kernels.cosine_exp(problem, start, x_hat, centres, factor, None, None, None, *maxima.next(), True)
                kernels.reduce_shift(*maxima.parts, factor, shift)
                maxima.restart()
            for i, start in enumerate(shard.chunks):
                if not one_chunk or w_hat is None:
                    w_hat = shard.prepare(kernels, start, inverse_norm)
                keep = start < count
                terms = kept[:, start : start + shard.chunk] if keep else shard.terms
                best_parts, class_parts = maxima.next() if predict and maxima is not None else (None, None)
                kernels.cosine_exp(
                    problem, start, x_hat, w_hat, factor, None if bounded else shift, terms if keep or at_once else None,
                    sums.next(), best_parts, class_parts, False,
                )  # fmt: skip
                if need_rows and (keep or at_once):
                    product = _product(terms[:, : w_hat.shape[0]], w_hat.to(shard.panel_dtype), rows if i == 0 else None)
                    if i > 0:
                        rows += product
            if finish is None or not one_chunk:
                kernels.reduce_sums(sums.parts, labels, z)
            if finish is not None:
                finish(results, sums.parts if one_chunk else None)
            if predict and maxima is not None:
                kernels.reduce_best(*maxima.parts, best, best_class)
            return results, x_hat, factor, whole

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        problem, vectors = Problem(*arguments[:7]), arguments[7:13]
        row_factor, grad_cosine = (each.contiguous() for each in arguments[13:15])
        grad_norm = None if arguments[15] is None else arguments[15].contiguous()
        needs = arguments[16:]
        features, weight, norm, kept = problem.features, problem.weight, vectors[2], vectors[4]
        B, width = features.shape[0], padded(features.shape[1])
        x_factored = x_hat = factor = None
        if needs[1] and B:
            recompute = kept.shape[1] < weight.shape[0]
            x_factored = features.new_empty(B, width, dtype=panel_dtype(problem.compute_dtype))
            x_hat = features.new_empty(B, width, dtype=problem.compute_dtype) if recompute else None
            factor = features.new_empty(B, dtype=torch.float32) if recompute else None
            s = scale_of(problem.scale, problem.normalize_features)
            with on_device(features.device):
                self.kernels.factor_rows(problem, norm, row_factor, s, x_factored, x_hat, factor)
        return self._gradients(
            problem, vectors, row_factor, grad_cosine, grad_norm, None, x_factored, x_hat, factor, None, needs
        )

    def _backward_loss(self, *arguments: Any) -> tuple[Tensor, ...]:
        problem, vectors = Problem(*arguments[:7]), arguments[7:13]
        derivatives, x_factored, x_hat, factor, w_hat, upstream = arguments[13:19]
        needs, normalize = arguments[19:], problem.normalize_features
        row_factor, grad_cosine, *grad_s = derivatives.unbind()
        grad_features, grad_weight, grad_scale = self._gradients(
            problem, vectors, row_factor, grad_cosine, None if normalize else grad_s[0], upstream,
            x_factored, x_hat, factor, w_hat if w_hat.numel() else None, needs,
        )  # fmt: skip
        if needs[2] and normalize:
            grad_scale = grad_scale + (grad_s[0].sum() * upstream).to(grad_scale)
        return grad_features, grad_weight, grad_scale

    def _gradients(
        self,
        problem: Problem,
        vectors: tuple[Tensor, ...],  # those of a Forward from its shift on
        row_factor: Tensor,
        grad_cosine: Tensor,
        grad_norm: Tensor | None,
        upstream: Tensor | None,
        x_factored: Tensor | None,
        x_hat: Tensor | None,
        factor: Tensor | None,
        whole: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The backward pass; ``x_factored`` is there for the centres' gradient, x̂ and its factor where E is recomputed.

        ``whole``: ŵ of all classes, where it is at hand.
        """
        shift, cosine, norm, inverse_norm, kept, rows = vectors
        need_features, need_weight, need_scale = needs
        need_rows = need_features or (need_scale and problem.normalize_features)
        features, weight, _, scale, normalize = problem[:5]
        (B, D), C = features.shape, weight.shape[0]
        kernels = self.kernels
        with no_autocast(features.device), on_device(features.device):
            grad_features = features.new_empty((B, D) if need_features else 0)
            grad_weight = weight.new_empty((C, D) if need_weight else 0)
            grad_scale = scale.new_zeros(() if need_scale else 0)
            if B == 0:
                return grad_features, grad_weight.zero_(), grad_scale
            count = min(kept.shape[1], C)
            recompute = need_weight and count < C
            shard = Shard.of(problem, recompute and whole is None, recompute)
            s = scale_of(scale, normalize)
            if need_weight and x_factored is not None:
                for start in shard.chunks:
                    terms = kept[:, start : start + shard.chunk] if start < count else shard.terms
                    if x_hat is not None and factor is not None and start >= count:
                        w_hat = shard.prepare(kernels, start, inverse_norm) if whole is None else whole
                        kernels.cosine_exp(
                            problem, start, x_hat, w_hat, factor,
                            None if _bounded(s, normalize) else shift, terms, None, None, None, False,
                        )  # fmt: skip
                        if need_rows:
                            product = _product(terms[:, : w_hat.shape[0]], w_hat.to(shard.panel_dtype), None)
                            rows = rows + product if rows.numel() else product
                    _grad_centres(kernels, shard, start, terms, x_factored, inverse_norm, grad_weight, upstream)
            if need_rows and rows.numel() == 0:
                raise RuntimeError("the forward pass was told that the centres' gradient would be asked for, and it is not")
            of_scale = need_scale and normalize
            parts = features.new_empty(B, dtype=torch.float64) if of_scale else None
            empty = norm.new_empty(0)
            saved = Forward(empty, shift, cosine, norm, inverse_norm, kept, empty, rows, empty, empty)
            kernels.finish_rows(
                problem, saved, s, row_factor, grad_cosine, grad_norm, upstream,
                grad_features if need_features else None, grad_weight if need_weight else None, parts,
            )  # fmt: skip
            if parts is not None:
                grad_scale = parts.sum().to(scale.device, scale.dtype)
            return grad_features, grad_weight, grad_scale


@dataclass
class Shard:
    """The classes in chunks, and the buffers that each chunk passes through."""

    weight: Tensor
    panel_dtype: torch.dtype  # of E, and of the products with it
    width: int  # D, padded
    chunk: int  # classes
    w_hat: Tensor  # [chunk, width]
    terms: Tensor  # [B, chunk] for what is not kept

    @classmethod
    def of(cls, problem: Problem, w_hat_needed: bool, terms_needed: bool) -> Shard:
        weight = problem.weight
        (batch, dim), num_classes = problem.features.shape, weight.shape[0]
        width, chunk = padded(dim), chunk_size(batch, dim)
        dtype = panel_dtype(problem.compute_dtype)
        classes = min(chunk, padded(num_classes))
        return cls(
            weight, dtype, width, chunk,
            weight.new_empty((classes, width) if w_hat_needed else 0, dtype=problem.compute_dtype),
            weight.new_empty((batch, classes) if terms_needed else 0, dtype=dtype),
        )  # fmt: skip

    @property
    def chunks(self) -> range:
        return range(0, self.weight.shape[0], self.chunk)

    def classes(self, start: int) -> int:
        return min(self.chunk, self.weight.shape[0] - start)

    def prepare(self, kernels: Kernels, start: int, inverse_norm: Tensor, unless_bounded: Tensor | None = None) -> Tensor:
        """ŵ of a chunk, ``[n, width]``."""
        n = self.classes(start)
        w_hat = self.w_hat[:n]
        kernels.prepare_centres(self.weight[start : start + n], w_hat, inverse_norm[start : start + n], unless_bounded)
        return w_hat


def _grad_centres(
    kernels: Kernels,
    shard: Shard,
    start: int,
    terms: Tensor,
    x_factored: Tensor,
    inverse_norm: Tensor,
    grad_weight: Tensor,
    upstream: Tensor | None,
) -> None:
    """The gradient of a chunk's centres but for the targets' part: at once, or a few thousand classes at a time."""
    count = shard.classes(start)
    chunk = slice(start, start + count)
    if kernels.grad_centres(
        terms[:, :count], x_factored, shard.weight[chunk], inverse_norm[chunk], grad_weight[chunk], upstream
    ):
        return
    piece = finish_size(shard.width)
    in_place = grad_weight.dtype == torch.float32 and grad_weight.shape[1] == shard.width
    buffer = x_factored.new_empty(0 if in_place else min(piece, count), shard.width, dtype=torch.float32)
    for first in range(0, count, piece):
        n = min(piece, count - first)
        mine = slice(start + first, start + first + n)
        target = grad_weight[mine]
        unit = _product(terms[:, first : first + n].T, x_factored, target if in_place else buffer[:n])
        kernels.finish_centres(unit, shard.weight[mine], inverse_norm[mine], target, upstream)


def _product(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """``a @ b`` in float32, into ``out`` if it is given."""
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # emulated: there is no such product here
        return torch.mm(a.float(), b.float(), out=out)
    torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    return out


def scale_of(scale: Tensor, normalize: bool) -> float | Tensor:
    """s as kernels take it: a number, or a tensor on the device; 1 where ‖x‖ takes its place."""
    if not normalize:
        return 1.0
    if scale.device.type != "cpu":
        return scale.to(torch.float32)
    s = scale.item()
    if not s > 0:
        raise ValueError(f"scale must be positive and finite, but it is {s}")
    return s


def _bounded(s: float | Tensor, normalize: bool) -> bool:
    """Whether no row can need a shift: known only for a scale that is a number."""
    return normalize and isinstance(s, float) and s <= BOUNDED_SCALE


def _of_problem(*arguments: Any) -> tuple[Any, ...] | None:
    """What a small problem's pass depends on beside its arguments: a scale's value, and how float32 is multiplied."""
    features, weight, _, scale, normalize, compute_dtype = arguments[:6]
    device, (B, D), C = features.device, features.shape, weight.shape[0]
    # Of several chunks all buffers would be there at once; of an empty batch, results that share a program's tensors.
    if not replayed_on(device) or not 0 < B * C <= REPLAYED_LOGITS or chunk_size(B, D) < C:
        return None
    s = scale.item() if normalize and scale.device.type == "cpu" else scale.device
    return device, s, kind(compute_dtype) if compute_dtype == torch.float32 else None


def _of_labels(labels: Tensor, *unused: Any) -> torch.device | None:
    return labels.device if replayed_on(labels.device) else None


def replayed_on(device: torch.device) -> bool:
    return device.type == "cuda"  # a CPU only emulates one


@functools.cache
def streams_for(slots: int, blocks: int, tiles: int) -> int:
    """Streams of classes for each block of rows: those that leave the least of the GPU idle, the fewest of equals."""

    def rounds(streams: int) -> int:
        return -(-blocks * streams // slots) * -(-tiles // streams)

    return min(range(1, min(tiles, max(8 * slots // max(blocks, 1), 1)) + 1), key=rounds)


def panel_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of E."""
    return torch.float32 if compute_dtype == torch.float32 else torch.bfloat16


def padded(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // _ALIGN) * _ALIGN


def chunk_size(batch: int, dim: int) -> int:
    """Classes a chunk, a multiple of 256."""
    return max(CHUNK_ELEMENTS // max(batch, dim, 1) // 256, 1) * 256


def finish_size(width: int) -> int:
    """Classes of which dŵ is computed at a time, where that is not done at once."""
    return max(FINISH_ELEMENTS // width // 256, 1) * 256


def kept_count(batch: int, num_classes: int, dim: int, compute_dtype: torch.dtype, save_bytes: int) -> int:
    """Classes of which E is kept: whole chunks, or all."""
    count = kept_classes(batch, padded(num_classes), panel_dtype(compute_dtype), save_bytes, chunk_size(batch, dim))
    return num_classes if count == padded(num_classes) else count


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (save_bytes, predict, need_rows, need_weight) = Problem(*arguments[:7]), arguments[7:]
    features, weight, labels = problem[:3]
    (B, D), C = features.shape, weight.shape[0]
    vectors = [features.new_empty(B, dtype=torch.float32) for _ in range(4)]
    kept = padded(kept_count(B, C, D, problem.compute_dtype, save_bytes))
    has_rows = need_rows and (not need_weight or kept > 0)
    return (
        *vectors,
        features.new_empty(C, dtype=torch.float32),
        features.new_empty(B, kept, dtype=panel_dtype(problem.compute_dtype)),
        features.new_empty(0, dtype=torch.float32),
        features.new_empty((B, padded(D)) if has_rows else 0, dtype=torch.float32),
        features.new_empty(B if predict else 0, dtype=torch.float32),
        labels.new_empty(B if predict else 0),
    )


def _forward_loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (save_bytes, _, _, need_weight, *_, reduction, need_scale) = Problem(*arguments[:7]), arguments[7:]
    (B, D), C = problem.features.shape, problem.weight.shape[0]
    needed = need_weight and reduction != "none"
    recompute = needed and padded(kept_count(B, C, D, problem.compute_dtype, save_bytes)) < C
    one_chunk = chunk_size(B, D) >= C
    return (
        *_forward_fake(*arguments[:11]),
        *_loss_buffers(problem, reduction, needed, need_scale),
        problem.features.new_empty((B, padded(D)) if recompute else 0, dtype=problem.compute_dtype),
        problem.features.new_empty(B if recompute else 0, dtype=torch.float32),
        problem.features.new_empty((C, padded(D)) if recompute and one_chunk else 0, dtype=problem.compute_dtype),
    )


def _loss_buffers(problem: Problem, reduction: str, x_needed: bool, need_scale: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its derivatives, and a∘x̂."""
    features = problem.features
    B, D = features.shape
    return (
        features.new_empty(B if reduction == "none" else (), dtype=torch.float32),
        features.new_empty(3 if need_scale else 2, B, dtype=torch.float32),
        features.new_empty((B, padded(D)) if x_needed else 0, dtype=panel_dtype(problem.compute_dtype)),
    )
