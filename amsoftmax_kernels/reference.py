"""The formula in plain PyTorch, B×C materialised, differentiated by autograd: the oracle of the tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .arguments import (
    WITH_MARGIN,
    LossOptions,
    accumulate_dtype,
    canonical_labels,
    check_arguments,
    compute_dtype,
    no_autocast,
)
from .margins import Margin, as_margin, reduce_rows, target_psi

# A row of this norm or less counts as zero: a gradient is divided by the norm and must stay in float32's range.
EPS = 1e-30


def am_softmax_loss(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = 30.0,
    margin: float | Tensor | Margin = 0.35,
    normalize_features: bool = True,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    interclass_filter: float | None = None,
    return_predictions: bool | str = False,
    subcentres: int = 1,
) -> Any:
    """AM-Softmax loss (Wang et al. 2018, equation 6) with all B×C logits in memory.

    Arguments, result and errors are those of :func:`amsoftmax_kernels.am_softmax_loss`; half-precision inputs are
    computed in float32, whether autocast is on or not. Can be differentiated twice.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import am_softmax_loss, reference
        >>> x, w, labels = torch.randn(4, 8), torch.randn(10, 8), torch.tensor([3, 1, 4, 1])
        >>> torch.allclose(reference.am_softmax_loss(x, w, labels), am_softmax_loss(x, w, labels))
        True
    """
    given = LossOptions(
        scale, margin, subcentres, normalize_features, reduction, ignore_index, label_smoothing, interclass_filter,
        return_predictions,
    ).plain()  # fmt: skip
    check_arguments(features, weight, labels, given)
    return loss_of(features, weight, labels, given)


def loss_of(features: Tensor, weight: Tensor, labels: Tensor, given: LossOptions) -> Any:
    """The loss, and the predicted classes ``[B]`` if they are asked for, of checked arguments."""
    labels = canonical_labels(labels, weight.shape[0] // given.subcentres, given.ignore_index)
    rows, predictions = _loss_rows(features, weight, labels, given)
    loss = reduce_rows(rows, labels, given.reduction)
    return (loss, predictions) if given.return_predictions else loss


def _loss_rows(features: Tensor, weight: Tensor, labels: Tensor, given: LossOptions) -> tuple[Tensor, Tensor]:
    """The rows' losses and predicted classes ``[B]`` for canonical labels."""
    dtype, scale, subcentres = accumulate_dtype(compute_dtype(features, weight)), given.scale, given.subcentres
    with no_autocast(features.device):
        x, w = features.to(dtype), weight.to(dtype)
        num_classes = w.shape[0] // subcentres
        x = x.masked_fill((labels < 0)[:, None], 0)
        target = labels.clamp(0, num_classes - 1)
        (x_unit, norm), (w_unit, _) = _unit_rows(x), _unit_rows(w)
        norm = norm.masked_fill(labels < 0, 1)
        s = scale if given.normalize_features else norm.masked_fill(norm.isinf(), math.nan)
        if isinstance(s, Tensor):
            s = s.to(x.device, x.dtype)

        cos = _nearest(x_unit @ w_unit.T, subcentres)
        t = cos.gather(1, target[:, None])[:, 0]
        t = t.masked_fill(labels >= num_classes, math.nan)
        logits = cos * (s[:, None] if isinstance(s, Tensor) and s.dim() else s)
        left_out = is_target = torch.arange(num_classes, device=x.device) == target[:, None]
        if given.interclass_filter is not None:
            left_out = is_target | (cos > given.interclass_filter)
        log_z = logits.masked_fill(left_out, -math.inf).logsumexp(1)
        psi = target_psi(as_margin(given.margin), t, target, norm)
        u = s * psi
        rows = softplus(log_z - u, threshold=40)
        if given.label_smoothing > 0:  # of the mean over all classes, the target's with its margin
            mean = (logits.masked_fill(is_target, 0).sum(1) + u) / num_classes
            rows = rows + given.label_smoothing * (u - mean)
        rows = rows.masked_fill(labels < 0, 0)
        best, best_class = cos.detach().masked_fill(is_target, -math.inf).max(1)
        best_class = best_class.masked_fill(best.isnan(), -1)
        target_cosine = (psi if given.return_predictions == WITH_MARGIN else t).detach()
        return rows, torch.where((target_cosine >= best) | (labels < 0), labels, best_class)


def cosine(features: Tensor, weight: Tensor, subcentres: int = 1) -> Tensor:
    """Cosines ``[B, C]`` of ``features [B, D]`` to the centres ``weight [C·K, D]``, float32 (float64 for float64)."""
    dtype = accumulate_dtype(torch.promote_types(features.dtype, weight.dtype))
    with no_autocast(features.device):
        cos: Tensor = _unit_rows(features.to(dtype))[0] @ _unit_rows(weight.to(dtype))[0].T
    return _nearest(cos, subcentres)


def _nearest(cos: Tensor, subcentres: int) -> Tensor:
    """Of cosines to K centres a class ``[B, C·K]`` each class's largest ``[B, C]``, the first of equals."""
    return cos if subcentres == 1 else cos.unflatten(1, (-1, subcentres)).max(2).values


def _unit_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The rows over their norms, and the norms."""
    # Over its largest element first: squares of what is far from 1 would leave the dtype's range.
    largest = torch.linalg.vector_norm(matrix.detach(), math.inf, dim=1, keepdim=True)
    largest = largest.masked_fill((largest <= EPS / 2**20) | largest.isinf(), 1)
    scaled = matrix / largest
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    norm = length * largest
    # A zero row has no direction: it is divided by infinity, so that it and its gradient are zero.
    zero = norm <= EPS
    divisor = length.masked_fill(length.isinf(), math.nan).masked_fill(zero, math.inf)
    return scaled / divisor, norm.masked_fill(zero, 0)[:, 0]
