"""Optimizers for sampled classes: a row that was not drawn is not moved, neither by momentum nor by weight decay.

A parameter whose gradient came row by row (``ShardedAMSoftmaxLoss(..., sample_rate=0.1, rowwise_gradient=True)``) is
updated in those rows alone, and :meth:`zero_grad` clears them alone. Any other parameter is updated as by PyTorch's
optimizer of the name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .sharded.mixed import mixed_parameters as mixed_parameters
from .sharded.shards import local_part

_ROWS = "amsoftmax_kernels_rows"  # on a parameter: its gradient, and the rows of it that were written
_HOOKED = "amsoftmax_kernels_hooked"
UPDATE_ELEMENTS = 1 << 24  # of the drawn rows that are updated at once: memory of this size goes back to the system


def _forget(parameter: Tensor) -> None:
    setattr(parameter, _ROWS, (None, []))


@torch.no_grad()
def accumulate_rows(parameter: Tensor, rows: Tensor, grad: Tensor) -> None:
    """Add ``grad [n, D]`` to the distinct ``rows [n]`` of this rank's part of ``parameter.grad``, and remember which."""
    if not hasattr(parameter, _HOOKED):
        # A gradient that autograd adds makes it an ordinary one.
        parameter.register_post_accumulate_grad_hook(_forget)
        setattr(parameter, _HOOKED, True)
    gradient = parameter.grad
    if gradient is None:
        _forget(parameter)  # before there is another of its size
        parameter.grad = gradient = torch.zeros_like(parameter)
        setattr(parameter, _ROWS, (gradient, []))
    local = local_part(gradient)
    local.index_add_(0, rows, grad.to(local.dtype))  # in any order: the rows are distinct
    record: Any = getattr(parameter, _ROWS, (None, []))
    if record[0] is gradient:
        record[1].append(rows)


def written_rows(parameter: Tensor) -> Tensor | None:
    """The distinct rows of this rank's part that its gradient was written in; None where it is an ordinary one."""
    whole, written = getattr(parameter, _ROWS, (None, []))
    if whole is None or whole is not parameter.grad:
        return None
    if len(written) > 1:
        written[:] = [torch.cat(written).unique()]
    return written[0] if written else torch.empty(0, dtype=torch.int64, device=local_part(parameter).device)


class _Rowwise(torch.optim.Optimizer):
    _state_names: tuple[str, ...] = ()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Cannot be captured in a CUDA graph, whose rows would stay the same."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{type(self).__name__}.step cannot be captured in a CUDA graph")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update({name: torch.zeros_like(parameter) for name in self._names(group)})
                    state["step"] = torch.zeros((), dtype=torch.float32)
                state["step"] += 1
                tensors = [local_part(each) for each in (parameter, parameter.grad, *(state[n] for n in self._names(group)))]
                rows = written_rows(parameter)
                if rows is None:
                    self._update(group, int(state["step"]), *tensors)
                    continue
                for some in rows.split(max(UPDATE_ELEMENTS // max(tensors[0].shape[-1], 1), 1)):
                    taken = [each.index_select(0, some) for each in tensors]
                    self._update(group, int(state["step"]), *taken)
                    for whole, part in zip([tensors[0], *tensors[2:]], [taken[0], *taken[2:]], strict=True):
                        whole.index_copy_(0, some, part)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; of one written row by row those rows, keeping its memory for the next step."""
        kept = []
        for group in self.param_groups:
            for parameter in group["params"]:
                rows = written_rows(parameter)
                if rows is not None:
                    local_part(parameter.grad).index_fill_(0, rows, 0)
                    getattr(parameter, _ROWS)[1].clear()
                    kept.append((parameter, parameter.grad))
        super().zero_grad(set_to_none)
        for parameter, grad in kept:
            parameter.grad = grad

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._state_names

    def _update(self, group: dict[str, Any], step: int, value: Tensor, grad: Tensor, *state: Tensor) -> None:
        raise NotImplementedError


class RowwiseSGD(_Rowwise):
    """SGD with momentum and weight decay, as ``torch.optim.SGD``, that leaves rows alone that were not drawn.

    Args:
        params: as any optimizer's.
        lr: learning rate.
        momentum: of the velocity v ← momentum·v + g, with g the gradient plus ``weight_decay`` times the value.
        weight_decay: 0 for none.

    Raises:
        ValueError: a negative argument.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import ShardedAMSoftmaxLoss
        >>> from amsoftmax_kernels.optim import RowwiseSGD
        >>> head = ShardedAMSoftmaxLoss(8, 100, sample_rate=0.25, rowwise_gradient=True, seed=0)
        >>> optimizer = RowwiseSGD(head.parameters(), lr=0.1, momentum=0.9)
        >>> before = head.weight.detach().clone()
        >>> head(torch.randn(4, 8, requires_grad=True), torch.tensor([1, 2, 3, 4])).backward()
        >>> optimizer.step()
        >>> bool((head.weight != before).any(1).sum() <= 25)  # none but those that were drawn
        True
        >>> optimizer.zero_grad()
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.1, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        _check(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, group: dict[str, Any], step: int, value: Tensor, grad: Tensor, *state: Tensor) -> None:
        if group["weight_decay"]:
            grad = grad.add(value, alpha=group["weight_decay"])
        for velocity in state:
            grad = velocity.mul_(group["momentum"]).add_(grad)
        value.add_(grad, alpha=-group["lr"])


class RowwiseAdamW(_Rowwise):
    """AdamW (Loshchilov and Hutter 2019), as ``torch.optim.AdamW``, that leaves rows alone that were not drawn.

    The bias of the moments is corrected by the number of steps, not of a row's draws, as in ``torch.optim.SparseAdam``.

    Args:
        params: as any optimizer's.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: times ``lr`` and the value, taken off it.

    Raises:
        ValueError: a negative argument, or a decay rate of 1 or more.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import ShardedAMSoftmaxLoss
        >>> from amsoftmax_kernels.optim import RowwiseAdamW
        >>> head = ShardedAMSoftmaxLoss(8, 100, sample_rate=0.25, rowwise_gradient=True, seed=0)
        >>> optimizer = RowwiseAdamW(head.parameters(), lr=0.01)
        >>> head(torch.randn(4, 8, requires_grad=True), torch.tensor([1, 2, 3, 4])).backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    _state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        _check(lr=lr, eps=eps, weight_decay=weight_decay, **{f"betas[{i}]": beta for i, beta in enumerate(betas)})
        if max(betas) >= 1:
            raise ValueError(f"betas must be less than 1, but they are {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], step: int, value: Tensor, grad: Tensor, *state: Tensor) -> None:
        (first, second), (mean, square) = group["betas"], state
        value.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(grad, 1 - first)
        square.mul_(second).addcmul_(grad, grad, value=1 - second)
        root = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        value.addcdiv_(mean, root, value=-group["lr"] / (1 - first**step))


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, but it is {value}")
