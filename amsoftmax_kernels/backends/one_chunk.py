"""Problems of one chunk on a CPU, where the operations around the products cost more than the products.

The same mathematics as :mod:`.chunked` in a third as many operations, for the common case: normalized features, no running
maximum, no ignored row, no filter, no row without a direction. PyTorch's weight normalization (v g/‖v‖ a row, and its
derivative) is one operation each way where norms, their inverses and the Jacobian are a dozen. The targets' gradient is put
into the panel, so that the two products carry it; its projections then round as float32 does, where the general path has
them in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import vecdot

from .norms import EPS
from .products import product_nt


def forward(
    features: Tensor, weight: Tensor, labels: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """z, the targets' cosines, ‖x‖, 1/‖w‖ and E ``[C, B]`` with the targets masked; None if a row has no direction."""
    logit_scale = scale * math.log2(math.e)
    x_scaled, norm = _normalized(features.to(dtype).contiguous(), logit_scale)
    w_hat, w_norm = _normalized(weight.to(dtype).contiguous(), 1.0)
    if not (_have_directions(norm) and _have_directions(w_norm)):
        return None
    # The target apart from the product, summed in float64: its rounding would be multiplied by the scale.
    dots = (x_scaled * w_hat.index_select(0, labels)).sum(1, dtype=torch.float64)
    terms = product_nt(w_hat, x_scaled).exp2_().scatter_(0, labels[None], 0.0)
    return terms.sum(0), dots.mul_(1 / logit_scale).to(dtype), norm, w_norm.reciprocal_(), terms


def regular(norm: Tensor, w_inverse: Tensor) -> bool:
    """Whether :func:`forward` did not refuse, from what either way saves."""
    return _have_directions(norm) and _have_directions(w_inverse)


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
    x, w = features.to(dtype).contiguous(), weight.to(dtype).contiguous()
    norm, w_norm = norm[:, None], w_inverse.reciprocal()[:, None]
    x_hat = x / norm
    if not len(kept):
        kept = product_nt(w, x_hat).mul_((w_inverse * (scale * math.log2(math.e)))[:, None]).exp2_()
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


def _normalized(rows: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """Rows of this length, and their norms before."""
    scaled, norm = torch._weight_norm_interface(rows, rows.new_full((len(rows), 1), length), 0)
    return scaled, norm[:, 0]


def _jacobian(grad: Tensor, rows: Tensor, length: Tensor, norm: Tensor) -> Tensor:
    """The gradient of ``rows`` from that of ``length``·rows/‖rows‖."""
    result: Tensor = torch.ops.aten._weight_norm_interface_backward(grad, rows, length, norm, 0)[0]
    return result


def _have_directions(norm: Tensor) -> bool:
    smallest, largest = torch.aminmax(norm)
    return smallest.item() > EPS and largest.item() < math.inf
