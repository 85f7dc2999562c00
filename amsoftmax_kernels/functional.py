"""The loss: arguments checked, a backend's B×C work differentiated, the margin and the softmax on vectors of length B."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from . import backends, reference
from .arguments import canonical_labels, check_arguments, compute_dtype, no_autocast
from .margins import Margin, as_margin, target_psi
from .reduction import reduce_rows

DEFAULT_SAVE_BYTES = 1 << 30


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
    backend: str | None = None,
    save_bytes: int | None = None,
) -> Tensor:
    r"""Additive-margin softmax loss (AM-Softmax, Wang et al. 2018, equation 6; CosFace) without the B×C logits.

    With x̂, ŵ the normalized features and class centres, t = x̂·ŵ_y and ψ(t) = t − m,

    .. math:: -\log \frac{e^{s\,\psi(t)}}{e^{s\,\psi(t)} + \sum_{j \ne y} e^{s\,\hat x \cdot \hat w_j}}

    Args:
        features: ``[B, D]`` float64, float32, float16 or bfloat16, any strides.
        weight: ``[C, D]`` class centres of any norm, on the same device.
        labels: ``[B]`` integer class indices.
        scale: s, a positive float or a 0-d tensor (learned if it requires grad).
        margin: m, a float, a ``[C]`` tensor (one a class), or a margin object (:class:`amsoftmax_kernels.margins.Margin`).
        normalize_features: if False, ‖x‖ takes the place of ``scale`` (the paper's variant without feature normalization).
        reduction: ``"mean"`` over the rows not ignored, ``"sum"``, or ``"none"`` for the ``[B]`` rows.
        ignore_index: rows with this label give loss 0 and no gradient, whatever their features.
        backend: a name of :func:`available_backends`; None picks the fastest that serves these tensors.
        save_bytes: bytes of B×C intermediates kept for the backward pass, the rest is computed again; 0 keeps none,
            None keeps 1 GiB at most.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or ``[B]`` for ``"none"``. The mean over no row is 0. A row
        with a NaN or infinity has the loss NaN; so has, on a GPU, a row whose label is out of range. Zero rows have no
        direction: their cosines and gradients are 0. The gradient can be taken once (``backend="reference"``: any
        number of times).

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device, range, reduction or backend; on the CPU, a label that is neither in
            ``[0, C)`` nor ``ignore_index``.
    """
    check_arguments(
        features, weight, labels,
        scale=scale, margin=margin, normalize_features=normalize_features,
        reduction=reduction, ignore_index=ignore_index, save_bytes=save_bytes,
    )  # fmt: skip
    dtype = compute_dtype(features, weight)
    backend = backends.choose(backend, features.device, dtype)
    labels = canonical_labels(labels, weight.shape[0], ignore_index)
    psi = as_margin(margin)
    if backend == "reference":
        rows = reference.loss_rows(features, weight, labels, scale, psi, normalize_features)
    else:
        rows = _loss_rows(features, weight, labels, scale, psi, normalize_features, dtype, save_bytes, backend)
    return reduce_rows(rows, labels, reduction)


def _loss_rows(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    margin: Margin,
    normalize_features: bool,
    dtype: torch.dtype,
    save_bytes: int | None,
    backend: str,
) -> Tensor:
    s: float | Tensor = scale
    if not isinstance(scale, Tensor):
        scale = torch.tensor(scale, dtype=torch.float64, device="cpu")  # 0-d on the CPU: read without synchronizing
    elif scale.requires_grad:
        s = scale = scale.to(features.device)
    differentiated = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad or scale.requires_grad)
    if not differentiated:
        save_bytes = 0
    elif save_bytes is None:
        save_bytes = DEFAULT_SAVE_BYTES
    save_bytes = min(save_bytes, (1 << 63) - 1)
    log_z, cosine, norm = AMSoftmaxFunction.apply(  # type: ignore[no-untyped-call]
        features, weight, labels, scale, normalize_features, dtype, save_bytes, backend
    )
    num_classes = weight.shape[0]
    if features.device.type != "cpu":  # on the CPU such a label was an error
        cosine = torch.where(labels < num_classes, cosine, math.nan)
    with no_autocast(features.device):
        psi = target_psi(margin, cosine, labels.clamp(0, num_classes - 1), norm)
        u = psi * (s if normalize_features else norm)
        # Above 40, log(1 + e^v) is v to the last bit of a float64.
        return softplus(log_z - u, threshold=40)


class AMSoftmaxFunction(torch.autograd.Function):
    """The B×C work as one differentiable function, on which any margin on the target can be built.

    ``apply(features, weight, labels, scale, normalize_features, compute_dtype, save_bytes, backend)`` takes checked
    arguments: labels as :func:`amsoftmax_kernels.arguments.canonical_labels` leaves them, ``scale`` a 0-d tensor, the
    name of a backend. It returns three vectors ``[B]``, each differentiable once:

    - log z, the log-sum-exp of the negatives' logits, log Σ_{j≠y} exp(s·cos_j) (s = ‖x‖ without normalize_features);
    - t, the target's cosine, exact (never through the low-precision product);
    - ‖x‖.

    With u = s·ψ(t) the loss is softplus(log z − u).
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor,
        normalize_features: bool,
        dtype: torch.dtype,
        save_bytes: int,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = backends.load(backend).forward(features, weight, labels, scale, normalize_features, dtype, save_bytes)
        ctx.save_for_backward(features, weight, labels, scale, *out)
        ctx.options = (normalize_features, dtype, backend)
        return out.z.log() + out.shift * math.log(2), out.cosine, out.norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_z: Tensor, grad_cosine: Tensor, grad_norm: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, labels, scale, *out = ctx.saved_tensors
        saved = backends.Forward(*out)
        normalize_features, dtype, backend = ctx.options
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        # z = 0 where there is no negative (one class) or all vanish beside the target: nothing flows to them.
        row_factor = (grad_log_z / saved.z).masked_fill_(saved.z == 0, 0)
        grads = backends.load(backend).backward(
            features, weight, labels, scale, normalize_features, dtype, saved, row_factor, grad_cosine, grad_norm, needs
        )
        grad_features, grad_weight, grad_scale = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return grad_features, grad_weight, None, grad_scale, None, None, None, None
