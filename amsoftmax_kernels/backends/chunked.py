"""The decomposition in chunks of classes, on PyTorch's own matrix products: any device, any dtype, no compiler.

A chunk's logits are a panel ``[chunk, B]`` that stays in a core's cache: on a CPU each thread takes chunks of its own
(:mod:`.streams`). With E = 2^(log2(e)·logit − shift), the target masked:

    forward     z = Σ_chunks Eᵀ1
    backward    dx̂ = a∘(Eᵀŵ) + τ∘ŵ_y     dŵ = E(a∘x̂) + scatter(τ∘x̂)     then the normalizations' Jacobians

Half-precision products run with operands in that dtype on a GPU. On a CPU they run in float32: there PyTorch has no
half-precision product with a float32 result, and cosines rounded to bfloat16 cost more accuracy than all else together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import accumulate_dtype, no_autocast
from ..operators import GRADS_SCHEMA, PROBLEM_SCHEMA, gradients_fake, is_traced, register
from . import Forward, Needs, Problem, Request, Upstream, one_chunk, streams
from . import margin as vectors
from .budget import kept_classes
from .host_memory import advise_huge_pages
from .norms import across, are_usual
from .products import product_nt
from .row_sums import RowSums
from .shard import (
    LOG2E,
    Pieces,
    Shard,
    alone,
    chunk_of,
    panel_dtype,
    prepared,
    streams_of,
    times,
)
from .targets import TargetPair
from .update import Update


def unavailable_reason() -> str | None:
    return None


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    return "it takes float64, which this device has not" if device.type == "mps" else None


def forward(problem: Problem, request: Request) -> Forward:
    op = torch.ops.amsoftmax_kernels.chunked_forward if is_traced(problem.features) else _forward
    out = Forward(*op(*problem, request.save_bytes, request.predict))
    if request.margin is None:
        return out
    loss, derivatives = _additive_margin(problem, out, request.margin, request.mean)
    return out._replace(loss=loss, derivatives=derivatives)


def backward(
    problem: Problem, saved: Forward, upstream: Upstream, needs: Needs, update: Update | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if update is not None:
        return _backward(*problem, *saved[1:7], *upstream, *needs, update=update)
    op: Any = torch.ops.amsoftmax_kernels.chunked_backward if is_traced(problem.features) else _backward
    grads: tuple[Tensor, Tensor, Tensor] = op(*problem, *saved[1:7], *upstream, *needs)
    return grads


def _additive_margin(problem: Problem, saved: Forward, margin: float, mean: bool) -> tuple[Tensor, Tensor]:
    if is_traced(problem.features) or streams_of(problem) == 1:
        return vectors.additive_margin(problem, saved, margin, mean)
    # A logarithm is split, however short.
    return streams.alone(lambda: vectors.additive_margin(problem, saved, margin, mean))


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (save_bytes, predict) = Problem(*arguments[:9]), arguments[9:]
    features, weight, labels = problem[:3]
    B, C = len(features), len(weight)
    with no_autocast(features.device):
        short = None
        if one_chunk.serves(problem, chunk_of(problem)):
            short = one_chunk.forward(problem, accumulate_dtype(problem.compute_dtype), predict)
        if short is not None:
            if short.kept.numel() * short.kept.element_size() > save_bytes:
                short = short._replace(kept=short.kept.new_empty(0, len(labels)), kept_shift=short.kept_shift[:0])
            return short[:10]  # all but the loss
        count = streams_of(problem)
        pair, shard = prepared(problem, count)
        K = kept_classes(B, C, shard.panel_dtype, save_bytes, shard.chunk)
        inverse_norm = shard.x.new_zeros(C)
        kept = advise_huge_pages(weight.new_empty(K, B, dtype=shard.panel_dtype))
        kept_shift = shard.x.new_zeros(-(-K // shard.chunk), B)
        pieces = Pieces.of(shard, inverse_norm, kept)

        def work(chunks: Iterable[int]) -> RowSums:
            sums = RowSums.none(shard.x, shard.bounded, predict)
            for index in chunks:
                _forward_chunk(shard, index, pieces, sums, kept_shift, predict)
            return sums

        total = RowSums.none(shard.x, shard.bounded, predict)
        for sums in streams.run(count, shard.chunks(), work):
            total.add(sums, shard.bounded)
        best, best_class = total.best, total.best_class
        if predict:
            # ‖x‖ = 0 without normalize_features: every cosine is 0.
            best = torch.where(best == 0, best, best / (shard.scale * LOG2E))
            best_class = best_class.div(problem.subcentres, rounding_mode="floor") if problem.subcentres > 1 else best_class
        ignored = labels < 0
        norm = pair.x_norm.to(shard.dtype).masked_fill(ignored, 1)
        z = total.z.to(shard.dtype).masked_fill_(ignored, 0)
        rows = z.new_empty(0)  # made in the backward pass, where E is at hand
        return (
            z, total.shift, pair.cosine.to(shard.dtype), norm, inverse_norm, kept, kept_shift, rows, best, best_class
        )  # fmt: skip


def _forward_chunk(shard: Shard, index: int, pieces: Pieces, sums: RowSums, kept_shift: Tensor, predict: bool) -> None:
    w, inverse = pieces.measured(shard, index)
    panel = shard.logits(shard.in_products(w, inverse), inverse)
    shard.keep_nearest_(panel)
    if predict or not shard.bounded:
        shard.targets.mask_(panel, index, -math.inf)
    if predict:
        maximum, where = panel.max(0)
        sums.take_best(maximum, where + index * shard.chunk)
    shard.filter_(panel)
    if not shard.bounded:
        sums.raise_shift(panel.amax(0))
        panel -= sums.shift
    kept = pieces.kept[index] if index < len(pieces.kept) else None
    terms = torch.exp2(panel, out=kept if kept is not None and kept.dtype == panel.dtype else panel)
    if shard.bounded and not predict:
        shard.targets.mask_(terms, index, 0.0)
    sums.z += terms.sum(0)
    if kept is not None:
        if kept.dtype != panel.dtype:
            kept.copy_(terms)
        if not shard.bounded:
            kept_shift[index] = sums.shift


def _backward(*arguments: Any, update: Update | None = None) -> tuple[Tensor, Tensor, Tensor]:
    problem, saved, grads, needs = Problem(*arguments[:9]), arguments[9:15], arguments[15:19], Needs(*arguments[19:])
    features, weight, normalize_features = problem.features, problem.weight, problem.normalize_features
    scale = features if problem.scale is None else problem.scale
    shift, cosine, norm, inverse_norm, kept, kept_shift = saved
    unused = norm.new_empty(0)
    known = Forward(unused, shift, cosine, norm, inverse_norm, kept, kept_shift, unused, unused, unused)
    upstream = Upstream(*grads)
    with no_autocast(features.device):
        if one_chunk.serves(problem, chunk_of(problem)) and one_chunk.regular(norm, inverse_norm):
            of_features, of_weight, of_scale = one_chunk.backward(problem, known, upstream, needs.scale)
            if update is not None and needs.weight:
                update.apply_(0, update.unscaled(of_weight))
                needs = needs._replace(weight=False)
            return (
                of_features.to(features.dtype) if needs.features else features.new_empty(0),
                of_weight.to(weight.dtype) if needs.weight else weight.new_empty(0),
                of_scale.to(scale.dtype) if needs.scale else scale.new_empty(0),
            )
        count = 1 if update is not None and update.blocks is not None else streams_of(problem)
        pair, shard = prepared(problem, count)
        dense = needs.weight and update is None
        grad_weight = advise_huge_pages(weight.new_empty(weight.shape if dense else 0))
        if len(features) == 0:
            grad_weight.zero_()
            if update is not None and needs.weight:
                update.without_gradient_(len(weight), shard.dtype)
        centres = None
        if needs.weight:
            centres = alone(count, lambda: _CentresGradient.of(shard, pair, upstream, grad_weight, update))
        need_rows = needs.features or (needs.scale and normalize_features)

        usual = inverse_norm.device.type != "cpu" or alone(count, lambda: are_usual(inverse_norm))
        pieces = Pieces.of(shard, inverse_norm, kept)

        def work(chunks: Iterable[int]) -> Tensor | None:
            sums = shard.x.new_zeros(shard.x.shape) if need_rows else None  # Eᵀŵ
            for index in chunks:
                _backward_chunk(shard, index, pieces, usual, known, centres, sums)
            return sums

        parts: list[Tensor | None] = []
        if need_rows or centres is not None:
            parts = streams.run(count, shard.chunks(), work)
        grad_features = features.new_empty(0)
        grad_scale = scale.new_zeros(() if needs.scale else 0)
        if need_rows:
            of_x, of_scale = alone(count, lambda: _finish_rows(shard, pair, parts, upstream, problem))
            if needs.features:
                grad_features = of_x.to(features.dtype)
            if needs.scale and normalize_features:
                grad_scale = of_scale.to(scale.device, scale.dtype)
        return grad_features, grad_weight, grad_scale


@dataclass
class _CentresGradient:
    """What the gradient of the centres is made of, beside E."""

    grad: tuple[Tensor, ...]  # [chunk, D], to be written; none where the centres themselves are updated
    update: Update | None
    x_factored: Tensor  # [D, B] a∘x̂, times the logits' scale, in E's dtype
    target_rows: Tensor  # [B, D] the targets' part, row by row
    common: Tensor | None  # [D] in dŵ of every class

    @classmethod
    def of(cls, shard: Shard, pair: TargetPair, upstream: Upstream, grad: Tensor, update: Update | None) -> _CentresGradient:
        row_factor, by_cosine, common = upstream.row_factor, upstream.cosine, upstream.directions
        if update is not None:
            row_factor, by_cosine = update.unscaled(row_factor), update.unscaled(by_cosine)
            common = None if common is None else update.unscaled(common)
        x_factored = times(shard.x, row_factor * shard.scale, 1.0).to(shard.panel_dtype)
        target_rows = pair.grad_weight(by_cosine).to(shard.dtype)
        chunks = grad.split(shard.chunk) if update is None else ()
        common = None if common is None else common.to(shard.dtype)
        return cls(chunks, update, x_factored.T.contiguous(), target_rows, common)

    def write(self, shard: Shard, index: int, terms: Tensor, w: Tensor, inverse: Tensor, power: Tensor | None) -> None:
        """The gradient of a chunk's centres, which are ``w`` over ``power``: dŵ, its part across w. Or their update."""
        grad = product_nt(terms, self.x_factored)  # dŵ, over ‖w‖ but for half precision
        if shard.half:
            grad *= inverse
        if self.common is not None:
            grad.addr_(inverse[:, 0], self.common)
        grad = across(grad, w, inverse)
        if power is not None:
            grad *= power
        shard.targets.add_(grad, index, self.target_rows)
        if self.update is not None:
            self.update.apply_(index * shard.chunk, grad)
        else:
            self.grad[index].copy_(grad)


def _backward_chunk(
    shard: Shard, index: int, pieces: Pieces, usual: bool, saved: Forward, centres: _CentresGradient | None,
    rows: Tensor | None,
) -> None:  # fmt: skip
    w, inverse, power = pieces.centres(shard, index, usual)
    operand = shard.in_products(w, inverse)
    if index < len(pieces.kept):
        terms = pieces.kept[index]
        if not shard.bounded:
            terms = terms * torch.exp2(saved.kept_shift[index] - saved.shift)
    else:
        terms = shard.logits(operand, inverse)
        shard.keep_nearest_(terms)
        shard.filter_(terms)
        if not shard.bounded:
            terms -= saved.shift
        shard.targets.mask_(terms.exp2_(), index, 0.0)
    if shard.half:
        terms = terms.to(shard.panel_dtype)
    else:
        terms = torch.mul(terms, inverse, out=shard.temporary("terms", *terms.shape))
    if rows is not None:
        rows += product_nt(terms.T, operand.to(shard.panel_dtype).T)
    if centres is not None:
        centres.write(shard, index, terms, w, inverse, power)


def _finish_rows(
    shard: Shard, pair: TargetPair, parts: list[Tensor | None], upstream: Upstream, problem: Problem
) -> tuple[Tensor, Tensor]:
    """The gradients of the features and of the scale, from parts of Eᵀŵ ``[B, D]``."""
    rows64 = torch.zeros_like(pair.x)
    for part in parts:
        assert part is not None
        rows64 += part
    rows64.masked_fill_((problem.labels < 0)[:, None], 0)  # E is 0 there, but a centre may be infinite
    row_coefficient = upstream.row_factor.double()
    x_coefficient = torch.zeros_like(row_coefficient) if upstream.norm is None else upstream.norm.double()
    grad_scale = row_coefficient.new_zeros(())
    if problem.normalize_features:
        along = (pair.x * rows64).sum(1)  # x̂·(Eᵀŵ)
        grad_scale = (row_coefficient * along).sum()
        row_coefficient = row_coefficient * shard.scale * pair.x_inverse
        x_coefficient = x_coefficient - row_coefficient * along
    else:
        row_coefficient = row_coefficient.masked_fill(pair.x_inverse == 0, 0)  # a zero row has no direction
    return pair.grad_features(upstream.cosine, rows64, row_coefficient, x_coefficient), grad_scale


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (save_bytes, predict) = Problem(*arguments[:9]), arguments[9:]
    features, weight, labels = problem[:3]
    dtype, of_terms = accumulate_dtype(problem.compute_dtype), panel_dtype(problem.compute_dtype, features.device)
    batch, num_classes = features.shape[0], weight.shape[0]
    chunk = chunk_of(problem)
    kept = kept_classes(batch, num_classes, of_terms, save_bytes, chunk)
    vectors = [features.new_empty(batch, dtype=dtype) for _ in range(4)]
    return (
        *vectors,
        features.new_empty(num_classes, dtype=dtype),
        features.new_empty(kept, batch, dtype=of_terms),
        features.new_empty(-(-kept // chunk), batch, dtype=dtype),
        features.new_empty(0, dtype=dtype),
        features.new_empty(batch if predict else 0, dtype=dtype),
        labels.new_empty(batch if predict else 0),
    )


register(
    "chunked_forward",
    f"({PROBLEM_SCHEMA}, SymInt save_bytes, bool predict) -> ({', '.join(['Tensor'] * 10)})",
    _forward,
    _forward_fake,
)
register(
    "chunked_backward",
    f"({PROBLEM_SCHEMA}, Tensor shift, Tensor cosine, Tensor norm, Tensor inverse_norm, Tensor kept, Tensor kept_shift, "
    f"{GRADS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _backward,
    gradients_fake,
)
