"""The decomposition on fused kernels, in Triton or in C++: what is launched on which chunk of classes.

    forward     x̂, the target's cosine; for each chunk: ŵ, then E = 2^(log2(e)·logit − shift) and its row sums z in one
                kernel, then Eŵ by a library product where E is kept
    backward    a∘x̂; for each chunk: E as it was kept, or ŵ, E and Eŵ again; dŵ = Eᵀ(a∘x̂) by a library product and
                the normalization's Jacobian in a pass after it, or both in one kernel; then dx and the targets' part of dw

Autocast reaches none of it: kernels are ours, and products write where they are told. Normalization is a pass of its own, 6
bytes a weight: inside the cosine kernel each block of rows would read the float32 centres again. E is stored because both
gradients are plain products of it; what does not fit ``save_bytes`` goes through the memory of one chunk. E is bfloat16 for
half-precision operands, as float16 cannot hold its range.

Logits past scale 64, or of a scale that is not known on the host, take a first pass for the row maxima alone, so that E has
one shift a row and stays a plain matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..operators import GRADS_SCHEMA, PROBLEM_SCHEMA, gradients_fake, is_traced, register
from . import Forward, Needs, Problem, Request, Upstream, chunking, host_scale
from .budget import BOUNDED_SCALE
from .chunking import padded, panel_dtype
from .kernels import Cosines, Factored, Grads, Kernels, Rows, TargetParts
from .parts import Maxima, Sums
from .subcentres import Columns
from .update import Update, own_centres


class Fused:
    """A backend's functions (:class:`amsoftmax_kernels.backends.Backend`), as operators named after it."""

    def __init__(self, name: str, kernels: Kernels) -> None:
        self.name, self.kernels = name, kernels
        register(
            f"{name}_forward",
            f"({PROBLEM_SCHEMA}, SymInt save_bytes, bool predict, bool need_rows, float? margin, bool mean) -> "
            f"({', '.join(['Tensor'] * 12)})",
            lambda *arguments: self._forward(*_forward_arguments(*arguments)),
            lambda *arguments: _buffers(*_forward_arguments(*arguments)),
        )
        register(
            f"{name}_backward",
            f"({PROBLEM_SCHEMA}, Tensor shift, Tensor cosine, Tensor norm, Tensor inverse_norm, Tensor kept, Tensor rows, "
            f"{GRADS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
            lambda *arguments: self._backward(*_backward_arguments(*arguments)),
            gradients_fake,
        )

    def forward(self, problem: Problem, request: Request) -> Forward:
        if is_traced(problem.features):
            return Forward(*getattr(torch.ops.amsoftmax_kernels, f"{self.name}_forward")(*problem, *request))
        return self._forward(problem, request)

    def backward(
        self, problem: Problem, saved: Forward, upstream: Upstream, needs: Needs, update: Update | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if update is None and is_traced(problem.features):
            op: Any = getattr(torch.ops.amsoftmax_kernels, f"{self.name}_backward")
            grads: tuple[Tensor, Tensor, Tensor] = op(*problem, *saved[1:6], saved.rows, *upstream, *needs)
            return grads
        return self._backward(problem, saved, upstream, needs, update)

    def _forward(self, problem: Problem, request: Request) -> Forward:
        features, labels, columns = problem.features, problem.labels, Columns(problem.subcentres)
        (B, D), N = features.shape, columns.count(problem.weight.shape[0])
        with on_device(features.device):
            out = _buffers(problem, request)
            if B == 0:
                return out
            x_hat = features.new_empty(B, padded(D), dtype=problem.compute_dtype)
            factor, s = torch.empty_like(out.norm), scale_of(problem)
            rows = Rows(x_hat, factor, out.cosine, out.norm, out.shift)
            self.kernels.prepare_rows(problem, s, rows)
            spans, of_columns = chunking.spans(B, D, N), columns.problem(problem)
            centres = _Centres(self.kernels, problem, columns, out.inverse_norm, len(spans[0]))
            streams = self.kernels.streams(problem, len(spans[0]))
            if _bounded(problem, s):
                rows = Rows(x_hat, factor, out.cosine, out.norm, None)
            else:
                self._find_shifts(of_columns, rows, centres, spans, streams)
            sums = Sums(features, len(spans), streams, B)
            maxima = Maxima(self.kernels, features, labels, len(spans), streams, B) if request.predict else None
            for span in spans:
                w_hat = centres.of(span)
                terms = _kept_terms(out.kept, span)
                best, best_class = (None, None) if maxima is None else maxima.next()
                self.kernels.cosine_exp(of_columns, span.start, rows, w_hat, Cosines(terms, sums.next(), best, best_class))
                if terms is not None and request.need_rows:
                    _multiply(terms[:, : len(span)], w_hat, out.rows, first=span.start == 0)
            if request.margin is None:
                self.kernels.reduce_sums(sums.parts, labels, out.z)
            else:
                self.kernels.additive_margin(problem, sums.parts, out, s, request.margin, request.mean)
            if maxima is not None:
                self.kernels.reduce_best(*maxima.parts, out.best, out.best_class)
                if columns.group > 1:
                    out.best_class.copy_(out.best_class.div(columns.group, rounding_mode="floor"))
            return out

    def _find_shifts(
        self, problem: Problem, rows: Rows, centres: _Centres, spans: list[range], streams: int
    ) -> None:  # fmt: skip
        """The largest logit of each row that needs one, into ``rows.shift``."""
        assert rows.shift is not None
        maxima = Maxima(self.kernels, problem.features, problem.labels, len(spans), streams, len(problem.features))
        for span in spans:
            best, best_class = maxima.next()
            out = Cosines(best=best, best_class=best_class)
            self.kernels.cosine_exp(problem, span.start, rows._replace(shift=None), centres.of(span), out)
        self.kernels.reduce_shift(*maxima.parts, rows.factor, rows.shift)

    def _backward(
        self, problem: Problem, saved: Forward, upstream: Upstream, needs: Needs, update: Update | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_norm = None if upstream.norm is None else upstream.norm.contiguous()
        row_factor, by_cosine = upstream.row_factor.contiguous(), upstream.cosine.contiguous()
        upstream = upstream._replace(row_factor=row_factor, cosine=by_cosine, norm=grad_norm)
        features, weight, normalize = problem.features, problem.weight, problem.normalize_features
        with on_device(features.device):
            grad_features = features.new_empty(features.shape if needs.features else 0)
            grad_weight = weight.new_empty(weight.shape if needs.weight and update is None else 0)
            grad_scale = (features if problem.scale is None else problem.scale).new_zeros(() if needs.scale else 0)
            if features.shape[0] == 0:
                if update is not None and needs.weight:
                    update.without_gradient_(weight.shape[0], torch.float32)
                return grad_features, grad_weight.zero_(), grad_scale
            s = scale_of(problem)
            # Σ_j E·cos_j, the gradient of s through z, is x̂·(Eŵ): it takes the rows too.
            of_scale = needs.scale and normalize
            need_rows = needs.features or of_scale
            finish: Callable[[range, Tensor, Tensor], None] | None = None  # a chunk's centres, from E and a∘x̂
            own, common = problem, upstream.directions  # whose centres the targets are: those of before the update
            if needs.weight and update is not None:
                own, slots = own_centres(problem)
                parts = self._target_parts(own, slots, saved, s, upstream)
                finish = functools.partial(self._update_centres, problem, saved.inverse_norm, common, parts, update)
            elif needs.weight:
                finish = functools.partial(self._grad_centres, problem, saved.inverse_norm, common, grad_weight)
            unit_rows = self._chunks(problem, saved, s, upstream.row_factor, need_rows, finish)
            of_s = features.new_empty(features.shape[0], dtype=torch.float64) if of_scale else None
            dense = grad_weight if needs.weight and update is None else None
            grads = Grads(grad_features if needs.features else None, dense, of_s)
            if any(each is not None for each in grads):
                self.kernels.finish_rows(own, saved._replace(rows=unit_rows), s, upstream, grads)
            if of_s is not None:
                grad_scale = of_s.sum().to(grad_scale.device, grad_scale.dtype)
            return grad_features, grad_weight, grad_scale

    def _chunks(
        self, problem: Problem, saved: Forward, s: float | Tensor, row_factor: Tensor, need_rows: bool,
        finish: Callable[[range, Tensor, Tensor], None] | None,
    ) -> Tensor:  # fmt: skip
        """The B×C work of the backward pass: hands E and a∘x̂ of each chunk to ``finish``, and returns Eŵ.

        E has the columns that pad its rows.
        """
        features, (B, D), columns = problem.features, problem.features.shape, Columns(problem.subcentres)
        spans, unit_rows = chunking.spans(B, D, columns.count(problem.weight.shape[0])), saved.rows
        again = [span for span in spans if span.start >= saved.kept.shape[1]]
        if finish is None and not (again and need_rows):
            return unit_rows
        factored = self._factored(problem, saved.norm, s, row_factor, recompute=bool(again))
        if again:
            assert factored.x_hat is not None and factored.factor is not None
            shift = None if _bounded(problem, s) else saved.shift
            rows = Rows(factored.x_hat, factored.factor, saved.cosine, saved.norm, shift)
            of_columns = columns.problem(problem)
            centres = _Centres(self.kernels, problem, columns, saved.inverse_norm, len(spans[0]))
            room = features.new_empty(B, padded(len(again[0])), dtype=factored.x_factored.dtype)
            if need_rows:  # what is saved stays as it is
                unit_rows = unit_rows.clone() if unit_rows.numel() else features.new_empty(B, padded(D), dtype=torch.float32)
        for span in spans:
            terms = _kept_terms(saved.kept, span)
            if terms is None:
                terms, w_hat = room, centres.of(span)
                self.kernels.cosine_exp(of_columns, span.start, rows, w_hat, Cosines(terms))
                if need_rows:
                    _multiply(terms[:, : len(span)], w_hat, unit_rows, first=span.start == 0)
            if finish is not None:
                finish(span, terms, factored.x_factored)
        return unit_rows

    def _factored(self, problem: Problem, norm: Tensor, s: float | Tensor, row_factor: Tensor, recompute: bool) -> Factored:
        features = problem.features
        shape = features.shape[0], padded(features.shape[1])
        out = Factored(
            features.new_empty(shape, dtype=panel_dtype(problem.compute_dtype)),
            features.new_empty(shape, dtype=problem.compute_dtype) if recompute else None,
            torch.empty_like(norm) if recompute else None,
        )
        self.kernels.factor_rows(problem, norm, row_factor, s, out)
        return out

    def _grad_centres(
        self, problem: Problem, inverse_norm: Tensor, common: Tensor | None, grad: Tensor, span: range, terms: Tensor,
        x_factored: Tensor,
    ) -> None:  # fmt: skip
        """The gradient of a chunk's centres but for the targets' part: at once, or a few thousand classes at a time."""
        columns = Columns(problem.subcentres)
        chunk, unpadded = columns.centres(span), columns.group == columns.subcentres
        weight, inverse, grad = _of(problem.weight, chunk), _of(inverse_norm, chunk), _of(grad, chunk)
        at_once = unpadded and common is None
        if at_once and self.kernels.grad_centres(terms, x_factored, weight, inverse, grad):
            return
        in_place = unpadded and grad.dtype == torch.float32 and grad.shape[1] == x_factored.shape[1]
        for places, unit in _unit_gradients(terms, x_factored, len(span), common, grad if in_place else None):
            mine = columns.centres(places)
            self.kernels.finish_centres(columns.gather(unit), weight[mine], inverse[mine], grad[mine])

    def _update_centres(
        self, problem: Problem, inverse_norm: Tensor, common: Tensor | None, parts: TargetParts, update: Update,
        span: range, terms: Tensor, x_factored: Tensor,
    ) -> None:  # fmt: skip
        """The step of a chunk's centres, a few thousand classes at a time."""
        update.tally.begun, columns = True, Columns(problem.subcentres)
        for places, unit in _unit_gradients(terms, x_factored, len(span), common, None):
            unit, classes = columns.gather(unit), columns.centres(span[places])
            weight, inverse, of_them = (
                problem.weight[classes],
                inverse_norm[classes],
                parts._replace(slots=parts.slots[classes]),
            )
            apply = functools.partial(self.kernels.update_centres, inverse_norm=inverse, parts=of_them, update=update)
            if update.blocks is None:
                apply(unit, weight, start=classes.start, whole=False, out=None)
                continue
            grad = torch.empty_like(weight, dtype=torch.float32)
            apply(unit, weight, start=classes.start, whole=False, out=grad)
            for start, block in update.blocks.of(classes.start, grad):  # added up over the replicas
                apply(block, update.centres(start, len(block)), start=start, whole=True, out=None)

    def _target_parts(
        self, own: Problem, slots: Tensor, saved: Forward, s: float | Tensor, upstream: Upstream
    ) -> TargetParts:
        """The targets' part of dw, apart from the rest."""
        rows = own.weight.new_zeros(own.weight.shape, dtype=torch.float32)
        self.kernels.finish_rows(own, saved, s, upstream, Grads(None, rows, None))
        return TargetParts(slots, rows)


def _unit_gradients(
    terms: Tensor, x_factored: Tensor, N: int, common: Tensor | None, out: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """dŵ = Eᵀ(a∘x̂) of a few thousand classes at a time, in ``out [N, width]`` or in memory that is used again.

    And ``common [D]``, which is the same of all classes, if there is such a part.
    """
    width = x_factored.shape[1]
    piece = min(chunking.finish_size(width), N)
    room = x_factored.new_empty(piece, width, dtype=torch.float32) if out is None else out
    for first in range(0, N, piece):
        mine = slice(first, min(first + piece, N))
        target = room[: mine.stop - first] if out is None else out[mine]
        _product(terms[:, mine].T, x_factored, target)
        if common is not None:
            target[:, : common.shape[0]] += common
        yield mine, target


class _Centres:
    """ŵ of one chunk of ``most`` columns at a time; asked twice for the same chunk it is made once."""

    def __init__(self, kernels: Kernels, problem: Problem, columns: Columns, inverse_norm: Tensor, most: int) -> None:
        self._kernels, self._weight, self._inverse_norm, self._columns = kernels, problem.weight, inverse_norm, columns
        self._room = problem.weight.new_empty(most, padded(problem.weight.shape[1]), dtype=problem.compute_dtype)
        self._made: range | None = None

    def of(self, span: range) -> Tensor:
        """``[n, width]``."""
        w_hat = _of(self._room, range(len(span)))
        if span != self._made:
            mine, columns = self._columns.centres(span), self._columns
            unpadded = columns.group == columns.subcentres
            made = w_hat if unpadded else torch.empty_like(w_hat[: mine.stop - mine.start])
            self._kernels.prepare_centres(_of(self._weight, mine), made, _of(self._inverse_norm, mine))
            if not unpadded:
                columns.spread(made, w_hat)
            self._made = span
        return w_hat


def _buffers(problem: Problem, request: Request) -> Forward:
    """What the forward pass writes, of an empty batch as it must be."""
    features, weight, labels = problem[:3]
    (B, D), C = features.shape, weight.shape[0]
    count = Columns(problem.subcentres).count(C)
    count = padded(chunking.kept_count(B, count, D, problem.compute_dtype, request.save_bytes))
    constant = request.margin is not None
    shift, cosine, norm = (features.new_empty(B, dtype=torch.float32) for _ in range(3))
    return Forward(
        features.new_empty(0 if constant else B, dtype=torch.float32), shift, cosine, norm,
        inverse_norm=features.new_empty(C, dtype=torch.float32),
        kept=features.new_empty(B, count, dtype=panel_dtype(problem.compute_dtype)),
        kept_shift=features.new_empty(0, dtype=torch.float32),
        rows=features.new_empty((B, padded(D)) if request.need_rows and count else 0, dtype=torch.float32),
        best=features.new_empty(B if request.predict else 0, dtype=torch.float32),
        best_class=labels.new_empty(B if request.predict else 0, dtype=torch.int64),
        derivatives=features.new_empty((3, B) if constant else 0, dtype=torch.float32),
        loss=features.new_empty(B if constant else 0, dtype=torch.float32),
    )  # fmt: skip


def _forward_arguments(*arguments: Any) -> tuple[Problem, Request]:
    """What the operators were given."""
    return Problem(*arguments[:9]), Request(*arguments[9:])


def _backward_arguments(*arguments: Any) -> tuple[Problem, Forward, Upstream, Needs]:
    shift, cosine, norm, inverse_norm, kept, rows = arguments[9:15]
    unused = norm  # the backward pass does not read the others
    saved = Forward(unused, shift, cosine, norm, inverse_norm, kept, unused, rows, unused, unused)
    return Problem(*arguments[:9]), saved, Upstream(*arguments[15:19]), Needs(*arguments[19:])


def _of(tensor: Tensor, rows: slice | range) -> Tensor:
    """The rows of a chunk of classes; of the only chunk the tensor itself, as a slice takes microseconds."""
    return tensor if rows.stop - rows.start == tensor.shape[0] else tensor[rows.start : rows.stop]


def _kept_terms(kept: Tensor, span: range) -> Tensor | None:
    """E of a chunk, with the columns that pad its last rows, as far as it is kept."""
    if span.start >= kept.shape[1]:
        return None
    whole = span.start == 0 and padded(span.stop) == kept.shape[1]
    return kept if whole else kept[:, span.start : padded(span.stop)]


def _multiply(terms: Tensor, w_hat: Tensor, total: Tensor, first: bool) -> None:
    """Add Eŵ of a chunk to ``total``, or begin with it."""
    w_hat = w_hat.to(terms.dtype)
    if first:
        _product(terms, w_hat, total)
    else:
        total += _product(terms, w_hat, torch.empty_like(total))


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` in float32, into ``out``."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # emulated: there is no such product here
        return torch.mm(a.float(), b.float(), out=out)
    torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    return out


def scale_of(problem: Problem) -> float | Tensor:
    """s as kernels take it: a number, or a tensor on the device; 1 where ‖x‖ takes its place."""
    if not problem.normalize_features:
        return 1.0
    s = host_scale(problem)
    if s is None:
        assert problem.scale is not None
        return problem.scale.to(torch.float32)
    return s


def _bounded(problem: Problem, s: float | Tensor) -> bool:
    """Whether no row can need a shift: known only for a scale that is a number."""
    return problem.normalize_features and isinstance(s, float) and s <= BOUNDED_SCALE


_AS_IT_IS = nullcontext()  # to make one takes a microsecond


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _AS_IT_IS
    return torch.cuda.device(device)


@functools.cache
def streams_for(slots: int, blocks: int, tiles: int) -> int:
    """Streams of classes for each block of rows: those that leave the least of the GPU idle, the fewest of equals."""

    def rounds(streams: int) -> int:
        return -(-blocks * streams // slots) * -(-tiles // streams)

    return min(range(1, min(tiles, max(8 * slots // max(blocks, 1), 1)) + 1), key=rounds)
