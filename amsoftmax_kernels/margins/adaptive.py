"""Margins that differ from row to row: by the feature's norm, or by chance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..hashing import random_numbers
from ..operators import is_traced, register
from ..values import is_int, plain, type_name
from .angular import BEYOND, angle_of, beyond_pi
from .protocol import check_angle, check_choice, check_number, check_value


class AdaFaceMargin(nn.Module):
    """ψ(t) = cos(θ − m·q) − (m + m·q), with q the row's quality, for which its norm stands (AdaFace, Kim et al. 2022).

    q = clip(h·(‖x‖ − μ)/σ, −1, 1) has no gradient (the paper's section 3.3). μ and σ are running means, over the batches, of
    the norms' mean and deviation: of all ranks' rows together in a sharded head. A norm counts as 0.001 at least and 100 at
    most. Each call in training mode brings μ and σ up to date before it uses them; they are part of the ``state_dict``.
    Ignored rows and norms that are NaN do not count.

    The target's logit and the constants are those of the authors' code (``mk-minchul/AdaFace``, ``head.py``): μ starts at 20
    and σ at 100, 0.001 is added to σ, t is clipped to ±0.999 and the angle to [0.001, π − 0.001], with no gradient beyond.
    Their class has ``t_alpha=1`` by default, which is no running mean; their ``config.py`` sets 0.01. The paper has a
    momentum of 0.99. They clip the cosines of other classes too; here those stay as they are.

    Args:
        margin: m.
        h: how fast the quality changes with the norm; the paper has 0.33, the code 0.333.
        t_alpha: the share of a new batch in the running means.

    Raises:
        TypeError, ValueError: m is not in [-2, 2], h is negative, or t_alpha not in [0, 1].

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> from amsoftmax_kernels.margins import AdaFaceMargin
        >>> head = AMSoftmaxLoss(8, 100, scale=64.0, margin=AdaFaceMargin(0.4))
        >>> head(torch.randn(16, 8, requires_grad=True), torch.randint(100, (16,))).backward()
        >>> sorted(head.state_dict())
        ['margin.deviation', 'margin.mean', 'weight']
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, margin: float = 0.4, h: float = 0.333, t_alpha: float = 0.01) -> None:
        super().__init__()
        margin, h, t_alpha = plain(margin), plain(h), plain(t_alpha)
        check_number("margin", margin, "in [-2, 2]", lambda value: abs(value) <= 2)
        check_number("h", h, "at least 0 and finite", lambda value: 0 <= value < math.inf)
        check_number("t_alpha", t_alpha, "in [0, 1]", lambda value: 0 <= value <= 1)
        self.margin, self.h, self.t_alpha = float(margin), float(h), float(t_alpha)
        # Of shape [1]: torch.compile (PyTorch 2.13) loses what is written into a 0-d float64 buffer.
        self.register_buffer("mean", torch.tensor([20.0], dtype=torch.float64))
        self.register_buffer("deviation", torch.tensor([100.0], dtype=torch.float64))

    def forward(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        norm = feature_norm.detach().clamp(1e-3, 100)
        mean, deviation = self.mean, self.deviation
        if self.training and not in_backward():
            ignored = (cosine == 0) & (labels == 0) & (feature_norm == 1)  # as the loss passes such a row
            inputs = norm, ~(ignored | norm.isnan()), mean, deviation, self.t_alpha
            traced = is_traced(norm)
            mean, deviation = torch.ops.amsoftmax_kernels.running_means(*inputs) if traced else running_means(*inputs)
            self.mean.copy_(mean)
            self.deviation.copy_(deviation)
        quality = (self.h * (norm - mean) / (deviation + 1e-3)).clamp(-1, 1).to(cosine.dtype)
        angle = cosine.clamp(-0.999, 0.999).arccos() - self.margin * quality
        return angle.clamp(1e-3, math.pi - 1e-3).cos() - (self.margin + self.margin * quality)

    def _apply(self, *arguments: Any, **options: Any) -> AdaFaceMargin:
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        self.mean, self.deviation = self.mean.double(), self.deviation.double()  # in half precision they would stand still
        return self

    def extra_repr(self) -> str:
        return f"margin={self.margin}, h={self.h}, t_alpha={self.t_alpha}"


class MagFaceMargin(nn.Module):
    """ψ(t) = cos(θ + m(a)), where m(a) grows with the norm a = ‖x‖ (MagFace, Meng et al. 2021, equation 2).

    m(a) runs linearly from ``lower_margin`` at a = ``lower`` to ``upper_margin`` at ``upper``; a is clipped to these bounds.
    The gradient flows through it into the norm. Add :meth:`regularizer` to the loss: nothing else makes norms grow.

    The numbers are the paper's and those of the authors' training (``IrvingMeng/MagFace``, ``run/run.sh``: λ_g = 35; the
    default of ``trainer.py`` is 20). Their code applies the margin where t > 0 and leaves t elsewhere (``easy_margin``): it
    equals ``beyond="easy"`` in value and gradient; the paper's formula is ``"cos"``.

    Args:
        lower, upper: l_a and u_a, the bounds of the norm.
        lower_margin, upper_margin: l_m and u_m, in radians.
        lambda_g: λ_g, the factor of the regularizer. The paper asks for s·K·u_a²·l_a²/(u_a² − l_a²) at least, with K the
            slope of m(a).
        beyond: as in :class:`AngularMargin`.

    Raises:
        TypeError, ValueError: not 0 < lower < upper, a margin not in [-π, π], a negative λ_g, another ``beyond``.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> from amsoftmax_kernels.margins import MagFaceMargin
        >>> head = AMSoftmaxLoss(8, 100, scale=64.0, margin=MagFaceMargin())
        >>> features, labels = torch.randn(16, 8, requires_grad=True), torch.randint(100, (16,))
        >>> loss = head(features, labels) + head.margin.regularizer(features)
        >>> loss.backward()
    """

    def __init__(
        self,
        lower: float = 10.0,
        upper: float = 110.0,
        lower_margin: float = 0.45,
        upper_margin: float = 0.8,
        *,
        lambda_g: float = 35.0,
        beyond: str = "cos",
    ) -> None:
        super().__init__()
        lower, upper, lambda_g = plain(lower), plain(upper), plain(lambda_g)
        lower_margin, upper_margin = plain(lower_margin), plain(upper_margin)
        check_number("lower", lower, "positive and finite", lambda value: 0 < value < math.inf)
        check_number("upper", upper, f"finite and larger than lower={lower}", lambda value: lower < value < math.inf)
        check_angle("lower_margin", lower_margin)
        check_angle("upper_margin", upper_margin)
        check_number("lambda_g", lambda_g, "at least 0 and finite", lambda value: 0 <= value < math.inf)
        check_choice("beyond", beyond, BEYOND)
        self.lower, self.upper, self.lambda_g, self.beyond = float(lower), float(upper), float(lambda_g), beyond
        self.lower_margin, self.upper_margin = float(lower_margin), float(upper_margin)

    def forward(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        slope = (self.upper_margin - self.lower_margin) / (self.upper - self.lower)
        norm = feature_norm.clamp(self.lower, self.upper)
        margin = self.lower_margin + slope * (norm - self.lower)
        angle = angle_of(cosine) + margin
        return beyond_pi(self.beyond, angle.cos(), cosine, angle, margin * margin.sin())

    def regularizer(self, features: Tensor) -> Tensor:
        """λ_g times the mean over rows of g(a) = a/u_a² + 1/a, a clipped to the bounds, 0-d; the term to add to the loss.

        For ``features [B, D]`` of this rank. DistributedDataParallel, which averages over ranks, then trains with the mean
        over all of them where batches are equal. Leave out rows that are ignored.

        Example:
            >>> import torch
            >>> from amsoftmax_kernels.margins import MagFaceMargin
            >>> MagFaceMargin(lambda_g=1.0).regularizer(torch.full((2, 4), 50.0))  # a = 100: 100/110² + 1/100
            tensor(0.0183)
        """
        dtype = torch.promote_types(features.dtype, torch.float32)
        norm = torch.linalg.vector_norm(features, dim=1, dtype=dtype).clamp(self.lower, self.upper)
        term: Tensor = self.lambda_g * (norm / self.upper**2 + 1 / norm).mean()
        return term

    def extra_repr(self) -> str:
        margins = f"lower_margin={self.lower_margin}, upper_margin={self.upper_margin}"
        return f"lower={self.lower}, upper={self.upper}, {margins}, lambda_g={self.lambda_g}, beyond={self.beyond!r}"


class ElasticMargin(nn.Module):
    """cos(θ + m) or t − m, with m drawn anew for each row from a normal distribution (ElasticFace, Boutros et al. 2022).

    In training mode each call draws; in evaluation m is the distribution's mean. Numbers are a hash of seed, call and row:
    all ranks of a sharded head draw the same, and a run that goes on from the ``state_dict`` draws what it would have drawn.
    A call that is made again in a backward pass (activation checkpointing) draws what the latest call before it drew.

    ``"angular"`` is ElasticFace-Arc, for which the authors' ``config.py`` (``fdbtrs/ElasticFace``) has m = 0.5,
    ``"additive"`` is ElasticFace-Cos, with m = 0.35; σ = 0.05 for both. Their classes have σ = 0.0125 by default. For the
    same draws, values and gradients are those of their code without its ``plus`` option, which sorts draws by cosines.

    Args:
        margin: the mean of m.
        std: σ, the deviation of m.
        kind: ``"angular"`` or ``"additive"``.
        seed: alike on all ranks of a sharded head.

    Raises:
        TypeError, ValueError: the mean is not in [-π, π] or [-2, 2], σ is negative, another kind, or seed not in [0, 2^62).

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> from amsoftmax_kernels.margins import ElasticMargin
        >>> head = AMSoftmaxLoss(8, 100, scale=64.0, margin=ElasticMargin(0.35, 0.05, "additive"))
        >>> features, labels = torch.randn(16, 8), torch.randint(100, (16,))
        >>> bool(head(features, labels) == head(features, labels))  # other margins
        False
        >>> head.margin.seed, head.margin.calls  # all that it keeps
        (tensor(0), tensor(2))
    """

    seed: Tensor
    calls: Tensor

    def __init__(self, margin: float = 0.5, std: float = 0.05, kind: str = "angular", *, seed: int = 0) -> None:
        super().__init__()
        margin, std, seed = plain(margin), plain(std), plain(seed)
        check_choice("kind", kind, ("angular", "additive"))
        if kind == "angular":
            check_angle("margin", margin)
        else:
            check_value("margin", margin)
        check_number("std", std, "at least 0 and finite", lambda value: 0 <= value < math.inf)
        if not is_int(seed):
            raise TypeError(f"seed must be an int, but it is {type_name(seed)}")
        check_number("seed", seed, "in [0, 2^62)", lambda value: 0 <= value < 1 << 62)
        self.margin, self.std, self.kind = float(margin), float(std), kind
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        margin = self._draw(cosine) if self.training else self.margin
        return cosine - margin if self.kind == "additive" else (angle_of(cosine) + margin).cos()

    def _draw(self, cosine: Tensor) -> Tensor:
        """m of each row ``[B]``."""
        calls = self.calls if in_backward() else self.calls + 1
        inputs = cosine.detach(), self.seed, calls
        normal = torch.ops.amsoftmax_kernels.normal_draws(*inputs) if is_traced(cosine) else normal_draws(*inputs)
        self.calls.copy_(calls)
        margin: Tensor = self.margin + self.std * normal
        return margin

    def extra_repr(self) -> str:
        return f"margin={self.margin}, std={self.std}, kind={self.kind!r}"


def running_means(norm: Tensor, counts: Tensor, mean: Tensor, deviation: Tensor, t_alpha: float) -> tuple[Tensor, Tensor]:
    """The running means ``[1]`` after a batch of norms ``[B]``, of which some count: one alone has no deviation."""
    norm, number = norm.double(), counts.sum()
    batch_mean = torch.where(counts, norm, 0).sum() / number
    batch_square = torch.where(counts, (norm - batch_mean) ** 2, 0).sum() / (number - 1)
    return (
        torch.where(number >= 1, torch.lerp(mean, batch_mean, t_alpha), mean),
        torch.where(number >= 2, torch.lerp(deviation, batch_square.sqrt(), t_alpha), deviation),
    )


def normal_draws(rows: Tensor, seed: Tensor, call: Tensor) -> Tensor:
    """Numbers of the standard normal distribution, like ``rows [B]`` in dtype and device."""
    position = torch.arange(2 * len(rows), device=rows.device)
    # In (0, 1): 52 bits, and a half. Then Box and Muller's transform.
    first, second = ((random_numbers(position, seed, call) >> 11).double() + 0.5).div(1 << 52).view(2, -1)
    normal: Tensor = (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()
    return normal.to(rows.dtype)


# Operators: a compiled backward pass may compute anything else again, from a state that has gone on since.
_MEANS = "(Tensor norm, Tensor counts, Tensor mean, Tensor deviation, float t_alpha) -> (Tensor, Tensor)"
register(
    "running_means", _MEANS, running_means, lambda norm, counts, mean, deviation, t_alpha: (mean.clone(), mean.clone()),
    differentiable=False,
)  # fmt: skip
register(
    "normal_draws", "(Tensor rows, Tensor seed, Tensor call) -> Tensor", normal_draws,
    lambda rows, seed, call: torch.empty_like(rows), differentiable=False,
)  # fmt: skip


def in_backward() -> bool:
    """Whether a backward pass is at work: then the call is one that is made again, and is not to count."""
    number: Any = -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
    return bool(number != -1)
