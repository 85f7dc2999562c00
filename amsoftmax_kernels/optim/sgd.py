"""``torch.optim.SGD`` for a head's centres."""

from __future__ import annotations

from typing import Any

import torch

from ..backends.update import SGD
from ..modules import AMSoftmaxLoss
from .fused import FusedOptimizer, weight_of


class FusedSGD(FusedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` for a head's centres, in the backward pass.

    ``backward()`` updates the centres and their momentum, as ``torch.optim.SGD`` would from their whole gradient;
    ``weight.grad`` stays None. The features' gradient is that of the centres before. ``step()`` ends the step. Learning rate
    and the like are read in the backward pass. A class whose gradient is not finite is left as it is and counted in
    ``skipped``: a batch with one row that is NaN makes every class such a one, so that the whole step is skipped.

    Args:
        head: :class:`AMSoftmaxLoss` or :class:`ShardedAMSoftmaxLoss`; its ``weight`` alone is updated, a scale or margin
            that is learned needs an optimizer of its own.
        lr: learning rate.
        momentum, dampening, weight_decay, nesterov: as ``torch.optim.SGD``'s.
        state_dtype: of the momentum; None takes the centres', and float32 for float16 centres.
        stochastic_rounding: of what is bfloat16, centres and momentum: what is less than half a bit is then not lost. None:
            where the centres are bfloat16.
        seed: of that rounding's random bits, which do not depend on the number of ranks or threads.
        scaler: the ``torch.amp.GradScaler`` that scales the loss, if one does; ``scaler.step(optimizer)`` follows as usual.

    Attributes:
        skipped: how many updates of single classes were left out; reading it waits for a GPU.

    The state_dict has ``torch.optim.SGD``'s keys and shapes and either loads the other's, and ``step`` beside them where
    stochastic rounding counts on it. Norms over all gradients (``clip_grad_norm_``) do not contain the centres': there is
    none to scale. Made again for the same head, the last one counts. The head's forward pass is not traced by torch.compile.

    Raises:
        TypeError, ValueError: a wrong argument, or one that ``torch.optim.SGD`` refuses.
        RuntimeError: in the head's call, for :class:`AMSoftmaxLoss` in a process group of several ranks, where the weight
            has hooks or was changed for another Parameter. In ``backward()``, with nothing changed: before ``step()`` has
            ended the last step (so gradients cannot be accumulated), with ``create_graph=True``, where ``weight.grad`` is
            not None, in a CUDA graph's capture. In every call, after a backward pass was broken off, until the head's state
            is loaded; ``head.state_dict()`` warns.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss
        >>> from amsoftmax_kernels.optim import FusedSGD
        >>> head = AMSoftmaxLoss(embedding_dim=8, num_classes=100)
        >>> optimizer = FusedSGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)
        >>> before = head.weight.detach().clone()
        >>> head(torch.randn(16, 8, requires_grad=True), torch.randint(100, (16,))).backward()
        >>> optimizer.step()
        >>> bool((head.weight != before).any(1).all()), head.weight.grad
        (True, None)
    """

    def __init__(
        self,
        head: AMSoftmaxLoss,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        weight = weight_of(head)
        super().__init__([weight], lr, momentum, dampening, weight_decay, nesterov)
        self._attach(head, state_dtype, stochastic_rounding, seed, scaler)

    def _names(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.param_groups[0]["momentum"] else ()

    def _counts(self) -> bool:
        return bool(self._stochastic)

    def _rule(self, group: dict[str, Any], first: bool, step: int) -> SGD:
        return SGD(group["lr"], group["momentum"], group["dampening"], group["weight_decay"], group["nesterov"], first)
