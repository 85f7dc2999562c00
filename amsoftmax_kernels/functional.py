"""The loss, from the public call to a backend's two passes: arguments, the margin on vectors of length B, gradients.

For a constant margin :class:`AMSoftmaxFunction` is the whole loss. Any other margin is differentiated by autograd, from the
vectors that :class:`NegativesFunction` returns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import backends, reference
from .arguments import (
    WITH_MARGIN,
    canonical_labels,
    check_arguments,
    check_predictions,
    check_size,
    compute_dtype,
    no_autocast,
)
from .backends import Forward, Needs, Problem, Request, Upstream
from .backends.budget import BOUNDED_SCALE
from .backends.margin import predictions
from .backends.subcentres import nearest
from .margins import AdditiveMargin, Margin, as_margin, reduce_rows, target_psi
from .smoothing import MeanCosine, smoothed, sum_of_directions
from .values import is_number, plain, type_name, whole

if TYPE_CHECKING:
    from .backends.update import Update

DEFAULT_SAVE_BYTES = 1 << 30


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
            theirs, and the gradient flows to the nearest alone, the first of equals (sub-centre ArcFace, Deng et al. 2020).
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
    return loss_of(
        features, weight, labels, None, scale, margin, subcentres, normalize_features, reduction, ignore_index,
        label_smoothing, interclass_filter, return_predictions, backend, save_bytes,
    )  # fmt: skip


def loss_of(
    features: Tensor, weight: Tensor, labels: Tensor, updater: Updater | None,
    scale: float | Tensor, margin: float | Tensor | Margin, subcentres: int, normalize_features: bool, reduction: str,
    ignore_index: int, label_smoothing: float, interclass_filter: float | None, return_predictions: bool | str,
    backend: str | None, save_bytes: int | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`am_softmax_loss`, whose backward pass updates ``weight`` by ``updater`` if there is one."""
    scale, margin, ignore_index = plain(scale), plain(margin), plain(ignore_index)
    interclass_filter, save_bytes = plain(interclass_filter), whole(save_bytes)
    subcentres, label_smoothing = check_size("subcentres", subcentres), plain(label_smoothing)
    check_predictions(return_predictions)
    check_arguments(
        features, weight, labels,
        scale=scale, margin=margin, normalize_features=normalize_features, reduction=reduction, subcentres=subcentres,
        ignore_index=ignore_index, label_smoothing=label_smoothing, interclass_filter=interclass_filter,
        save_bytes=save_bytes,
    )  # fmt: skip
    num_classes = weight.shape[0] // subcentres
    filtered, predict, margined = interclass_filter is not None, bool(return_predictions), return_predictions == WITH_MARGIN
    traits = traits_of(features, weight, scale, normalize_features, filtered, predict, subcentres)
    backend = backends.choose(backend, traits)
    if backend == "reference":
        if updater is not None:
            raise ValueError("backend 'reference' makes a gradient of all centres at once, and cannot update them instead")
        labels, num_rows = canonical_labels(labels, num_classes, ignore_index)
        rows, predicted = reference.loss_rows(
            features, weight, labels, scale, as_margin(margin), normalize_features, interclass_filter, subcentres,
            label_smoothing, margined,
        )  # fmt: skip
        loss = reduce_rows(rows, num_rows, reduction)
        return (loss, predicted) if predict else loss

    if _transformed():
        raise RuntimeError(f"torch.func's transforms take backend='reference', but backend is {backend!r}")
    kept = _kept_bytes(save_bytes, features, weight, scale)
    anchor = None
    if updater is not None and torch.is_grad_enabled() and weight.requires_grad:
        updater.check(weight)
        # The centres' gradient does not go through autograd, and a loss must still need one.
        weight, anchor = weight.detach(), torch.zeros((), device=weight.device, requires_grad=True)
    options = Options(
        backend, traits.compute_dtype, normalize_features, ignore_index,
        math.inf if interclass_filter is None else float(interclass_filter),
        kept, predict, torch.is_grad_enabled(), None if anchor is None else updater, subcentres,
        label_smoothing > 0, margined,
    )  # fmt: skip
    constant = margin.margin if type(margin) is AdditiveMargin and not margin.only_above else margin
    if isinstance(constant, (int, float)) and label_smoothing == 0:
        result: Tensor | tuple[Tensor, Tensor]
        result = AMSoftmaxFunction.apply(features, weight, labels, scale, float(constant), reduction, options, anchor)  # type: ignore[no-untyped-call]
        return result
    labels, num_rows = canonical_labels(labels, num_classes, ignore_index)
    scale = beside(scale, features.device)
    log_z, cosine, norm, mean, best, best_class = NegativesFunction.apply(  # type: ignore[no-untyped-call]
        features, weight, labels, scale, options, anchor
    )
    rows, psi = loss_rows(
        Vectors(log_z, cosine, norm, mean), labels, num_classes, scale if normalize_features else norm,
        as_margin(margin), label_smoothing,
    )  # fmt: skip
    loss = reduce_rows(rows, num_rows, reduction)
    if not predict:
        return loss
    return loss, predictions(psi if margined else cosine, best, best_class, labels)


def _transformed() -> bool:
    """Whether one of ``torch.func``'s transforms is at work."""
    return torch._C._are_functorch_transforms_active()


# What torch.compile finds when it traces, as torch.compiler.assume_constant_result has it, which would import Dynamo.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Options(NamedTuple):
    """What both autograd functions are given beside tensors and numbers, checked."""

    backend: str
    compute_dtype: torch.dtype
    normalize_features: bool
    ignore_index: int
    interclass_filter: float  # infinity leaves none out
    save_bytes: int
    predict: bool
    grad: bool  # whether autograd records the call
    updater: Updater | None = None  # updates the centres in the backward pass
    subcentres: int = 1
    mean: bool = False  # of the cosines to all centres is asked for
    margined: bool = False  # predictions have the margin taken off

    def problem(self, features: Tensor, weight: Tensor, labels: Tensor, scale: Tensor | None, fixed: float) -> Problem:
        return Problem(
            features, weight, labels, scale, fixed, self.normalize_features, self.compute_dtype, self.interclass_filter,
            self.subcentres,
        )  # fmt: skip

    def targets(self, features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """A problem's labels, from canonical ones of classes."""
        return labels if self.subcentres == 1 else nearest(features, weight, labels, self.subcentres)

    def request(self, needs: Needs, margin: float | None = None) -> Request:
        return Request(self.save_bytes, self.predict, self.grad and (needs.features or needs.scale), margin)


def _needs(ctx: Any) -> Needs:
    """Whose gradients autograd will ask for. A user may have left out the scale."""
    needed = ctx.needs_input_grad
    return Needs(needed[0], needed[1], len(needed) > 3 and needed[3])


class Updater(Protocol):
    """What updates the centres in the backward pass: an optimizer of :mod:`amsoftmax_kernels.optim`."""

    def check(self, weight: Tensor) -> None:
        """In the forward pass: that it is this weight's, and that its centres are whole."""

    def check_turn(self, asked: bool) -> None:
        """In the backward pass, before anything else: that no step has been made that is not ended; if one is to be made."""

    def updating(self, weight: Tensor) -> AbstractContextManager[Update]:
        """For the one backward pass of a step, of a loss on ``weight``; may raise before anything is changed."""


def updater_of(ctx: Any) -> Updater | None:
    """What updates the centres in this backward pass: nothing where it is ``autograd.grad`` of other inputs.

    To be asked before the function's tensors are unpacked, as autograd's own error of a version says less.
    """
    updater: Updater | None = ctx.updater
    if updater is None:
        return None
    # The anchor is a leaf of every backward pass, unless that is told its inputs.
    asked: bool = torch._C._will_engine_execute_node(ctx.next_functions[-1][0])
    updater.check_turn(asked)
    return updater if asked else None


def backward_of(
    updater: Updater | None, name: str, problem: Problem, saved: Forward, upstream: Upstream, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """A backend's backward pass, which updates the centres if there is an updater."""
    backend = backends.load(name)
    if updater is None:
        return backend.backward(problem, saved, upstream, needs)
    with updater.updating(problem.weight) as update:
        return backend.backward(problem, saved, upstream, needs._replace(weight=True), update)


def traits_of(
    features: Tensor, weight: Tensor, scale: float | Tensor, normalize_features: bool, filtered: bool, predict: bool,
    subcentres: int = 1,
) -> backends.Traits:  # fmt: skip
    """What the choice of a backend depends on."""
    bounded, width = normalize_features, weight.shape[-1]
    if isinstance(scale, Tensor) or scale > BOUNDED_SCALE:
        bounded = False
    if torch.compiler.is_compiling():
        width = int(f"{width}")  # a symbolic size becomes the number that it is
    return backends.Traits(
        features.device, compute_dtype(features, weight), features.dtype, weight.dtype, width,
        normalize_features, bounded, filtered, predict, subcentres,
    )  # fmt: skip


def _kept_bytes(save_bytes: int | None, *inputs: Any) -> int:
    """The caller's ``save_bytes``, its default for None, and 0 where nothing will be differentiated."""
    if not torch.is_grad_enabled() or not any(isinstance(each, Tensor) and each.requires_grad for each in inputs):
        return 0
    return DEFAULT_SAVE_BYTES if save_bytes is None else min(save_bytes, (1 << 63) - 1)


def beside(scale: float | Tensor, device: torch.device) -> float | Tensor:
    """s on the features' device if it is learned; if not it stays where it is, as on the CPU its value can be read."""
    return scale.to(device) if isinstance(scale, Tensor) and scale.requires_grad else scale


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


class _DifferentiatedOnce(torch.autograd.Function):
    """The first tensor, as a function of the others that has no gradient."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *unused: Tensor) -> None:
        raise RuntimeError("am_softmax_loss can be differentiated once; backend='reference' can be any number of times")


class _Unpacked:
    """A function's context, whose tensors can be had twice: torch.utils.checkpoint hands them out once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """PyTorch's decorator of this name lets a second gradient vanish silently where the upstream one is a constant."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):  # as nearly always
            return backward(ctx, *grads)
        if (updater := getattr(ctx, "updater", None)) is not None:
            raise RuntimeError(f"create_graph=True does not go with {type(updater).__name__}, which updates the centres")
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return backward(ctx, *grads)
        unpacked = _Unpacked(ctx)
        with torch.no_grad():
            results = backward(unpacked, *grads)
        inputs = [each for each in (*unpacked.saved_tensors, *grads) if each is not None and each.requires_grad]
        return tuple(
            None if each is None else _DifferentiatedOnce.apply(each, *inputs)  # type: ignore[no-untyped-call]
            for each in results
        )

    return wrapped


class AMSoftmaxFunction(torch.autograd.Function):
    """The whole loss for a constant margin, as one function: log z and t, the margin, the reduction.

    ``apply(features, weight, labels, scale=30.0, margin=0.35, reduction="mean")`` takes and returns what
    :func:`am_softmax_loss` does with these arguments, and raises the same errors; ``margin`` is a float here. It can be
    differentiated once.

    Arguments are positional, as ``apply`` takes no keywords: features ``[B, D]``, centres ``[C, D]``, labels ``[B]``, s (a
    float or a 0-d tensor), m, and ``"mean"``, ``"sum"`` or ``"none"``. Rows with the label -100 are ignored. The loss is
    float32 (float64 for float64 inputs), 0-d or ``[B]``.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxFunction
        >>> features, weight = torch.eye(3, requires_grad=True), torch.eye(3, requires_grad=True)
        >>> rows = AMSoftmaxFunction.apply(features, weight, torch.tensor([0, 1, 2]), 10.0, 0.35, "none")
        >>> rows.sum().backward()
        >>> rows.shape, weight.grad.shape
        (torch.Size([3]), torch.Size([3, 3]))
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,  # [B, D]
        weight: Tensor,  # [C, D]
        labels: Tensor,  # [B]
        scale: float | Tensor = 30.0,
        margin: float = 0.35,
        reduction: str = "mean",
        options: Options | None = None,  # None where a user calls it: nothing has been checked yet
        anchor: Tensor | None = None,  # 0-d; needs a gradient where the centres are updated in place of having one
    ) -> Tensor | tuple[Tensor, Tensor]:
        if options is None:
            scale, margin = plain(scale), plain(margin)
            options = _checked(features, weight, labels, scale, margin, reduction)
        labels, num_rows = canonical_labels(labels, weight.shape[0] // options.subcentres, options.ignore_index)
        device = scale.device if isinstance(scale, Tensor) else None
        targets = options.targets(features, weight, labels)
        problem = options.problem(features, weight, targets, *backends.scale_fields(beside(scale, features.device)))
        out = backends.load(options.backend).forward(problem, options.request(_needs(ctx), float(margin)))
        assert out.loss is not None
        ctx.save_for_backward(*problem[:4], num_rows, *out[:-1])  # the loss may be changed in place
        ctx.options, ctx.updater, ctx.mean = options, options.updater, reduction == "mean"
        ctx.fixed_scale, ctx.scale_device = problem.fixed_scale, device
        ctx.set_materialize_grads(False)
        loss = reduce_rows(out.loss, num_rows, reduction)
        if not options.predict:
            return loss
        target = out.cosine - margin if options.margined else out.cosine
        predicted = predictions(target, out.best, out.best_class, labels)
        ctx.mark_non_differentiable(predicted)
        return loss, predicted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        updater = updater_of(ctx)
        tensors = ctx.saved_tensors  # once: torch.utils.checkpoint hands them out no second time
        num_rows, saved = tensors[4], Forward(*tensors[5:])
        problem = ctx.options.problem(*tensors[:4], ctx.fixed_scale)
        assert saved.derivatives is not None
        row_factor, by_cosine, by_scale = (saved.derivatives * (grad / num_rows if ctx.mean else grad)).unbind()
        normalize = problem.normalize_features
        needs = _needs(ctx)
        upstream = Upstream(row_factor, by_cosine, None if normalize else by_scale)
        grad_features, grad_weight, grad_scale = backward_of(updater, ctx.options.backend, problem, saved, upstream, needs)
        if needs.scale and normalize:  # beside what flows through z
            grad_scale = grad_scale + by_scale.sum().to(grad_scale)
        grads = (grad_features, grad_weight, grad_scale.to(ctx.scale_device))
        x, w, s = (each if need else None for each, need in zip(grads, needs, strict=True))
        return x, w, None, s, None, None, None, None


def _checked(
    features: Tensor, weight: Tensor, labels: Tensor, scale: float | Tensor, margin: Any, reduction: str
) -> Options:
    """The options of a call that has not been through :func:`am_softmax_loss`, its arguments checked."""
    if not is_number(margin):
        raise TypeError(f"margin must be a float, but it is {type_name(margin)}: am_softmax_loss takes any margin")
    check_arguments(features, weight, labels, scale=scale, margin=margin, normalize_features=True, reduction=reduction,
                    ignore_index=-100)  # fmt: skip
    traits = traits_of(features, weight, scale, True, False, False)
    backend = backends.choose(None, traits)
    return Options(backend, traits.compute_dtype, True, -100, math.inf, DEFAULT_SAVE_BYTES, False, True)


class NegativesFunction(torch.autograd.Function):
    """The B×C work as one differentiable function, on which any margin on the target can be built.

    ``apply(features, weight, labels, scale, options, anchor)`` takes checked arguments and canonical labels. It returns
    vectors ``[B]``, of which the first four can be differentiated once:

    - log z, the log-sum-exp of the negatives' logits, log Σ_{j≠y} exp(s·cos_j) (s = ‖x‖ without normalize_features);
    - t, the target's cosine, exact (never through the low-precision product);
    - ‖x‖;
    - the mean cosine to all centres (of size 0 without ``mean``);
    - the largest cosine of a negative and its class (of size 0 without ``predict``).

    With u = s·ψ(t) the loss is softplus(log z − u). An ignored row has log z = −∞.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, labels: Tensor, scale: float | Tensor, options: Options,
        anchor: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        targets = options.targets(features, weight, labels)
        problem = options.problem(features, weight, targets, *backends.scale_fields(scale))
        out = backends.load(options.backend).forward(problem, options.request(_needs(ctx)))
        mean, means = out.z.new_empty(0), out.z.new_empty(0)
        if options.mean:
            mean = sum_of_directions(weight, out.inverse_norm) / max(weight.shape[0], 1)
            means = MeanCosine.of(features, labels, mean).value().to(out.z.dtype)
        ctx.save_for_backward(*problem[:4], mean, *out[:10])
        ctx.options, ctx.updater, ctx.fixed_scale = options, options.updater, problem.fixed_scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out.best, out.best_class)
        log_z = torch.add(out.z.log(), out.shift, alpha=math.log(2))
        return log_z, out.cosine, out.norm, means, out.best, out.best_class

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_z: Tensor | None, grad_cosine: Tensor | None, grad_norm: Tensor | None, grad_mean: Tensor | None,
        *unused: None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        updater = updater_of(ctx)
        tensors = ctx.saved_tensors
        problem, saved = ctx.options.problem(*tensors[:4], ctx.fixed_scale), Forward(*tensors[5:])
        zero = torch.zeros_like(saved.z)
        # z = 0 where there is no negative (one class) or all vanish beside the target: nothing flows to them.
        row_factor = zero if grad_log_z is None else (grad_log_z / saved.z).masked_fill_(saved.z == 0, 0)
        upstream, needs = Upstream(row_factor, zero if grad_cosine is None else grad_cosine, grad_norm), _needs(ctx)
        means = None
        if grad_mean is not None and ctx.options.mean:
            means = MeanCosine.of(problem.features, problem.labels, tensors[4])
            upstream = upstream._replace(directions=means.grad_directions(grad_mean, problem.weight.shape[0]).to(zero.dtype))
        grads = backward_of(updater, ctx.options.backend, problem, saved, upstream, needs)
        x, w, s = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        if x is not None and means is not None and grad_mean is not None:
            x = x + means.grad_features(grad_mean).to(x.dtype)
        return x, w, None, s, None, None
