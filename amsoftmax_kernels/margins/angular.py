"""Margins on the angle θ between a feature and its class centre."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..values import is_int, plain
from .protocol import check_angle, check_choice, check_number, check_value

BEYOND = ("cos", "linear", "easy")
GRADIENT = ("exact", "straight_through")
# Nearer to ±1 than this the slope of arccos grows past 2,000, and without bound.
_NEAREST = 1e-7


def angle_of(cosine: Tensor) -> Tensor:
    """θ = arccos t, also where rounding carried t past ±1; where t is within 1e-7 of ±1 no gradient flows."""
    inside = cosine.abs() < 1 - _NEAREST
    theta = torch.where(inside, cosine, 0).arccos()
    return torch.where(inside, theta, cosine.detach().clamp(-1, 1).arccos())


def beyond_pi(beyond: str, psi: Tensor, cosine: Tensor, angle: Tensor, linear: float | Tensor) -> Tensor:
    """ψ with ``linear`` taken off the cosine where the angle is past π, or the plain cosine where t ≤ 0."""
    if beyond == "linear":
        return torch.where(angle > math.pi, cosine - linear, psi)
    return torch.where(cosine > 0, psi, cosine) if beyond == "easy" else psi


class CombinedMargin(nn.Module):
    """ψ(t) = cos(m1·θ + m2) − m3 with θ = arccos t (ArcFace, Deng et al. 2019, equation 4).

    It joins the margins of SphereFace, ArcFace and CosFace. The paper tries (1, 0.3, 0.2) and (0.9, 0.4, 0.15).
    InsightFace's code has m2 alone and m3 alone (:func:`amsoftmax_kernels.insightface.margin_of`).

    Args:
        m1, m2, m3: the factor, the angle in radians, and what is taken off the cosine.
        beyond: where m1·θ + m2 is past π the cosine rises again. ``"cos"`` keeps the formula, as the paper has it.
            ``"linear"`` puts t − m2·sin m2 − m3 in its place there; with m1 ≠ 1 it is t less the constant that makes ψ
            continuous. ``"easy"`` applies the margin where t > 0 and leaves t elsewhere.
        gradient: ``"exact"`` is that of the formula. ``"straight_through"`` is dψ/dt = 1, as in InsightFace's code.

    Raises:
        TypeError, ValueError: m1 is not positive, m2 not in [-π, π], m3 not in [-2, 2], or a choice is not one of these.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels.margins import CombinedMargin
        >>> CombinedMargin(1.0, 0.3, 0.2)(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), torch.ones(2))
        tensor([ 0.7553, -0.4955])
    """

    def __init__(self, m1: float, m2: float, m3: float, *, beyond: str = "cos", gradient: str = "exact") -> None:
        super().__init__()
        m1, m2, m3 = plain(m1), plain(m2), plain(m3)
        check_number("m1", m1, "positive", lambda value: 0 < value < math.inf)
        check_angle("m2", m2)
        check_value("m3", m3)
        check_choice("beyond", beyond, BEYOND)
        check_choice("gradient", gradient, GRADIENT)
        self.m1, self.m2, self.m3, self.beyond, self.gradient = float(m1), float(m2), float(m3), beyond, gradient
        self._drop = self.m2 * math.sin(self.m2) if m1 == 1 else 1 + math.cos((math.pi - self.m2) / self.m1)

    def forward(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        angle = self.m1 * angle_of(cosine) + self.m2
        psi = beyond_pi(self.beyond, angle.cos() - self.m3, cosine, angle, self._drop + self.m3)
        # The value of ψ, the gradient of the cosine.
        return cosine + (psi - cosine).detach() if self.gradient == "straight_through" else psi

    def extra_repr(self) -> str:
        return f"m1={self.m1}, m2={self.m2}, m3={self.m3}, {self._choices()}"

    def _choices(self) -> str:
        return f"beyond={self.beyond!r}, gradient={self.gradient!r}"


class AngularMargin(CombinedMargin):
    """ψ(t) = cos(θ + m) with θ = arccos t (ArcFace, Deng et al. 2019, equation 3).

    The paper has m = 0.5 and s = 64 for faces; for speakers (AAM-softmax) m = 0.2 and s = 30 are usual. The exact gradient
    is dψ/dt = sin(θ + m)/sin θ: 0.88 at 90° and 1.36 at 45° for m = 0.5.

    Args:
        margin: m, in radians.
        beyond: where θ + m is past π. ``"cos"`` keeps the formula, ``"linear"`` is t − m·sin m there, ``"easy"`` is t
            wherever t ≤ 0.
        gradient: ``"exact"``, or ``"straight_through"``: dψ/dt = 1.

    Public code that it equals:

    - InsightFace's ``arcface_torch``: ``"cos"`` and ``"straight_through"`` since December 2022;
    - pytorch-metric-learning's ``ArcFaceLoss``, whose margin is in degrees, and speechbrain's ``AdditiveAngularMargin``:
      ``"linear"`` and ``"exact"``; the latter with ``easy_margin=True``: ``"easy"``.

    Raises:
        TypeError, ValueError: m is not a number in [-π, π], or a choice is not one of these.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> from amsoftmax_kernels.margins import AngularMargin
        >>> head = AMSoftmaxLoss(8, 100, scale=64.0, margin=AngularMargin(0.5))
        >>> head(torch.randn(16, 8, requires_grad=True), torch.randint(100, (16,))).backward()
    """

    def __init__(self, margin: float = 0.5, *, beyond: str = "cos", gradient: str = "exact") -> None:
        check_angle("margin", plain(margin))
        super().__init__(1.0, margin, 0.0, beyond=beyond, gradient=gradient)

    def extra_repr(self) -> str:
        return f"margin={self.m2}, {self._choices()}"


class SphereFaceMargin(nn.Module):
    """(λ·t + ψ(t))/(1 + λ) with ψ = (−1)^k·cos(mθ) − 2k on [kπ/m, (k + 1)π/m] (A-Softmax, Liu et al. 2017, equation 7).

    λ = max(minimum, base·(1 + gamma·i)^(−power)) in step i = 1, 2, …: the share of the plain cosine falls as training
    proceeds. Call :meth:`step` once a training step, after it. The number of steps is a buffer, part of the ``state_dict``.
    The paper's logit is ‖x‖ times this: give the head ``normalize_features=False``.

    Values and defaults are those of the authors' Caffe layer and training (``wy1iu/sphereface``,
    ``margin_inner_product_layer``). Their backward pass is not that of the formula: it scales the target's part of the
    features' gradient to a fixed length, and the centres' gradient is that of a plain inner product. Here the gradient is
    exact, as in pytorch-metric-learning's ``SphereFaceLoss``, which is ``base=0, minimum=0``.

    Args:
        m: 2, 3 or 4.
        base, gamma, power, minimum: of λ, none negative.

    Raises:
        TypeError, ValueError: m is another number, or one of the others is not a finite number of at least 0.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> from amsoftmax_kernels.margins import SphereFaceMargin
        >>> head = AMSoftmaxLoss(8, 100, margin=SphereFaceMargin(4), normalize_features=False)
        >>> for step in range(100):  # beside optimizer.step()
        ...     head.margin.step()
        >>> f"{head.margin.lambda_.item():.1f}"  # λ in step 101: 1000/(1 + 0.12·101)
        '76.2'
    """

    steps: Tensor

    def __init__(
        self, m: int = 4, *, base: float = 1000.0, gamma: float = 0.12, power: float = 1.0, minimum: float = 5.0
    ) -> None:
        super().__init__()
        m = plain(m)
        if not is_int(m):
            raise TypeError(f"m must be an int, but it is {type(m).__name__}")
        check_choice("m", m, (2, 3, 4))
        self.m = m
        for name, value in (("base", base), ("gamma", gamma), ("power", power), ("minimum", minimum)):
            value = plain(value)
            check_number(name, value, "at least 0 and finite", lambda value: 0 <= value < math.inf)
            setattr(self, name, float(value))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    base: float
    gamma: float
    power: float
    minimum: float

    @torch.no_grad()
    def step(self) -> None:
        """Count one training step."""
        self.steps += 1

    @property
    def lambda_(self) -> Tensor:
        """λ of the step to come, 0-d float64."""
        return (self.base * (1 + self.gamma * (self.steps.double() + 1)) ** -self.power).clamp(min=self.minimum)

    def forward(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        t, square = cosine, cosine * cosine
        if self.m == 2:
            multiple = 2 * square - 1  # cos(mθ), a polynomial of t: no arccos, and a slope everywhere
        elif self.m == 3:
            multiple = (4 * square - 3) * t
        else:
            multiple = 8 * square * (square - 1) + 1
        k = sum((t < math.cos(i * math.pi / self.m)).to(t.dtype) for i in range(1, self.m))
        lambda_ = self.lambda_.to(t.dtype)
        return (lambda_ * t + (1 - 2 * (k % 2)) * multiple - 2 * k) / (1 + lambda_)

    def extra_repr(self) -> str:
        return f"m={self.m}, base={self.base}, gamma={self.gamma}, power={self.power}, minimum={self.minimum}"
