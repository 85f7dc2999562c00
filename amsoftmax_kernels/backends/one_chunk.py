"""Problems of one chunk on a CPU, where the operations around the products cost more than the products.

The same mathematics as :mod:`.chunked` in a third as many operations, for the common case: normalized features, no running
maximum, no ignored row, no filter, no row without a direction. PyTorch's weight normalization (v g/‖v‖ a row, and its
derivative) is one operation each way where norms, their inverses and the Jacobian are a dozen. The targets' gradient is put
into the panel, so that the two products carry it; its projections then round as float32 does, where the general path has
them in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from . import Forward, Problem, Upstream
from .norms import EPS
from .products import product_nt

_LOG2E = math.log2(math.e)


class _Terms(NamedTuple):
    """What both ways begin with, in the accumulate dtype but for the dot products."""

    x: Tensor  # [B, D]
    x_norm: Tensor  # [B, 1]
    x_hat: Tensor  # [B, D]
    one: Tensor  # [B, 1] its length
    w: Tensor  # [C, D]
    w_norm: Tensor  # [C, 1]
    w_scaled: Tensor  # [C, D] ŵ times ``length``
    length: Tensor  # [C, 1] log2(e)·s, which makes a dot product a logit to the base 2
    dots: Tensor  # [B] float64, log2(e)·s·t
    terms: Tensor  # [C, B] E, the targets masked
    z: Tensor  # [B]
    predictions: Tensor | None  # [B], if asked for

    @classmethod
    def of(
        cls, features: Tensor, weight: Tensor, labels: Tensor, scale: float, dtype: torch.dtype, predict: bool = False
    ) -> _Terms | None:
        """None if a row has no direction."""
        x, w = features.to(dtype).contiguous(), weight.to(dtype).contiguous()
        one, length = x.new_ones(len(x), 1), w.new_full((len(w), 1), scale * _LOG2E)
        x_hat, x_norm = torch._weight_norm_interface(x, one, 0)
        w_scaled, w_norm = torch._weight_norm_interface(w, length, 0)
        if not (_have_directions(x_norm) and _have_directions(w_norm)):
            return None
        # The target apart from the product, summed in float64: its rounding would be multiplied by the scale.
        dots = w_scaled.index_select(0, labels).mul_(x_hat).sum(1, dtype=torch.float64)
        panel, predictions = product_nt(w_scaled, x_hat), None
        if predict:  # from the logits: their exponentials tell less of them apart
            best, best_class = panel.scatter_(0, labels[None], -math.inf).max(0)
            predictions = torch.where(dots.to(dtype) >= best, labels, best_class)
        terms = panel.exp2_().scatter_(0, labels[None], 0.0)
        return cls(x, x_norm, x_hat, one, w, w_norm, w_scaled, length, dots, terms, terms.sum(0), predictions)


def forward(
    features: Tensor, weight: Tensor, labels: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """z, the targets' cosines, ‖x‖, 1/‖w‖ and E ``[C, B]`` with the targets masked; None if a row has no direction."""
    first = _Terms.of(features, weight, labels, scale, dtype)
    if first is None:
        return None
    cosine = first.dots.mul_(1 / (scale * _LOG2E)).to(dtype)
    return first.z, cosine, first.x_norm[:, 0], first.w_norm.reciprocal_()[:, 0], first.terms


def regular(norm: Tensor, w_inverse: Tensor) -> bool:
    """Whether :func:`forward` did not refuse, from what either way saves."""
    return _have_directions(norm) and _have_directions(w_inverse)


def backward(problem: Problem, saved: Forward, upstream: Upstream, need_scale: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features and weight in the accumulate dtype, and of scale; E is computed again where none was kept."""
    labels, scale, cosine, w_inverse = problem.labels, problem.scale.item(), saved.cosine, saved.inverse_norm
    row_factor, grad_cosine, grad_norm = upstream
    kept, dtype = saved.kept, saved.kept.dtype
    x, w = problem.features.to(dtype).contiguous(), problem.weight.to(dtype).contiguous()
    norm, w_norm = saved.norm[:, None], w_inverse.reciprocal()[:, None]
    x_hat = x / norm
    if not len(kept):
        kept = product_nt(w, x_hat).mul_((w_inverse * (scale * _LOG2E))[:, None]).exp2_()
    panel = kept * (row_factor * scale)
    panel.scatter_(0, labels[None], grad_cosine[None]).mul_(w_inverse[:, None])

    grad_x_hat = product_nt(panel.T, w.T)
    grad_x = _jacobian(grad_x_hat, x, torch.ones_like(norm), norm)
    grad_scale = row_factor.new_empty(0)
    if need_scale:
        grad_scale = (vecdot(grad_x_hat, x_hat) - grad_cosine * cosine).sum() / scale
    if grad_norm is not None:
        grad_x.addcmul_(x_hat, grad_norm[:, None])
    # The panel's factor 1/‖w‖ is the Jacobian's.
    return grad_x, _jacobian(product_nt(panel, x_hat.T), w, w_norm, w_norm), grad_scale


def _jacobian(grad: Tensor, rows: Tensor, length: Tensor, norm: Tensor) -> Tensor:
    """The gradient of ``rows`` from that of ``length``·rows/‖rows‖."""
    result: Tensor = torch.ops.aten._weight_norm_interface_backward(grad, rows, length, norm, 0)[0]
    return result


def _have_directions(norm: Tensor) -> bool:
    smallest, largest = torch.aminmax(norm)
    return smallest.item() > EPS and largest.item() < math.inf
