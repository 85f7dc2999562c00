"""The loss: arguments checked, a backend's B×C work differentiated, the margin and the softmax on vectors of length B."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import backends, reference
from .arguments import canonical_labels, check_arguments, check_flag, compute_dtype, no_autocast
from .margins import AdditiveMargin, Margin, as_margin, target_psi
from .reduction import reduce_rows
from .values import plain

DEFAULT_SAVE_BYTES = 1 << 30


@overload
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
    interclass_filter: float | None = None,
    return_predictions: Literal[False] = False,
    backend: str | None = None,
    save_bytes: int | None = None,
) -> Tensor: ...
@overload
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
    interclass_filter: float | None = None,
    return_predictions: Literal[True],
    backend: str | None = None,
    save_bytes: int | None = None,
) -> tuple[Tensor, Tensor]: ...
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
    interclass_filter: float | None = None,
    return_predictions: bool = False,
    backend: str | None = None,
    save_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Additive-margin softmax loss (AM-Softmax, Wang et al. 2018, equation 6; CosFace) without the B×C logits.

    With x̂, ŵ the normalized features and class centres, t = x̂·ŵ_y and ψ(t) = t − m,

    .. math:: -\log \frac{e^{s\,\psi(t)}}{e^{s\,\psi(t)} + \sum_{j \ne y} e^{s\,\hat x \cdot \hat w_j}}

    Args:
        features: ``[B, D]`` float64, float32, float16 or bfloat16, any strides.
        weight: ``[C, D]`` class centres of any norm, on the same device.
        labels: ``[B]`` integer class indices.
        scale: s, a positive float or a 0-d tensor (learned if it requires grad).
        margin: m, a float, a ``[C]`` tensor (one a class), or a margin object (:class:`amsoftmax_kernels.margins.Margin`).
        normalize_features: if False, ‖x‖ takes the place of ``scale``, which is then ignored (the paper's variant without
            feature normalization).
        reduction: ``"mean"`` over the rows not ignored, ``"sum"``, or ``"none"`` for the ``[B]`` rows.
        ignore_index: rows with this label give loss 0 and no gradient, whatever their features.
        interclass_filter: negatives whose cosine exceeds this are left out: they may be the same identity under another
            label (InsightFace's ``interclass_filtering_threshold``, which makes their logits 0 instead). None keeps all.
        return_predictions: also return the class of the largest cosine (before margin and filter) of each row, found in
            the same pass.
        backend: a name of :func:`available_backends`; None picks the fastest that serves these tensors.
        save_bytes: bytes of B×C intermediates kept for the backward pass, the rest is computed again; 0 keeps none,
            None keeps 1 GiB at most. Beside them, where some is computed again or classes are few, the Triton and C++
            backends keep normalized centres of at most 2²⁷ elements.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or ``[B]`` for ``"none"``. The mean over no row is 0. A row
        with a NaN or infinity has the loss NaN; so has, on a GPU, a row whose label is out of range. Zero rows have no
        direction: their cosines and gradients are 0. The gradient can be taken once (``backend="reference"``: any
        number of times).

        With ``return_predictions`` the pair of it and the predicted classes, ``[B]`` int64: the label itself where no
        negative's cosine is larger; -1 for an ignored row. ``(predictions == labels).float().mean()`` over the rows not
        ignored is the training accuracy.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device, range, reduction or backend; on the CPU, a label that is neither in
            ``[0, C)`` nor ``ignore_index``.
        RuntimeError: under ``torch.func``'s transforms, which only ``backend="reference"`` serves.
    """
    scale, margin, ignore_index = plain(scale), plain(margin), plain(ignore_index)
    interclass_filter, save_bytes = plain(interclass_filter), plain(save_bytes)
    check_flag("return_predictions", return_predictions)
    check_arguments(
        features, weight, labels,
        scale=scale, margin=margin, normalize_features=normalize_features, reduction=reduction,
        ignore_index=ignore_index, interclass_filter=interclass_filter, save_bytes=save_bytes,
    )  # fmt: skip
    dtype = compute_dtype(features, weight)
    backend = backends.choose(backend, features.device, dtype)
    if backend == "reference":
        labels, num_rows = canonical_labels(labels, weight.shape[0], ignore_index)
        rows, predictions = reference.loss_rows(
            features, weight, labels, scale, as_margin(margin), normalize_features, interclass_filter
        )
        loss = reduce_rows(rows, labels, num_rows, reduction)
        return (loss, predictions) if return_predictions else loss

    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"torch.func's transforms take backend='reference', but backend is {backend!r}")
    scale, s = scale_tensor(scale, features.device)
    problem = backends.Problem(
        features, weight, labels, scale, normalize_features, dtype,
        math.inf if interclass_filter is None else float(interclass_filter),
    )  # fmt: skip
    constant = margin.margin if type(margin) is AdditiveMargin else margin
    if isinstance(constant, (int, float)) and reduction != "none":
        at_once = backends.load(backend).loss_at_once(
            problem, ignore_index, float(constant), reduction == "mean", return_predictions
        )
        if at_once is not None:
            loss = _LossAtOnce.apply(features, weight, scale, at_once)  # type: ignore[no-untyped-call]
            return loss if at_once.predictions is None else (loss, at_once.predictions)
    differentiated = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad or scale.requires_grad)
    if not differentiated:
        save_bytes = 0
    elif save_bytes is None:
        save_bytes = DEFAULT_SAVE_BYTES
    need_rows = torch.is_grad_enabled() and (features.requires_grad or scale.requires_grad)
    need_weight = torch.is_grad_enabled() and weight.requires_grad
    how = (min(save_bytes, (1 << 63) - 1), return_predictions, need_rows, need_weight, backend)
    if isinstance(constant, (int, float)):
        of_loss = (ignore_index, float(constant), reduction, not normalize_features or scale.requires_grad)
        result: Tensor | tuple[Tensor, Tensor]
        result = _ConstantMarginLoss.apply(*problem[:4], (*problem[4:], *how, *of_loss))  # type: ignore[no-untyped-call]
        return result
    labels, num_rows = backends.load(backend).canonical_labels(labels, weight.shape[0], ignore_index)
    problem = problem._replace(labels=labels)
    log_z, cosine, norm, best, best_class = AMSoftmaxFunction.apply(*problem, *how)  # type: ignore[no-untyped-call]
    rows = loss_rows(log_z, cosine, norm, labels, weight.shape[0], s if normalize_features else norm, as_margin(margin))
    loss = reduce_rows(rows, labels, num_rows, reduction)
    if not return_predictions:
        return loss
    return loss, torch.where(cosine.detach() >= best, labels, best_class)


def scale_tensor(scale: float | Tensor, device: torch.device) -> tuple[Tensor, float | Tensor]:
    """s as backends take it and as the loss does: a number lies on the CPU, where reading it does not synchronize."""
    if not isinstance(scale, Tensor):
        return torch.scalar_tensor(scale, dtype=torch.float64, device="cpu"), scale
    if scale.requires_grad:
        scale = scale.to(device)
    return scale, scale


def loss_rows(
    log_z: Tensor, cosine: Tensor, norm: Tensor, labels: Tensor, num_classes: int, s: float | Tensor, margin: Margin
) -> Tensor:
    """softplus(log z − s·ψ(t)) for vectors ``[B]`` as :class:`AMSoftmaxFunction` returns them."""
    if cosine.device.type != "cpu":  # on the CPU such a label was an error
        cosine = torch.where(labels < num_classes, cosine, math.nan)
    with no_autocast(cosine.device):
        u = target_psi(margin, cosine, labels.clamp(0, num_classes - 1), norm) * s
        # Above 40, log(1 + e^v) is v to the last bit of a float64.
        return softplus(log_z - u, threshold=40)


class _DifferentiatedOnce(torch.autograd.Function):
    """The first tensor, as a function of the others that has no gradient."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> None:
        raise RuntimeError("am_softmax_loss can be differentiated once; backend='reference' can be any number of times")


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """PyTorch's decorator of this name lets a second gradient vanish silently where the upstream one is a constant."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):  # as nearly always
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        if torch.compiler.is_compiling():
            return results
        inputs = [each for each in ctx.saved_tensors if each is not None and each.requires_grad]
        return tuple(
            None if each is None else _DifferentiatedOnce.apply(each, *inputs)  # type: ignore[no-untyped-call]
            for each in results
        )

    return wrapped


class AMSoftmaxFunction(torch.autograd.Function):
    """The B×C work as one differentiable function, on which any margin on the target can be built.

    ``apply(features, weight, labels, scale, normalize_features, compute_dtype, interclass_filter, save_bytes, predict,
    need_rows, need_weight, backend)`` takes checked arguments: those of :class:`amsoftmax_kernels.backends.Problem`, the
    bytes to keep, whether to find the best negative, whether features or scale will need a gradient and whether the weight
    will, and the name of a backend. It returns vectors ``[B]``, the first three differentiable once:

    - log z, the log-sum-exp of the negatives' logits, log Σ_{j≠y} exp(s·cos_j) (s = ‖x‖ without normalize_features);
    - t, the target's cosine, exact (never through the low-precision product);
    - ‖x‖;
    - the largest cosine of a negative and its class (of size 0 without ``predict``).

    With u = s·ψ(t) the loss is softplus(log z − u). An ignored row has log z = −∞.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        problem, (*how, backend) = backends.Problem(*arguments[:7]), arguments[7:]
        out = backends.load(backend).forward(problem, *how)
        _save(ctx, problem, out, backend, None)
        ctx.mark_non_differentiable(out.best, out.best_class)
        return torch.add(out.z.log(), out.shift, alpha=math.log(2)), out.cosine, out.norm, out.best, out.best_class

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_z: Tensor | None, grad_cosine: Tensor | None, grad_norm: Tensor | None, *unused: None
    ) -> tuple[Tensor | None, ...]:
        problem, vectors = _saved(ctx)
        saved = backends.Forward(*vectors)
        zero = torch.zeros_like(saved.z)
        # z = 0 where there is no negative (one class) or all vanish beside the target: nothing flows to them.
        row_factor = zero if grad_log_z is None else (grad_log_z / saved.z).masked_fill_(saved.z == 0, 0)
        grad_cosine = zero if grad_cosine is None else grad_cosine
        needs = _needs(ctx)
        grads = backends.load(ctx.options[1]).backward(problem, saved, row_factor, grad_cosine, grad_norm, needs)
        return _arranged(grads, needs)


class _LossAtOnce(torch.autograd.Function):
    """A loss whose gradients are known: ``apply(features, weight, scale, backends.LossAtOnce)``."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, scale: Tensor, at_once: backends.LossAtOnce) -> Tensor:
        # The inputs too: a second derivative is an error of theirs.
        ctx.save_for_backward(features, weight, scale, *at_once[2:])
        return at_once.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        # The product first, as a loss scale for float16 needs.
        grads = (
            (grad * upstream).to(each.dtype) if grad is not None else None
            for each, grad in zip(saved[:3], saved[3:], strict=True)
        )
        return *grads, None


class _ConstantMarginLoss(torch.autograd.Function):
    """The whole loss for a margin that is a number: its derivatives are known in the forward pass.

    ``apply(features, weight, labels, scale, others)`` returns the loss, and with ``predict`` the predicted classes. Others
    are :class:`AMSoftmaxFunction`'s arguments from the fifth on, then ``ignore_index, margin, reduction, need_scale``;
    labels and these four are as in :meth:`amsoftmax_kernels.backends.Backend.forward_loss`. In one tuple, as each argument
    takes PyTorch some 0.2 µs.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, others: tuple[Any, ...]
    ) -> Tensor | tuple[Tensor, Tensor]:
        problem, (*how, backend), of_loss = (
            backends.Problem(features, weight, labels, scale, *others[:3]), others[3:8], others[8:],
        )  # fmt: skip
        out = backends.load(backend).forward_loss(problem, *how, *of_loss)
        _save(ctx, problem._replace(labels=out.labels), out.saved, backend, out.layout)
        if out.predictions is None:
            return out.loss
        ctx.mark_non_differentiable(out.predictions)
        return out.loss, out.predictions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        problem, saved = _saved(ctx)
        _, backend, layout = ctx.options
        needs = _needs(ctx)
        grads = backends.load(backend).backward_loss(problem, saved, layout, grad, needs)
        grad_features, grad_weight, _, grad_scale, *_ = _arranged(grads, needs)
        return grad_features, grad_weight, None, grad_scale, None


def _save(ctx: Any, problem: backends.Problem, tensors: tuple[Tensor, ...], backend: str, layout: Hashable) -> None:
    ctx.save_for_backward(*problem[:4], *tensors)
    ctx.options = (problem[4:], backend, layout)
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[backends.Problem, tuple[Tensor, ...]]:
    tensors = ctx.saved_tensors
    return backends.Problem(*tensors[:4], *ctx.options[0]), tensors[4:]


def _needs(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether features, weight and scale need a gradient."""
    needed = ctx.needs_input_grad
    return needed[0], needed[1], needed[3]


def _arranged(grads: tuple[Tensor, Tensor, Tensor], needs: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """The backend's gradients, one for each argument of :class:`AMSoftmaxFunction`."""
    grad_features, grad_weight, grad_scale = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return grad_features, grad_weight, None, grad_scale, *[None] * 8
