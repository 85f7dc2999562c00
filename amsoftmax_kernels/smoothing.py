"""Label smoothing (Szegedy et al. 2016, section 7): a share ε of each row's label is spread evenly over all classes.

Beside the loss it takes the mean of a row's logits, s·x̂·m̄ with m̄ the mean of the normalized centres: a vector of length D in
the place of B×C cosines. Its gradient is one vector for all centres, which a backend adds where it makes theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import streams
from .operators import is_traced
from .reference import EPS

_ROWS = 4096  # of the centres at a time


def sum_of_directions(weight: Tensor, inverse_norm: Tensor) -> Tensor:
    """Σ_j ŵ_j ``[D]`` in float64, of ``weight [C, D]`` and 1/‖w‖ ``[C]``; in chunks, for the same bits each time."""

    def work() -> Tensor:
        total = weight.new_zeros(weight.shape[1], dtype=torch.float64)
        for rows, inverse in zip(weight.split(_ROWS), inverse_norm.split(_ROWS), strict=True):
            total += inverse @ rows.to(inverse.dtype)
        return total

    return streams.alone(work) if weight.device.type == "cpu" and not is_traced(weight) else work()


@dataclass
class MeanCosine:
    """The mean ``[B]`` of each row's cosines to all centres, and its gradients, from the mean of their directions."""

    x: Tensor  # [B, D] x̂ in float64, zero where a row is ignored
    inverse: Tensor  # [B] 1/‖x‖
    mean: Tensor  # [D] in float64

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, mean: Tensor) -> MeanCosine:
        x = features.to(torch.float64, copy=True).masked_fill_((labels < 0)[:, None], 0)
        norm = torch.linalg.vector_norm(x, dim=1)
        inverse = norm.reciprocal().masked_fill_(norm <= EPS, 0) + (norm - norm)  # NaN where it overflows
        return cls(x * inverse[:, None], inverse, mean)

    def value(self) -> Tensor:
        return self.x @ self.mean

    def grad_directions(self, grad: Tensor, num_classes: int) -> Tensor:
        """That of every ŵ_j alike ``[D]``, for the gradient of the means ``grad [B]``."""
        return grad.double() @ self.x / num_classes

    def grad_features(self, grad: Tensor) -> Tensor:
        """``[B, D]``."""
        along = self.x * self.value()[:, None]
        return (self.mean - along) * (grad.double() * self.inverse)[:, None]


def smoothed(
    rows: Tensor, u: Tensor, scaled_cosine: Tensor, scaled_mean: Tensor, smoothing: float, num_classes: int
) -> Tensor:
    """The rows' losses with ε of the label on all classes: of ``rows``, softplus(log z − u), all ``[B]``.

    ``u`` is the target's logit s·ψ(t), ``scaled_cosine`` s·t and ``scaled_mean`` s times the mean cosine, in which the
    target has no margin yet.
    """
    return rows + smoothing * (u - scaled_mean - (u - scaled_cosine) / num_classes)
