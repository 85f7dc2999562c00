"""What a margin is, what the loss does with one, and checks of its numbers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from ..values import is_number, is_readable, type_name

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
    statistics over the batch would count it: :class:`AdaFaceMargin` tells it by these three values.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> def harder_with_age(cosine, labels, feature_norm):  # a margin of one's own: 0.2 for class 0, up to 0.4
        ...     return cosine - (0.2 + 0.002 * labels)
        >>> head = AMSoftmaxLoss(8, 100, scale=64.0, margin=harder_with_age)
        >>> head(torch.randn(16, 8, requires_grad=True), torch.randint(100, (16,))).backward()
    """

    def __call__(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor, /) -> Tensor: ...


def of_rows(margin: float | Tensor, cosine: Tensor, labels: Tensor) -> float | Tensor:
    """m for each row, of a number, a 0-d tensor, or one m a class."""
    if not isinstance(margin, Tensor):
        return margin
    return (margin[labels] if margin.dim() else margin).to(cosine.dtype)


def as_margin(margin: float | Tensor | Margin) -> Margin:
    """A margin object for whatever the public functions accept as ``margin`` (already checked)."""
    if isinstance(margin, (int, float, Tensor)):
        return lambda cosine, labels, feature_norm: cosine - of_rows(margin, cosine, labels)
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


def reduce_rows(rows: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Mean over the rows that are not ignored, sum, or the rows ``[B]`` themselves, 0 where ignored."""
    if reduction == "none":
        return rows
    return rows.sum() / count_rows(labels) if reduction == "mean" else rows.sum()


def count_rows(labels: Tensor) -> Tensor:
    """How many of canonical labels are not ignored, at least 1: what a mean divides by."""
    return (labels >= 0).sum().clamp_(min=1)


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


def check_number(name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> None:
    """Check that a value is a number, and what is expected of it."""
    if not is_number(value):
        raise TypeError(f"{name} must be a float, but it is {type_name(value)}")
    if not holds(value):
        raise ValueError(f"{name} must be {expected}, but it is {value}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but it is {value!r}")


def check_angle(name: str, value: Any) -> None:
    """Check that a margin on the angle is a number of radians."""
    expected = "an angle in [-π, π], in radians (math.radians gives them from degrees)"
    check_number(name, value, expected, lambda value: abs(value) <= math.pi)
