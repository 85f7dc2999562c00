"""Margins: ψ on the target's cosine, a vector of length B, differentiated by autograd.

No backend knows which margin is in use. With ψ the target's logit is ``s · ψ(t)``; every margin that touches the
target alone (additive, angular, per class, per sample) is one such function.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .values import is_number, is_readable, plain, type_name

# cos spans a range of 2: a margin beyond it is no cosine margin (an angle in degrees, most likely).
MARGIN_LIMIT = 2.0
_DEGREES = ": if that is an angle in degrees, give what is taken off the cosine instead, such as 0.35"


class Margin(Protocol):
    """What a margin object is: any callable of this signature, an ``nn.Module`` among them.

    Args:
        cosine: ``[B]`` float32 (float64 for float64 inputs), t = cos(x, w_y), rounding may carry it just past ±1.
        labels: ``[B]`` int64 class indices.
        feature_norm: ``[B]``, ‖x‖, with a gradient (MagFace needs it; AdaFace detaches it).

    Returns:
        ``[B]``, ψ, without changing the arguments in place.

    A row that is ignored is passed with cosine 0, label 0 and norm 1, and what is returned for it is not used. A margin with
    statistics over the batch (AdaFace's) would count it: drop such rows before the loss.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> def arcface(cosine, labels, feature_norm):  # Deng et al. 2019, m = 0.5
        ...     return torch.cos(torch.arccos(cosine.clamp(-1 + 1e-7, 1 - 1e-7)) + 0.5)
        >>> head = AMSoftmaxLoss(8, 100, scale=64.0, margin=arcface)
        >>> head(torch.randn(16, 8, requires_grad=True), torch.randint(100, (16,))).backward()
    """

    def __call__(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor, /) -> Tensor: ...


def _subtract(margin: float | Tensor, cosine: Tensor, labels: Tensor) -> Tensor:
    if isinstance(margin, Tensor):
        margin = (margin[labels] if margin.dim() else margin).to(cosine.dtype)
    return cosine - margin


class AdditiveMargin(nn.Module):
    """ψ(t) = t − m (AM-Softmax, Wang et al. 2018, equation 5; CosFace).

    Args:
        margin: m, a float, a 0-d tensor or a ``[C]`` tensor with one margin a class. A ``Parameter`` is learned,
            another tensor is kept as a buffer.

    Raises:
        TypeError, ValueError: not a number in [-2, 2] or a floating-point tensor of such.

    Called with cosines ``[B]``, labels ``[B]`` and norms ``[B]`` it returns ψ ``[B]`` in the cosines' dtype.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels.margins import AdditiveMargin
        >>> margin = AdditiveMargin(torch.tensor([0.25, 0.5]))  # one a class
        >>> margin(torch.tensor([0.75, 0.75, 0.0]), torch.tensor([0, 1, 1]), torch.ones(3))
        tensor([ 0.5000,  0.2500, -0.5000])
    """

    margin: float | Tensor

    def __init__(self, margin: float | Tensor = 0.35) -> None:
        super().__init__()
        margin = plain(margin)
        check_value("margin", margin)
        if isinstance(margin, Tensor) and margin.requires_grad and not isinstance(margin, nn.Parameter):
            raise ValueError("margin must be an nn.Parameter to be learned, but it is a plain tensor that requires grad")
        if isinstance(margin, Tensor) and not isinstance(margin, nn.Parameter):
            self.register_buffer("margin", margin.clone())
        else:
            self.margin = margin

    def forward(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        return _subtract(self.margin, cosine, labels)

    def extra_repr(self) -> str:
        return f"margin={self.margin}" if isinstance(self.margin, float) else ""


class AnnealedAdditiveMargin(nn.Module):
    """ψ(t) = t − m with m growing linearly, a step at a time, as in the AM-Softmax authors' own training.

    Their variant without feature normalization starts at m = 0 and adds 5e-5 a step up to 0.4. Call :meth:`step` once
    a training step, as for a learning-rate schedule. The number of steps taken is a buffer: it moves with the
    module, is part of its ``state_dict``, and is never read back from a GPU.

    Args:
        start: m before the first step.
        end: m that is never passed.
        increment: what each step adds; its sign must lead from ``start`` to ``end``.

    Raises:
        TypeError: an argument is not a number.
        ValueError: ``start`` or ``end`` is not in [-2, 2], or ``increment`` is not finite or leads away from ``end``.

    Called with cosines ``[B]``, labels ``[B]`` and norms ``[B]`` it returns ψ ``[B]`` in the cosines' dtype.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> from amsoftmax_kernels.margins import AnnealedAdditiveMargin
        >>> head = AMSoftmaxLoss(8, 100, margin=AnnealedAdditiveMargin(0.0, 0.4, 0.125), normalize_features=False)
        >>> for step in range(3):  # beside optimizer.step()
        ...     head.margin.step()
        >>> head.margin.margin
        tensor(0.3750, dtype=torch.float64)
    """

    steps: Tensor

    def __init__(self, start: float = 0.0, end: float = 0.4, increment: float = 5e-5) -> None:
        super().__init__()
        start, end, increment = plain(start), plain(end), plain(increment)
        for name, value in (("start", start), ("end", end), ("increment", increment)):
            if isinstance(value, Tensor):
                raise TypeError(f"{name} must be a float, but it is a Tensor")
            if name == "increment" and is_number(value) and not math.isfinite(value):
                raise ValueError(f"increment must be finite, but it is {value}")
            check_value(name, value, math.inf if name == "increment" else MARGIN_LIMIT)
        if (end - start) * increment < 0 or (increment == 0 and start != end):
            raise ValueError(f"increment must lead from start={start} to end={end}, but it is {increment}")
        self.start, self.end, self.increment = float(start), float(end), float(increment)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def step(self) -> None:
        """Count one training step."""
        self.steps += 1

    @property
    def margin(self) -> Tensor:
        """m at this step, 0-d float64."""
        low, high = min(self.start, self.end), max(self.start, self.end)
        return (self.start + self.increment * self.steps.double()).clamp(low, high)

    def forward(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        return cosine - self.margin.to(cosine.dtype)

    def extra_repr(self) -> str:
        return f"start={self.start}, end={self.end}, increment={self.increment}"


def check_value(name: str, value: Any, limit: float = MARGIN_LIMIT) -> None:
    """Check that what is taken off a cosine is a number, or a floating-point tensor, within ``limit``.

    A tensor's values are read, if it has any.
    """
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating-point, but its dtype is {value.dtype}")
        if value.numel() and is_readable(value):
            largest = value.detach().abs().max().item()  # NaN if any is
            if not largest <= limit:
                raise ValueError(
                    f"{name} is taken off a cosine and must lie in [-{limit:g}, {limit:g}], but one has the size "
                    f"{largest}{_DEGREES}"
                )
    elif not is_number(value):
        raise TypeError(f"{name} must be a float, but it is {type_name(value)}")
    elif not abs(value) <= limit:
        raise ValueError(
            f"{name} is taken off a cosine and must lie in [-{limit:g}, {limit:g}], but it is {value}{_DEGREES}"
        )


def as_margin(margin: float | Tensor | Margin) -> Margin:
    """A margin object for whatever the public functions accept as ``margin`` (already checked)."""
    if isinstance(margin, (int, float, Tensor)):
        return lambda cosine, labels, feature_norm: _subtract(margin, cosine, labels)
    return margin


def target_psi(margin: Margin, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
    """ψ of a margin object, checked: ``[B]`` in the cosine's dtype."""
    try:
        psi = margin(cosine, labels, feature_norm)
    except TypeError as error:
        if _takes_three(margin):
            raise
        raise TypeError(
            f"margin must be callable as margin(cosine, labels, feature_norm), three [B] tensors: {error}"
        ) from error
    if not isinstance(psi, Tensor) or psi.shape != cosine.shape:
        returned = list(psi.shape) if isinstance(psi, Tensor) else type(psi).__name__
        raise ValueError(f"margin must return psi of shape [B] = {list(cosine.shape)}, but it returned {returned}")
    return psi.to(cosine.dtype)


def reduce_rows(rows: Tensor, num_rows: Tensor, reduction: str) -> Tensor:
    """Mean over the ``num_rows`` rows that are not ignored, sum, or the rows ``[B]`` themselves, 0 where ignored."""
    if reduction == "none":
        return rows
    return rows.sum() / num_rows if reduction == "mean" else rows.sum()


def _takes_three(margin: Margin) -> bool:
    """Whether three arguments fit; True where that cannot be told."""
    function = margin.forward if isinstance(margin, nn.Module) else margin
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # of a builtin
        return True
    return True
