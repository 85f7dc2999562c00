"""The decomposition in chunks of classes, on PyTorch's own matrix products: any device, any dtype, no compiler.

A chunk's logits are a panel ``[chunk, B]`` that stays in the cache. With E = 2^(log2(e)·logit − shift), the target masked:

    forward     z = Σ_chunks Eᵀ1
    backward    dx̂ = a∘(Eᵀŵ) + τ∘ŵ_y     dŵ = E(a∘x̂) + scatter(τ∘x̂)     then the normalizations' Jacobians

Half-precision products run with operands in that dtype on a GPU. On a CPU they run in float32: there PyTorch has no
half-precision product with a float32 result, and cosines rounded to bfloat16 cost more accuracy than all else together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import accumulate_dtype, no_autocast
from ..operators import GRADS_SCHEMA, PROBLEM_SCHEMA, gradients_fake, is_traced, register
from . import Forward, Needs, Problem, Request, Upstream, host_scale, one_chunk
from .budget import BOUNDED_SCALE, kept_classes
from .host_memory import advise_huge_pages
from .margin import additive_margin as additive_margin
from .norms import are_usual, scaled
from .products import product_nt
from .targets import TargetPair, Targets

# Elements of a chunk of classes and its panel, chunk·(B + D): what two cores' L2 holds on a CPU (times measured at B from
# 64 to 4096 and D of 64 and 512 are flat within a factor of two of it); enough to fill a GPU elsewhere.
_CHUNK_ELEMENTS = {"cpu": 3 << 18}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 26

_LOG2E = math.log2(math.e)


def unavailable_reason() -> str | None:
    return None


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    return "it takes float64, which this device has not" if device.type == "mps" else None


def forward(problem: Problem, request: Request) -> Forward:
    op = torch.ops.amsoftmax_kernels.chunked_forward if is_traced(problem.features) else _forward
    return Forward(*op(*problem, request.save_bytes, request.predict))


def backward(problem: Problem, saved: Forward, upstream: Upstream, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    op: Any = torch.ops.amsoftmax_kernels.chunked_backward if is_traced(problem.features) else _backward
    grads: tuple[Tensor, Tensor, Tensor] = op(*problem, *saved[1:7], *upstream, *needs)
    return grads


@dataclass
class _Shard:
    """The inputs of both passes, in the dtypes the chunks are computed in."""

    weight: Tensor  # [C, D] as given
    x: Tensor  # [B, D] x̂ in the accumulate dtype, zero where the row is ignored
    scale: float | Tensor  # s, or ‖x‖ [B] without normalize_features
    dtype: torch.dtype  # accumulate dtype
    operand_dtype: torch.dtype  # of the cosines' product
    panel_dtype: torch.dtype  # of E
    bounded: bool  # no running maximum is needed
    interclass_filter: float
    chunk: int  # classes a chunk

    @classmethod
    def of(cls, pair: TargetPair, problem: Problem) -> _Shard:
        weight, normalize, compute_dtype = problem.weight, problem.normalize_features, problem.compute_dtype
        dtype, device = accumulate_dtype(compute_dtype), weight.device
        half = compute_dtype != dtype and device.type != "cpu"
        known = host_scale(problem)  # that of a scale on a GPU is not read: it may be large
        norm = pair.x_norm.to(dtype)
        s: float | Tensor = norm + (norm - norm)  # NaN where it overflows
        if normalize:
            s = problem.scale.to(dtype) if known is None and problem.scale is not None else known or 0.0
        x = pair.x.to(dtype)
        return cls(
            weight, x, s, dtype,
            operand_dtype=compute_dtype if half else dtype,
            panel_dtype=_panel_dtype(compute_dtype, device),
            bounded=normalize and known is not None and known <= BOUNDED_SCALE,
            interclass_filter=problem.interclass_filter,
            chunk=_chunk_size(x.shape[0], x.shape[1], device),
        )  # fmt: skip

    def centres(self, start: int) -> Tensor:
        """A chunk's centres in the accumulate dtype, ``[chunk, D]``."""
        return self.weight[start : start + self.chunk].to(self.dtype)

    def operand(self, w: Tensor, inverse: Tensor) -> Tensor:
        """What stands for a chunk's centres in the products."""
        if self.operand_dtype == self.dtype:
            return w  # the inverse norm is multiplied into the panel, which is smaller
        return (w * inverse[:, None]).to(self.operand_dtype)

    def logits(self, operand: Tensor, inverse: Tensor, x: Tensor) -> Tensor:
        """log2(e) times a chunk's logits, ``[chunk, B]``, for ``x`` in the operand dtype, before the filter."""
        panel = product_nt(operand, x)
        if isinstance(self.scale, Tensor) and self.scale.dim():
            panel.mul_(self.scale)  # after the product: x itself may be past float16's range
            return panel.mul_((inverse * _LOG2E)[:, None] if self.operand_dtype == self.dtype else _LOG2E)
        if self.operand_dtype == self.dtype:
            return panel.mul_((inverse * (self.scale * _LOG2E))[:, None])
        return panel.mul_(self.scale * _LOG2E)

    def filter_(self, panel: Tensor) -> None:
        """Leave out of a chunk's logits those of a larger cosine than the filter allows."""
        if math.isfinite(self.interclass_filter):
            panel.masked_fill_(panel > self.scale * (self.interclass_filter * _LOG2E), -math.inf)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (save_bytes, predict) = Problem(*arguments[:8]), arguments[8:]
    features, weight, labels = problem[:3]
    with no_autocast(features.device):
        short = None
        if _is_one_chunk(problem):
            short = one_chunk.forward(problem, accumulate_dtype(problem.compute_dtype), predict)
        if short is not None:
            if short.kept.numel() * short.kept.element_size() > save_bytes:
                short = short._replace(kept=short.kept.new_empty(0, len(labels)), kept_shift=short.kept_shift[:0])
            return short
        pair = TargetPair.of(features, weight, labels)
        shard = _Shard.of(pair, problem)
        targets = Targets(labels, weight.shape[0], shard.chunk)
        B, C = features.shape[0], weight.shape[0]
        K = kept_classes(B, C, shard.panel_dtype, save_bytes, shard.chunk)
        kept = advise_huge_pages(weight.new_empty(K, B, dtype=shard.panel_dtype))
        inverse_norm = shard.x.new_empty(C)
        kept_shift = shard.x.new_zeros(-(-kept.shape[0] // shard.chunk), B)
        x = shard.x.to(shard.operand_dtype)
        # Summed over chunks in float64, so that the error does not grow with C.
        z = x.new_zeros(B, dtype=torch.float64)
        shift = shard.x.new_full((B,), 0.0 if shard.bounded else torch.finfo(shard.dtype).min / 4)
        best = shard.x.new_full((B if predict else 0,), -math.inf)
        best_class = labels.new_full((B if predict else 0,), -1)
        for start in range(0, C if B else 0, shard.chunk):
            w, _, inverse, power = scaled(shard.centres(start))
            inverse_norm[start : start + shard.chunk] = inverse if power is None else inverse * power
            panel = shard.logits(shard.operand(w, inverse), inverse, x)
            if predict or not shard.bounded:
                targets.mask_(panel, start, -math.inf)
            if predict:
                maximum, index = panel.max(0)
                larger = maximum > best
                best = torch.where(larger, maximum, best)
                best_class = torch.where(larger, index + start, best_class)
            shard.filter_(panel)
            if not shard.bounded:
                maximum = torch.maximum(shift, panel.amax(0))
                z *= torch.exp2(shift - maximum)
                shift = maximum
                panel -= shift
            keep = start < kept.shape[0]
            terms = torch.exp2(panel, out=kept[start : start + shard.chunk] if keep and kept.dtype == panel.dtype else panel)
            if shard.bounded and not predict:
                targets.mask_(terms, start, 0.0)
            z += terms.sum(0)
            if keep:
                if kept.dtype != panel.dtype:
                    kept[start : start + shard.chunk] = terms
                kept_shift[start // shard.chunk] = shift
        if predict:
            # ‖x‖ = 0 without normalize_features: every cosine is 0.
            best = (best / (shard.scale * _LOG2E)).nan_to_num_(0.0, math.inf, -math.inf)
        ignored = labels < 0
        norm = pair.x_norm.to(shard.dtype).masked_fill(ignored, 1)
        z = z.to(shard.dtype).masked_fill_(ignored, 0)
        rows = z.new_empty(0)  # made in the backward pass, where E is at hand
        return z, shift, pair.cosine.to(shard.dtype), norm, inverse_norm, kept, kept_shift, rows, best, best_class


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    problem, saved, grads, needs = Problem(*arguments[:8]), arguments[8:14], arguments[14:17], arguments[17:]
    features, weight, labels, scale, _, normalize_features = problem[:6]
    scale = features if scale is None else scale
    shift, cosine, norm, inverse_norm, kept, kept_shift = saved
    row_factor, grad_cosine, grad_norm = grads
    need_features, need_weight, need_scale = needs
    with no_autocast(features.device):
        if _is_one_chunk(problem) and one_chunk.regular(norm, inverse_norm):
            unused = norm.new_empty(0)
            known = Forward(unused, shift, cosine, norm, inverse_norm, kept, kept_shift, unused, unused, unused)
            results = one_chunk.backward(problem, known, Upstream(*grads), need_scale)
            return tuple(
                grad.to(tensor.dtype) if need else tensor.new_empty(0)
                for grad, tensor, need in zip(results, (features, weight, scale), needs, strict=True)
            )
        pair = TargetPair.of(features, weight, labels)
        shard = _Shard.of(pair, problem)
        targets = Targets(labels, weight.shape[0], shard.chunk)
        need_rows = need_features or (need_scale and normalize_features)
        B, D, C = *features.shape, weight.shape[0]
        x = shard.x.to(shard.operand_dtype)
        x_factored = (shard.x * (row_factor * shard.scale)[:, None]).to(shard.panel_dtype)  # a∘x̂, times the logits' scale
        target_rows = pair.grad_weight(grad_cosine).to(shard.dtype) if need_weight else weight.new_empty(0)

        rows = shard.x.new_zeros(B, D)  # Eᵀŵ
        grad_weight = advise_huge_pages(weight.new_empty(weight.shape if need_weight else 0))
        if B == 0:
            grad_weight.zero_()
        in_place = grad_weight.dtype == shard.dtype
        # Allocated once, if at all: a temporary of this size would be new memory from the system in every chunk.
        buffer = shard.x.new_empty(0 if in_place or not need_weight else min(shard.chunk, C), D)
        usual = inverse_norm.device.type != "cpu" or are_usual(inverse_norm)
        for start in range(0, C if B and (need_rows or need_weight) else 0, shard.chunk):
            w, inverse, power = shard.centres(start), inverse_norm[start : start + shard.chunk], None
            if not usual:
                w, _, inverse, power = scaled(w)
            operand = shard.operand(w, inverse)
            if start < kept.shape[0]:
                terms = kept[start : start + shard.chunk]
                if not shard.bounded:
                    terms = terms * torch.exp2(kept_shift[start // shard.chunk] - shift)
            else:
                terms = shard.logits(operand, inverse, x)
                shard.filter_(terms)
                if not shard.bounded:
                    terms -= shift
                targets.mask_(terms.exp2_(), start, 0.0)
            half = shard.operand_dtype != shard.dtype
            terms = terms.to(shard.panel_dtype) if half else terms * inverse[:, None]
            if need_rows:
                rows += product_nt(terms.T, operand.to(shard.panel_dtype).T)
            if need_weight:
                grad = product_nt(terms, x_factored.T)  # dŵ, over ‖w‖ but for half precision
                if half:
                    grad *= inverse[:, None]
                target = grad_weight[start : start + shard.chunk]
                out = target if in_place else buffer[: len(grad)]
                along = torch.mul(grad, w, out=out).sum(1) * inverse.square()
                torch.addcmul(grad, w, along[:, None], value=-1, out=out)
                if power is not None:
                    out *= power[:, None]
                targets.add_(out, start, target_rows)
                if not in_place:
                    target.copy_(out)

        grad_features = features.new_empty(0)
        grad_scale = scale.new_zeros(() if need_scale else 0)
        if need_rows:
            rows64 = rows.double()
            row_coefficient = row_factor.double()
            x_coefficient = torch.zeros_like(row_coefficient) if grad_norm is None else grad_norm.double()
            if normalize_features:
                along = (pair.x * rows64).sum(1)  # x̂·(Eᵀŵ)
                if need_scale:
                    grad_scale = (row_factor * along).sum().to(scale.device, scale.dtype)
                row_coefficient = row_coefficient * shard.scale * pair.x_inverse
                x_coefficient = x_coefficient - row_coefficient * along
            else:
                row_coefficient = row_coefficient.masked_fill(pair.x_inverse == 0, 0)  # a zero row has no direction
            if need_features:
                grad_features = pair.grad_features(grad_cosine, rows64, row_coefficient, x_coefficient).to(features.dtype)
        return grad_features, grad_weight, grad_scale


def _panel_dtype(compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    # float16 cannot hold the range of E.
    dtype = accumulate_dtype(compute_dtype)
    return dtype if compute_dtype == dtype or device.type == "cpu" else torch.bfloat16


def _chunk_size(batch: int, dim: int, device: torch.device) -> int:
    """Classes a chunk: a multiple of 64 that depends on the shapes and the kind of device alone."""
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    return max(elements // (batch + dim) // 64, 1) * 64


def _is_one_chunk(problem: Problem) -> bool:
    """Whether both passes can take the short way: see :mod:`.one_chunk`."""
    features, weight, labels = problem[:3]
    device, (B, D), C = features.device, features.shape, weight.shape[0]
    if device.type != "cpu" or not problem.normalize_features or (host_scale(problem) or math.inf) > BOUNDED_SCALE:
        return False
    if B == 0 or _chunk_size(B, D, device) < C or math.isfinite(problem.interclass_filter):
        return False
    smallest, largest = torch.aminmax(labels)
    return smallest.item() >= 0 and largest.item() < C


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem, (save_bytes, predict) = Problem(*arguments[:8]), arguments[8:]
    features, weight, labels = problem[:3]
    dtype, panel_dtype = accumulate_dtype(problem.compute_dtype), _panel_dtype(problem.compute_dtype, features.device)
    batch, num_classes = features.shape[0], weight.shape[0]
    chunk = _chunk_size(batch, features.shape[1], features.device)
    kept = kept_classes(batch, num_classes, panel_dtype, save_bytes, chunk)
    vectors = [features.new_empty(batch, dtype=dtype) for _ in range(4)]
    return (
        *vectors,
        features.new_empty(num_classes, dtype=dtype),
        features.new_empty(kept, batch, dtype=panel_dtype),
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
