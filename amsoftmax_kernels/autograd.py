"""The autograd functions: from checked arguments to a backend's two passes, differentiable once.

For a constant margin :class:`AMSoftmaxFunction` is the whole loss. Any other margin is differentiated by autograd, from the
vectors that :class:`NegativesFunction` returns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import backends
from .arguments import LossOptions, canonical_labels, check_arguments, compute_dtype
from .backends import Forward, Needs, Problem, Request, Upstream
from .backends.budget import BOUNDED_SCALE
from .backends.margin import predictions
from .backends.subcentres import nearest
from .smoothing import MeanCosine, sum_of_directions
from .values import is_number, plain, type_name

if TYPE_CHECKING:
    from .backends.update import Update

DEFAULT_SAVE_BYTES = 1 << 30


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

    def request(self, needs: Needs, margin: float | None = None, mean: bool = False) -> Request:
        return Request(self.save_bytes, self.predict, self.grad and (needs.features or needs.scale), margin, mean)


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


def beside(scale: float | Tensor, device: torch.device) -> float | Tensor:
    """s on the features' device if it is learned; if not it stays where it is, as on the CPU its value can be read."""
    return scale.to(device) if isinstance(scale, Tensor) and scale.requires_grad else scale


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
        labels = canonical_labels(labels, weight.shape[0] // options.subcentres, options.ignore_index)
        device = scale.device if isinstance(scale, Tensor) else None
        targets = options.targets(features, weight, labels)
        problem = options.problem(features, weight, targets, *backends.scale_fields(beside(scale, features.device)))
        out = backends.load(options.backend).forward(
            problem, options.request(_needs(ctx), float(margin), reduction == "mean")
        )
        assert out.loss is not None
        ctx.save_for_backward(*problem[:4], *out[:-1])  # the loss may be changed in place
        ctx.options, ctx.updater = options, options.updater
        ctx.fixed_scale, ctx.scale_device = problem.fixed_scale, device
        ctx.set_materialize_grads(False)
        loss = out.loss if reduction == "none" else out.loss.sum()
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
        problem, saved = ctx.options.problem(*tensors[:4], ctx.fixed_scale), Forward(*tensors[4:])
        assert saved.derivatives is not None
        row_factor, by_cosine, by_scale = (saved.derivatives * grad).unbind()
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
    check_arguments(features, weight, labels, LossOptions(scale, margin, reduction=reduction))
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
