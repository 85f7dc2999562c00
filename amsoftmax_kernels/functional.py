"""The public loss: its arguments, the choice of a backend, and the margin on vectors of length B."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import backends, reference
from .arguments import WITH_MARGIN, LossOptions, canonical_labels, check_arguments, no_autocast
from .autograd import (
    DEFAULT_SAVE_BYTES,
    AMSoftmaxFunction,
    NegativesFunction,
    Options,
    Updater,
    beside,
    traits_of,
)
from .backends.margin import predictions
from .margins import AdditiveMargin, Margin, as_margin, reduce_rows, target_psi
from .smoothing import smoothed


@overload
def am_softmax_loss(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float | Tensor = 30.0,
    margin: float | Tensor | Margin = 0.35,
    subcentres: int = 1,
    normalize_features: bool = True,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
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
    subcentres: int = 1,
    normalize_features: bool = True,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    interclass_filter: float | None = None,
    return_predictions: Literal[True, "with_margin"],
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
    subcentres: int = 1,
    normalize_features: bool = True,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    interclass_filter: float | None = None,
    return_predictions: bool | Literal["with_margin"] = False,
    backend: str | None = None,
    save_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Additive-margin softmax loss (AM-Softmax, Wang et al. 2018, equation 6; CosFace) without the B×C logits.

    With x̂, ŵ the normalized features and class centres, t = x̂·ŵ_y and ψ(t) = t − m,

    .. math:: -\log \frac{e^{s\,\psi(t)}}{e^{s\,\psi(t)} + \sum_{j \ne y} e^{s\,\hat x \cdot \hat w_j}}

    Args:
        features: ``[B, D]`` float64, float32, float16 or bfloat16, any strides.
        weight: ``[C, D]`` class centres of any norm, on the same device; ``[C·K, D]`` with ``subcentres=K``. On a GPU
            ``"chunked"`` takes norms from 1e-18 to 1e19, ``"cuda"`` from 1e-12 to 1e19: a shorter row counts as zero, a
            longer one gives NaN.
        labels: ``[B]`` integer class indices, or ``[B, 1]``.
        scale: s, a positive float or a 0-d tensor (learned if it requires grad). Under ``torch.compile`` a scale or a
            margin that changes from step to step is to be a tensor: each number is a constant, and compiles anew.
        margin: m, a float, a ``[C]`` tensor (one a class), or a margin object (:class:`amsoftmax_kernels.margins.Margin`).
        subcentres: K, centres a class, rows j·K to j·K + K − 1 of ``weight`` for class j: its cosine is the largest of
            theirs, and the gradient flows to the nearest alone, one of equals (sub-centre ArcFace, Deng et al. 2020).
        normalize_features: if False, ‖x‖ takes the place of ``scale``, which is then ignored (the paper's variant without
            feature normalization).
        reduction: ``"mean"`` over the rows not ignored, ``"sum"``, or ``"none"`` for the ``[B]`` rows.
        ignore_index: rows with this label give loss 0 and no gradient, whatever their features.
        label_smoothing: ε, the share of each label that is spread evenly over all classes, as in
            ``torch.nn.functional.cross_entropy``; without sub-centres and filter.
        interclass_filter: negatives whose cosine exceeds this are left out: they may be the same identity under another
            label (InsightFace's ``interclass_filtering_threshold``, which makes their logits 0 instead). None keeps all.
        return_predictions: also return the class of the largest cosine (before margin and filter; with ``"with_margin"``
            the target's has its margin taken off) of each row, found in the same pass.
        backend: a name of :func:`available_backends`; None picks the fastest that serves these tensors.
        save_bytes: bytes of B×C intermediates kept for the backward pass, the rest is computed again; 0 keeps none,
            None keeps 1 GiB at most.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or ``[B]`` for ``"none"``. The mean over no row is 0. A row
        with a NaN or infinity has the loss NaN; so has, on a GPU, a row whose label is out of range. Zero rows (of a norm
        of 1e-30 or less) have no direction: their cosines and gradients are 0. The gradient can be taken once
        (``backend="reference"``: any number of times).

        With ``return_predictions`` the pair of it and the predicted classes, ``[B]`` int64: the label itself where no
        negative's cosine is larger; -1 for an ignored row. ``(predictions == labels).float().mean()`` over the rows not
        ignored is the training accuracy.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device, range, reduction or backend; on the CPU, a label that is neither in
            ``[0, C)`` nor ``ignore_index``.
        RuntimeError: under ``torch.func``'s transforms, which only ``backend="reference"`` serves.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import am_softmax_loss
        >>> features = torch.eye(3, requires_grad=True)  # three rows, each at its own centre
        >>> weight, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> loss = am_softmax_loss(features, weight, labels, scale=10.0, margin=0.35)
        >>> loss.backward()
        >>> f"{loss.item():.4f}", loss.dtype  # log(1 + 2·e^(0 − 10·0.65))
        ('0.0030', torch.float32)
        >>> am_softmax_loss(features, weight, labels, reduction="none", return_predictions=True)[1]
        tensor([0, 1, 2])
    """
    given = LossOptions(
        scale, margin, subcentres, normalize_features, reduction, ignore_index, label_smoothing, interclass_filter,
        return_predictions, backend, save_bytes,
    )  # fmt: skip
    return loss_of(features, weight, labels, given)


def loss_of(
    features: Tensor, weight: Tensor, labels: Tensor, given: LossOptions, updater: Updater | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`am_softmax_loss`, whose backward pass updates ``weight`` by ``updater`` if there is one."""
    given = given.plain()
    check_arguments(features, weight, labels, given)
    scale, margin, predict = given.scale, given.margin, bool(given.return_predictions)
    traits = traits_of(
        features, weight, scale, given.normalize_features, given.interclass_filter is not None, predict, given.subcentres
    )
    backend = backends.choose(given.backend, traits)
    if backend == "reference":
        if updater is not None:
            raise ValueError("backend 'reference' makes a gradient of all centres at once, and cannot update them instead")
        exact: Tensor | tuple[Tensor, Tensor] = reference.loss_of(features, weight, labels, given)
        return exact
    if _transformed():
        raise RuntimeError(f"torch.func's transforms take backend='reference', but backend is {backend!r}")
    kept = _kept_bytes(given.save_bytes, features, weight, scale)
    anchor = None
    if updater is not None and torch.is_grad_enabled() and weight.requires_grad:
        updater.check(weight)
        # The centres' gradient does not go through autograd, and a loss must still need one.
        weight, anchor = weight.detach(), torch.zeros((), device=weight.device, requires_grad=True)
    options = Options(
        backend, traits.compute_dtype, given.normalize_features, given.ignore_index,
        math.inf if given.interclass_filter is None else float(given.interclass_filter),
        kept, predict, torch.is_grad_enabled(), None if anchor is None else updater, given.subcentres,
        given.label_smoothing > 0, given.return_predictions == WITH_MARGIN,
    )  # fmt: skip
    constant = margin.margin if type(margin) is AdditiveMargin and not margin.only_above else margin
    if isinstance(constant, (int, float)) and given.label_smoothing == 0:
        result: Tensor | tuple[Tensor, Tensor]
        result = AMSoftmaxFunction.apply(features, weight, labels, scale, float(constant), given.reduction, options, anchor)  # type: ignore[no-untyped-call]
        return result
    return _by_autograd(features, weight, labels, given, options, anchor)


def _by_autograd(
    features: Tensor, weight: Tensor, labels: Tensor, given: LossOptions, options: Options, anchor: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss for any margin, which autograd differentiates."""
    num_classes = weight.shape[0] // given.subcentres
    labels = canonical_labels(labels, num_classes, given.ignore_index)
    scale = beside(given.scale, features.device)
    log_z, cosine, norm, mean, best, best_class = NegativesFunction.apply(  # type: ignore[no-untyped-call]
        features, weight, labels, scale, options, anchor
    )
    rows, psi = loss_rows(
        Vectors(log_z, cosine, norm, mean), labels, num_classes, scale if given.normalize_features else norm,
        as_margin(given.margin), given.label_smoothing,
    )  # fmt: skip
    loss = reduce_rows(rows, labels, given.reduction)
    if not options.predict:
        return loss
    return loss, predictions(psi if options.margined else cosine, best, best_class, labels)


def _transformed() -> bool:
    """Whether one of ``torch.func``'s transforms is at work."""
    return torch._C._are_functorch_transforms_active()


# What torch.compile finds when it traces, as torch.compiler.assume_constant_result has it, which would import Dynamo.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _kept_bytes(save_bytes: int | None, *inputs: Any) -> int:
    """The caller's ``save_bytes``, its default for None, and 0 where nothing will be differentiated."""
    if not torch.is_grad_enabled() or not any(isinstance(each, Tensor) and each.requires_grad for each in inputs):
        return 0
    return DEFAULT_SAVE_BYTES if save_bytes is None else min(save_bytes, (1 << 63) - 1)


class Vectors(NamedTuple):
    """What :class:`NegativesFunction` returns to be differentiated, ``[B]`` each."""

    log_z: Tensor
    cosine: Tensor
    norm: Tensor
    mean: Tensor  # of size 0 where it was not asked for


def loss_rows(
    vectors: Vectors, labels: Tensor, num_classes: int, s: float | Tensor, margin: Margin, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """softplus(log z − s·ψ(t)), smoothed, 0 for an ignored row; and ψ(t)."""
    log_z, cosine, norm, mean = vectors
    if cosine.device.type != "cpu":  # on the CPU such a label was an error
        cosine = torch.where(labels < num_classes, cosine, math.nan)
    with no_autocast(cosine.device):
        psi = target_psi(margin, cosine, labels.clamp(0, num_classes - 1), norm)
        u = psi * s
        # Above 40, log(1 + e^v) is v to the last bit of a float64.
        rows = softplus(log_z - u, threshold=40)
        if label_smoothing > 0:
            rows = smoothed(rows, u, cosine * s, mean * s, label_smoothing, num_classes)
        return rows.masked_fill(labels < 0, 0), psi
