"""Problems of one chunk on a CPU, where the operations around the products cost more than the products.

The same mathematics as :mod:`.chunked` in half as many operations, for the common case: normalized features, no running
maximum, no ignored row, no filter. The targets' gradient is put into the panel, so that the two products carry it; its
projections then round as float32 does, where the general path has them in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import threshold

from .norms import EPS, row_norms
from .products import product_nt


def forward(
    features: Tensor, weight: Tensor, labels: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z, the targets' cosines, ‖x‖, 1/‖w‖ and E ``[C, B]`` with the targets masked."""
    x, w = features.to(dtype), weight.to(dtype)
    norm, x_inverse = row_norms(x)
    w_inverse = row_norms(w)[1]
    # The target apart from the product, summed in float64: its rounding would be multiplied by the scale.
    dots = (x * w.index_select(0, labels)).sum(1, dtype=torch.float64)
    cosine = (dots * (x_inverse * w_inverse.index_select(0, labels))).to(dtype)
    terms = _terms(x * x_inverse[:, None], w, labels, scale, w_inverse)
    return terms.sum(0), cosine, norm, w_inverse, terms


def backward(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    norm: Tensor,
    w_inverse: Tensor,
    cosine: Tensor,
    kept: Tensor,
    row_factor: Tensor,
    grad_cosine: Tensor,
    grad_norm: Tensor | None,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features and weight in the accumulate dtype, and of scale; E is computed again where none was kept."""
    dtype = kept.dtype
    x, w = features.to(dtype), weight.to(dtype)
    x_inverse = threshold(norm, EPS, math.inf).reciprocal_()
    x_hat = x * x_inverse[:, None]
    panel = (kept if len(kept) else _terms(x_hat, w, labels, scale, w_inverse)) * (row_factor * scale)
    panel.scatter_(0, labels[None], grad_cosine[None]).mul_(w_inverse[:, None])

    grad_x = product_nt(panel.T, w.T)
    along = vecdot(grad_x, x_hat)
    grad_scale = (along - grad_cosine * cosine).sum() / scale if need_scale else along.new_empty(0)
    grad_x.addcmul_(x_hat, along[:, None], value=-1).mul_(x_inverse[:, None])
    if grad_norm is not None:
        grad_x.addcmul_(x_hat, grad_norm[:, None])

    grad_w = product_nt(panel, x_hat.T)
    along = vecdot(grad_w, w) * w_inverse.square()
    return grad_x, grad_w.addcmul_(w, along[:, None], value=-1), grad_scale


def _terms(x_hat: Tensor, w: Tensor, labels: Tensor, scale: float, w_inverse: Tensor) -> Tensor:
    terms = product_nt(w, x_hat)
    terms.mul_((w_inverse * (scale * math.log2(math.e)))[:, None]).exp2_()
    return terms.scatter_(0, labels[None], 0.0)
