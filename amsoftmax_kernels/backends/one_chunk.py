"""Problems of one chunk on a CPU, where the operations around the products cost more than the products.

The same mathematics as :mod:`.chunked` in a third as many operations, for the common case: normalized features, no running
maximum, no ignored row, no filter, no sub-centres, no row of an unusual norm. PyTorch's weight normalization (v g/‖v‖ a row,
and its derivative) is one operation each way where norms, their inverses and the Jacobian are a dozen. The targets' gradient
is put into the panel, so that the two products carry it; its projections then round as float32 does, where the general path
has them in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import vecdot

from . import Forward, Problem, Upstream, host_scale
from .budget import BOUNDED_SCALE
from .norms import are_usual
from .products import product_nt

_LOG2E = math.log2(math.e)
_ELEMENTS = 1 << 18  # of which a gradient is finished at a time


def serves(problem: Problem, largest: int) -> bool:
    """Whether a problem of at most so many classes is of this kind; :func:`forward` still finds rows without a direction."""
    B, C, device = problem.features.shape[0], problem.weight.shape[0], problem.features.device
    if device.type != "cpu" or not problem.normalize_features or (host_scale(problem) or math.inf) > BOUNDED_SCALE:
        return False
    if B == 0 or problem.subcentres > 1 or largest < C or math.isfinite(problem.interclass_filter):
        return False
    lowest, highest = torch.aminmax(problem.labels)
    return lowest.item() >= 0 and highest.item() < C


def forward(problem: Problem, dtype: torch.dtype, predict: bool) -> Forward | None:
    """In the accumulate dtype, with all of E; None if a row's norm is unusual."""
    labels = problem.labels
    x, w = problem.features.to(dtype).contiguous(), problem.weight.to(dtype).contiguous()
    scale = host_scale(problem)
    assert scale is not None
    length = scale * _LOG2E  # of x̂: it makes a dot product with ŵ a logit to the base 2
    x_scaled, x_norm = torch._weight_norm_interface(x, x.new_full((len(x), 1), length), 0)
    w_norm = torch.linalg.vector_norm(w, dim=1)
    if not (are_usual(x_norm) and are_usual(w_norm)):
        return None
    w_inverse = w_norm.reciprocal_()
    # The target apart from the product, summed in float64: its rounding would be multiplied by the scale.
    dots = w.index_select(0, labels).mul_(x_scaled).sum(1, dtype=torch.float64).mul_(w_inverse.index_select(0, labels))
    panel = product_nt(w, x_scaled).mul_(w_inverse[:, None])
    best, best_class = x.new_empty(0), labels.new_empty(0)
    if predict:  # from the logits: their exponentials tell less of them apart
        best, best_class = panel.scatter_(0, labels[None], -math.inf).max(0)
        best /= length
    terms = panel.exp2_().scatter_(0, labels[None], 0.0)
    z, cosine = terms.sum(0), dots.mul_(1 / length).to(dtype)
    shift, rows = torch.zeros_like(z), x.new_empty(0)
    return Forward(z, shift, cosine, x_norm[:, 0], w_inverse, terms, shift[None].clone(), rows, best, best_class)


def regular(norm: Tensor, w_inverse: Tensor) -> bool:
    """Whether :func:`forward` did not refuse, from what either way saves."""
    return are_usual(norm) and are_usual(w_inverse)


def backward(problem: Problem, saved: Forward, upstream: Upstream, need_scale: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features and weight in the accumulate dtype, and of scale; E is computed again where none was kept."""
    labels, scale, cosine, w_inverse = problem.labels, host_scale(problem), saved.cosine, saved.inverse_norm
    assert scale is not None
    row_factor, grad_cosine, grad_norm, grad_directions = upstream
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
    grad_w_hat = product_nt(panel, x_hat.T)  # the panel's factor 1/‖w‖ is the Jacobian's
    if grad_directions is not None:
        grad_w_hat.addr_(w_inverse, grad_directions.to(dtype))
    return grad_x, _across(grad_w_hat, w, w_norm), grad_scale


def _across(grad: Tensor, rows: Tensor, norm: Tensor) -> Tensor:
    """``grad`` without its part along each of ``rows``, in the memory it has: new memory takes longer than a pass."""
    if grad.numel() <= _ELEMENTS:
        return _jacobian(grad, rows, norm, norm)
    size = max(_ELEMENTS // grad.shape[1], 1)
    for part, of, length in zip(grad.split(size), rows.split(size), norm.split(size), strict=True):
        part.copy_(_jacobian(part, of, length, length))
    return grad


def _jacobian(grad: Tensor, rows: Tensor, length: Tensor, norm: Tensor) -> Tensor:
    """The gradient of ``rows`` from that of ``length``·rows/‖rows‖."""
    result: Tensor = torch.ops.aten._weight_norm_interface_backward(grad, rows, length, norm, 0)[0]
    return result
