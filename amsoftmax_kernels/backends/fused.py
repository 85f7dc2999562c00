"""The decomposition on fused kernels, whoever wrote them: what is launched on which chunk, and the buffers between.

    forward     for each chunk of classes (several, where E is not stored): ŵ; E = 2^(log2(e)·logit − shift) and z in one
                kernel; Eŵ by a library product
    backward    for each chunk: E kept, or ŵ (but for the last), E and Eŵ again; dŵ = Eᵀ(a∘x̂) by a library product,
                then the Jacobian while dŵ is in the cache, or both by one kernel; dx and the targets' part of dw by one
                small kernel

Normalization is a pass of its own (6 bytes a weight) and not part of the fused kernel: there each block of rows would read
the float32 centres again out of the L2 cache, at twice the bytes of ŵ, and the L2 cache is what bounds that kernel.

Eŵ needs no gradient from above, so it is made in the forward pass where E is kept: the backward pass then reads neither ŵ
nor x̂. (Few classes leave SMs idle in the kernel for their gradient: there it is made beside that.) Where E is computed
again, it is for both products at once, and the forward pass stores none of it (but where the centres are frozen the forward
pass makes all of Eŵ, and nothing is computed again). What is not kept goes through a chunk of memory: 6 bytes a logit of
traffic beside 8·D flops. dx̂ and dŵ kernels that make E themselves would save it, but each makes it anew, four products in
place of three: slower by the count of bench/estimate_targets.py (0.64 ms to 0.55 at B = 1,024, C = 93,431, and 0.59 if all
but the bytes overlapped). From E as it lies in memory, dŵ and its Jacobian in one kernel spare dŵ's way to memory and back:
in C++ by clusters of blocks that hold whole rows and share what they load; in Triton a program makes a row's tiles one after
the other, which loads as much as two products of such tiles, so for moderate batches only.

Logits past scale 64 take a first pass for the row maxima alone (also without feature normalization), so that E has one
shift a row and stays a plain matrix. E is bfloat16 for half-precision operands: float16 cannot hold its range.

What is launched depends on the layout of tensors and on plain values alone: for a small problem, which the host is slower at
than the GPU, it is noted and repeated (:mod:`.replay`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..arguments import no_autocast
from ..operators import GRADS_SCHEMA, LABELS_SCHEMA, PROBLEM_SCHEMA, gradients_fake, is_traced, register
from . import Forward, LossForward, Problem, chunking
from . import margin as constant_margin
from .budget import BOUNDED_SCALE
from .chunking import Shard, kind, padded, panel_dtype
from .kernels import Kernels, RawLabels
from .parts import Maxima, Products, Sums
from .replay import ALIGNMENT, Layout, Packed, Replayed, on_device

# Logits up to which the host is the slower one and replays what it did: some 0.5 ms of an H200's time.
REPLAYED_LOGITS = 1 << 24


class Fused:
    """A backend's functions (:class:`amsoftmax_kernels.backends.Backend`), as operators named after it."""

    def __init__(self, name: str, kernels: Kernels) -> None:
        self.name, self.kernels = name, kernels
        self._replayed = {
            "canonical_labels": Replayed(self.labels, _of_labels),
            "forward": Replayed(self._forward, _of_problem),
            "backward": Replayed(self._backward, _of_problem),
            "loss": Replayed(self._forward_loss, _of_problem),
            "forward_loss": Replayed(self._forward_loss, _of_problem, packed=3),
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
            f"({PROBLEM_SCHEMA}, SymInt save_bytes, bool predict, bool need_rows, bool need_weight, int ignore_index, "
            f"float margin, str reduction, bool need_scale) -> ({', '.join(['Tensor'] * 14)})",
            self._forward_loss,
            self._forward_loss_fake,
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
        if not replayed_on(labels.device):  # a CPU, where their values are checked
            return arguments.canonical_labels(labels, num_classes, ignore_index)
        result: tuple[Tensor, Tensor] = self._call("canonical_labels", labels)(labels, num_classes, ignore_index)
        return result

    def forward(self, problem: Problem, save_bytes: int, predict: bool, need_rows: bool, need_weight: bool) -> Forward:
        call = self._call("forward", problem.features)
        return Forward(*call(*problem, save_bytes, predict, need_rows, need_weight))

    def loss_at_once(self, *unused: Any) -> None:
        """Not here: multiplying the finished gradients by the upstream one would read and write them once more."""

    def forward_loss(
        self, problem: Problem, save_bytes: int, predict: bool, need_rows: bool, need_weight: bool, *how: Any
    ) -> LossForward:
        """In fewer launches than :meth:`forward` and what would go before and after it."""
        call = self._call("forward_loss", problem.features)
        if call is self._replayed["forward_loss"] and not (need_rows or need_weight):
            call = self._replayed["loss"]  # nothing will be saved
        loss, predictions, labels, *saved = call(*problem, save_bytes, predict, need_rows, need_weight, *how)
        layout = None
        if isinstance(saved[0], Packed):
            saved[0], layout = saved[0]
        return LossForward(loss, predictions if predict else None, labels, tuple(saved), layout)

    def backward_loss(
        self,
        problem: Problem,
        saved: tuple[Tensor, ...],
        layout: Hashable,
        upstream: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = self._call("backward_loss", problem.features)
        tensors: tuple[Tensor | Packed, ...] = saved
        if isinstance(layout, Layout):
            if is_traced(problem.features):
                tensors = layout.unpacked(saved[0])
            else:  # a hook on saved tensors may have put it anywhere
                memory = saved[0] if saved[0].data_ptr() % ALIGNMENT == 0 else saved[0].clone()
                tensors = (Packed(memory, layout),)
        result: tuple[Tensor, Tensor, Tensor] = call(*problem, *tensors, upstream, *needs)
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
        return self._over_chunks(Problem(*arguments[:7]), None, *arguments[7:], finish=None)[0]

    def _forward_loss(self, *arguments: Any) -> tuple[Tensor, ...]:
        given, how, rest = Problem(*arguments[:7]), arguments[7:11], arguments[11:]
        ignore_index, margin, reduction, need_scale = rest
        problem, raw = self._raw(given, ignore_index)
        needed = how[3] and reduction != "none"
        loss, derivatives, x_factored = _loss_buffers(problem, reduction, needed, need_scale)
        s = scale_of(problem.scale, problem.normalize_features)
        factored = x_factored if needed else None

        def finish(saved: Forward, z_parts: Tensor | None) -> None:
            self.kernels.constant_margin(
                problem, saved, z_parts, raw.num_rows, s, margin, reduction, loss, derivatives, factored
            )

        later = self._product_later(problem, how[0], how[2], how[3], reduction)
        saved, *prepared = self._over_chunks(problem, raw, *how, finish=finish, product_later=later)
        recompute = needed and saved.kept.shape[1] < problem.weight.shape[0]
        # And the last of ŵ, which the backward pass would have to make again; it has room for the rest in the gradient.
        wanted = recompute, recompute, recompute or later
        left = (each if want else each.new_empty(0) for each, want in zip(prepared, wanted, strict=True))
        predictions = constant_margin.predictions(saved, problem.labels) if how[1] else problem.labels.new_empty(0)
        return loss, predictions, problem.labels, *saved[1:6], saved.rows, derivatives, x_factored, *left

    def _forward_loss_fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        problem, how = Problem(*arguments[:7]), arguments[7:]
        save_bytes, _, need_rows, need_weight, *_, reduction, need_scale = how
        (B, D), C = problem.features.shape, problem.weight.shape[0]
        needed = need_weight and reduction != "none"
        count = chunking.kept_count(B, C, D, problem.compute_dtype, save_bytes)
        recompute = needed and padded(count) < C
        later = self._product_later(problem, save_bytes, need_rows, need_weight, reduction)
        last = chunking.last_span(B, D, C, count) if recompute else C if later else 0
        loss, *of_loss = _loss_buffers(problem, reduction, needed, need_scale)
        _, *vectors, _, rows, best, _ = _forward_fake(*arguments[:11])
        features, labels = problem.features, problem.labels
        return (
            loss,
            labels.new_empty(best.shape, dtype=torch.int64),
            labels.new_empty(B, dtype=torch.int64),
            *vectors,
            rows.new_empty(0) if later else rows,
            *of_loss,
            features.new_empty((B, padded(D)) if recompute else 0, dtype=problem.compute_dtype),
            features.new_empty(B if recompute else 0, dtype=torch.float32),
            features.new_empty((last, padded(D)) if last else 0, dtype=problem.compute_dtype),
        )

    def _product_later(
        self, problem: Problem, save_bytes: int, need_rows: bool, need_weight: bool, reduction: str
    ) -> bool:  # fmt: skip
        """Whether E·ŵ is left to the backward pass, of few classes: beside the centres' gradient it is free."""
        if not (need_rows and need_weight) or reduction == "none" or self.kernels.parts_beside(problem) == 0:
            return False
        (B, D), C = problem.features.shape, problem.weight.shape[0]
        return chunking.chunk_size(B, D) >= C and chunking.kept_count(B, C, D, problem.compute_dtype, save_bytes) == C

    def _raw(self, given: Problem, ignore_index: int) -> tuple[Problem, RawLabels]:
        """The problem with room for labels that are yet to be made canonical, and what they are made of."""
        labels = given.labels
        if not replayed_on(labels.device):  # a CPU, where their values are checked
            arguments.canonical_labels(labels, given.weight.shape[0], ignore_index)
        count = torch.empty((), dtype=torch.int64, device=labels.device)
        problem = given._replace(labels=torch.empty(labels.shape, dtype=torch.int64, device=labels.device))
        return problem, RawLabels(labels.contiguous(), ignore_index, count)

    def _over_chunks(
        self,
        problem: Problem,
        raw: RawLabels | None,
        save_bytes: int,
        predict: bool,
        need_rows: bool,
        need_weight: bool,
        *,
        finish: Callable[[Forward, Tensor | None], None] | None,
        product_later: bool = False,
    ) -> tuple[Forward, Tensor, Tensor, Tensor]:
        """The forward pass, x̂, log2(e)·s, and ŵ of the classes that were taken last.

        ``finish`` is called at its end, to sum z if it is given the parts. ``product_later``: without E·ŵ.
        """
        need_rows = need_rows and not product_later
        features, weight, labels, scale, normalize = problem[:5]
        (B, D), C = features.shape, weight.shape[0]
        kernels = self.kernels
        with no_autocast(features.device), on_device(features.device):
            count = chunking.kept_count(B, C, D, problem.compute_dtype, save_bytes)
            # Of what is not kept, E is made again for the centres' gradient, if that is wanted, and serves both there.
            at_once = need_rows and not need_weight
            shard = Shard.of(problem, terms_needed=at_once and count < C)
            z, cosine, norm, factor = (features.new_empty(B, dtype=torch.float32) for _ in range(4))
            shift = torch.empty_like(z)
            inverse_norm = features.new_empty(C, dtype=torch.float32)
            kept = features.new_empty(B, padded(count), dtype=shard.panel_dtype)
            best = features.new_empty(B if predict else 0, dtype=torch.float32)
            best_class = labels.new_empty(B if predict else 0)
            x_hat = features.new_empty(B, shard.width, dtype=problem.compute_dtype)
            spans = chunking.forward_spans(B, D, C, C if at_once else count)
            multiplied = sum(at_once or span.start < count for span in spans) if need_rows else 0
            products = Products(features, multiplied, B, shard.width)
            room = shard.room(max(map(len, spans)))
            results = Forward(z, shift, cosine, norm, inverse_norm, kept, z.new_empty(0), z, best, best_class)
            if B == 0:
                results = results._replace(rows=products.total())
                if raw is not None:
                    kernels.canonical_labels(raw.labels, raw.ignore_index, C, labels, raw.num_rows)
                if finish is not None:
                    finish(results, None)
                return results, x_hat, factor, room[: len(spans[-1])]
            s = scale_of(scale, normalize)
            w_hat = room if len(spans) == 1 else None
            kernels.prepare_rows(problem, raw, s, x_hat, cosine, norm, factor, shift, w_hat, inverse_norm)
            bounded = _bounded(s, normalize)
            streams = kernels.streams(problem, max(map(len, spans)))
            sums = Sums(features, len(spans), streams, B)
            maxima = Maxima(kernels, features, labels, len(spans), streams, B) if predict or not bounded else None
            if maxima is not None and not bounded:
                unless = s if isinstance(s, Tensor) and normalize else None
                for span in spans:
                    centres = w_hat if w_hat is not None else shard.prepare(kernels, span, room, inverse_norm, unless)
                    kernels.cosine_exp(problem, span.start, x_hat, centres, factor, None, None, None, *maxima.next(), True)
                kernels.reduce_shift(*maxima.parts, factor, shift)
                maxima.restart()
            for span in spans:
                centres = w_hat if w_hat is not None else shard.prepare(kernels, span, room, inverse_norm)
                keep = span.start < count
                terms = kept[:, span.start : span.start + shard.chunk] if keep else shard.terms
                best_parts, class_parts = maxima.next() if predict and maxima is not None else (None, None)
                kernels.cosine_exp(
                    problem, span.start, x_hat, centres, factor, None if bounded else shift,
                    terms if keep or at_once else None, sums.next(), best_parts, class_parts, False,
                )  # fmt: skip
                if need_rows and (keep or at_once):
                    _product(terms[:, : len(span)], centres.to(shard.panel_dtype), products.next())
            results = results._replace(rows=products.total())
            if finish is None or len(spans) > 1:
                kernels.reduce_sums(sums.parts, labels, z)
            if finish is not None:
                finish(results, sums.parts if len(spans) == 1 else None)
            if predict and maxima is not None:
                kernels.reduce_best(*maxima.parts, best, best_class)
            return results, x_hat, factor, room[: len(spans[-1])]

    def _backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        row_factor, grad_cosine = (each.contiguous() for each in arguments[13:15])
        grad_norm = None if arguments[15] is None else arguments[15].contiguous()
        return self._by_row(Problem(*arguments[:7]), arguments[7:13], row_factor, grad_cosine, grad_norm, arguments[16:])

    def _by_row(
        self,
        problem: Problem,
        vectors: tuple[Tensor, ...],
        row_factor: Tensor,
        grad_cosine: Tensor,
        grad_norm: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        by_row = upstream.dim() > 0  # it cannot be taken out of the sums over rows
        row_factor, grad_cosine, *grad_s = (derivatives * upstream if by_row else derivatives).unbind()
        grad_norm = None if normalize else grad_s[0]
        if by_row:
            grads = self._by_row(problem, vectors, row_factor, grad_cosine, grad_norm, needs)
        else:
            grads = self._gradients(
                problem, vectors, row_factor, grad_cosine, grad_norm, upstream,
                x_factored, x_hat, factor, w_hat if w_hat.numel() else None, needs,
            )  # fmt: skip
        grad_features, grad_weight, grad_scale = grads
        if needs[2] and normalize:
            of_rows = grad_s[0].sum()
            grad_scale = grad_scale + (of_rows if by_row else of_rows * upstream).to(grad_scale)
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
        last: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The backward pass; ``x_factored`` is there for the centres' gradient, x̂ and its factor where E is recomputed.

        ``last``: ŵ of the last classes, of whole chunks, as far as it is at hand.
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
            shard = Shard.of(problem, terms_needed=need_weight and count < C)
            s = scale_of(scale, normalize)
            done = False
            if need_rows and count == C and last is not None:
                rows, done = self._product_now(
                    problem, kept, last, x_factored if need_weight else None, inverse_norm, grad_weight, upstream
                )
            if need_weight and x_factored is not None and not done:
                again = [chunk for chunk in shard.chunks if chunk.start >= count]
                products = Products(features, len(again) if need_rows else 0, B, shard.width)
                for chunk in shard.chunks:
                    terms = kept[:, chunk.start : chunk.start + shard.chunk] if chunk.start < count else shard.terms
                    if x_hat is not None and factor is not None and chunk.start >= count:
                        w_hat = self._again(shard, chunk, last, grad_weight, inverse_norm)
                        kernels.cosine_exp(
                            problem, chunk.start, x_hat, w_hat, factor,
                            None if _bounded(s, normalize) else shift, terms, None, None, None, False,
                        )  # fmt: skip
                        if need_rows:
                            _product(terms[:, : len(chunk)], w_hat.to(shard.panel_dtype), products.next())
                    _grad_centres(kernels, shard, chunk, terms, x_factored, inverse_norm, grad_weight, upstream)
                if need_rows and again:
                    rows = rows + products.total() if rows.numel() else products.total()
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

    def _product_now(
        self,
        problem: Problem,
        kept: Tensor,
        w_hat: Tensor,
        x_factored: Tensor | None,
        inverse_norm: Tensor,
        grad_weight: Tensor,
        upstream: Tensor | None,
    ) -> tuple[Tensor, bool]:
        """E·ŵ, which the forward pass has left to this one; and whether the centres' gradient was made beside it."""
        terms, shape = kept[:, : problem.weight.shape[0]], (kept.shape[0], w_hat.shape[1])
        count = 0 if x_factored is None else self.kernels.parts_beside(problem)
        if x_factored is not None and count:
            parts = inverse_norm.new_empty(count, *shape)
            if self.kernels.grad_both(
                terms, x_factored, w_hat, problem.weight, inverse_norm, grad_weight, upstream, parts
            ):  # fmt: skip
                return parts, True
        return _product(terms, w_hat.to(terms.dtype), inverse_norm.new_empty(shape)), False

    def _again(self, shard: Shard, chunk: range, last: Tensor | None, grad_weight: Tensor, inverse_norm: Tensor) -> Tensor:
        """ŵ of a chunk in the backward pass: left from the forward pass, or made in the memory of its gradient."""
        first = shard.weight.shape[0] - (0 if last is None else last.shape[0])
        if last is not None and chunk.start >= first:
            return last[chunk.start - first : chunk.stop - first]
        return shard.prepare(self.kernels, chunk, shard.room_in(grad_weight, chunk), inverse_norm)


def _grad_centres(
    kernels: Kernels,
    shard: Shard,
    classes: range,
    terms: Tensor,
    x_factored: Tensor,
    inverse_norm: Tensor,
    grad_weight: Tensor,
    upstream: Tensor | None,
) -> None:
    """The gradient of a chunk's centres but for the targets' part: at once, or a few thousand classes at a time."""
    start, count = classes.start, len(classes)
    chunk = slice(start, classes.stop)
    if kernels.grad_centres(
        terms[:, :count], x_factored, shard.weight[chunk], inverse_norm[chunk], grad_weight[chunk], upstream
    ):
        return
    piece = chunking.finish_size(shard.width)
    in_place = grad_weight.dtype == torch.float32 and grad_weight.shape[1] == shard.width
    buffer = x_factored.new_empty(0 if in_place else min(piece, count), shard.width, dtype=torch.float32)
    for first in range(0, count, piece):
        n = min(piece, count - first)
        mine = slice(start + first, start + first + n)
        target = grad_weight[mine]
        unit = _product(terms[:, first : first + n].T, x_factored, target if in_place else buffer[:n])
        kernels.finish_centres(unit, shard.weight[mine], inverse_norm[mine], target, upstream)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` in float32, into ``out``."""
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
    if not replayed_on(device) or not 0 < B * C <= REPLAYED_LOGITS or chunking.chunk_size(B, D) < C:
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


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (save_bytes, predict, need_rows, need_weight) = Problem(*arguments[:7]), arguments[7:]
    features, weight, labels = problem[:3]
    (B, D), C = features.shape, weight.shape[0]
    vectors = [features.new_empty(B, dtype=torch.float32) for _ in range(4)]
    kept = padded(chunking.kept_count(B, C, D, problem.compute_dtype, save_bytes))
    has_rows = need_rows and (not need_weight or kept > 0)
    return (
        *vectors,
        features.new_empty(C, dtype=torch.float32),
        features.new_empty(B, kept, dtype=panel_dtype(problem.compute_dtype)),
        features.new_empty(0, dtype=torch.float32),
        features.new_empty((B, padded(D)) if has_rows else 0, dtype=torch.float32),
        features.new_empty(B if predict else 0, dtype=torch.float32),
        labels.new_empty(B if predict else 0, dtype=torch.int64),
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
