"""``torch.optim.AdamW`` for a head's centres."""

from __future__ import annotations

from typing import Any

import torch

from ..backends.update import AdamW
from ..modules import AMSoftmaxLoss
from .fused import FusedOptimizer, weight_of


class FusedAdamW(FusedOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` for a head's centres, in the backward pass: :class:`FusedSGD` says how and when.

    Args:
        head, state_dtype, stochastic_rounding, seed, scaler: as :class:`FusedSGD`'s.
        lr, betas, eps, weight_decay: as ``torch.optim.AdamW``'s.

    With sampled negatives the bias of the moments is corrected by the number of steps, not of a class's draws, as in
    ``torch.optim.SparseAdam``. A second moment in bfloat16 (``state_dtype``) wants stochastic rounding, without which it
    stands still from the first some hundred steps on.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`FusedSGD`.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import ShardedAMSoftmaxLoss
        >>> from amsoftmax_kernels.optim import FusedAdamW
        >>> head = ShardedAMSoftmaxLoss(embedding_dim=8, num_classes=100, sample_rate=0.25, seed=0)
        >>> optimizer = FusedAdamW(head, lr=0.01)
        >>> before = head.weight.detach().clone()
        >>> head(torch.randn(4, 8, requires_grad=True), torch.tensor([1, 2, 3, 4])).backward()
        >>> optimizer.step()
        >>> int((head.weight != before).any(1).sum())  # of the classes that were drawn
        25
    """

    def __init__(
        self,
        head: AMSoftmaxLoss,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        weight = weight_of(head)
        super().__init__([weight], lr, betas, eps, weight_decay)
        self._attach(head, state_dtype, stochastic_rounding, seed, scaler)

    def _names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _counts(self) -> bool:
        return True

    def _rule(self, group: dict[str, Any], first: bool, step: int) -> AdamW:
        first_beta, second_beta = group["betas"]
        return AdamW(group["lr"], first_beta, second_beta, group["eps"], group["weight_decay"], step)
