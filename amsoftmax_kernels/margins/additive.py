"""Margins taken off the cosine itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..values import is_number, plain, type_name
from .protocol import MARGIN_LIMIT, check_value, of_rows


class AdditiveMargin(nn.Module):
    """ψ(t) = t − m (AM-Softmax, Wang et al. 2018, equation 5; CosFace).

    Args:
        margin: m, a float, a 0-d tensor or a ``[C]`` tensor with one margin a class. A ``Parameter`` is learned,
            another tensor is kept as a buffer. The paper finds 0.35 to 0.4 best.
        only_above: take m off only where t > m, as the authors' Caffe layer ``LabelSpecificAdd`` does. dψ/dt = 1 either way.

    Raises:
        TypeError, ValueError: not a number in [-2, 2] or a floating-point tensor of such.

    Called with cosines ``[B]``, labels ``[B]`` and norms ``[B]`` it returns ψ ``[B]`` in the cosines' dtype.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels.margins import AdditiveMargin
        >>> margin = AdditiveMargin(torch.tensor([0.25, 0.5]))  # one a class
        >>> margin(torch.tensor([0.75, 0.75, 0.0]), torch.tensor([0, 1, 1]), torch.ones(3))
        tensor([ 0.5000,  0.2500, -0.5000])
        >>> AdditiveMargin(0.5, only_above=True)(torch.tensor([0.75, 0.25]), torch.tensor([0, 1]), torch.ones(2))
        tensor([0.2500, 0.2500])
    """

    margin: float | Tensor

    def __init__(self, margin: float | Tensor = 0.35, *, only_above: bool = False) -> None:
        super().__init__()
        margin = plain(margin)
        check_value("margin", margin)
        if not isinstance(only_above, bool):
            raise TypeError(f"only_above must be a bool, but it is {type_name(only_above)}")
        if isinstance(margin, Tensor) and margin.requires_grad and not isinstance(margin, nn.Parameter):
            raise ValueError("margin must be an nn.Parameter to be learned, but it is a plain tensor that requires grad")
        if isinstance(margin, Tensor) and not isinstance(margin, nn.Parameter):
            self.register_buffer("margin", margin.clone())
        else:
            self.margin = margin
        self.only_above = only_above

    def forward(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        margin = of_rows(self.margin, cosine, labels)
        return torch.where(cosine > margin, cosine - margin, cosine) if self.only_above else cosine - margin

    def extra_repr(self) -> str:
        parts = [f"margin={self.margin}"] if isinstance(self.margin, float) else []
        return ", ".join([*parts, "only_above=True"] if self.only_above else parts)


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
