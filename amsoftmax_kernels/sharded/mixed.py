"""A sharded head's DTensors and a backbone's plain tensors in one optimizer, one GradScaler, one ``clip_grad_norm_``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

# Functions on lists of tensors, of which PyTorch takes either kind but not both.
_ON_LISTS = ("_foreach_", "_fused_", "_amp_foreach_")


def mixed_parameters() -> AbstractContextManager[Any]:
    """In this context, one optimizer, GradScaler or ``clip_grad_norm_`` takes the sharded head's parameters and plain ones.

    PyTorch hands lists of tensors to one function, which refuses DTensors and plain tensors together ("got mixed
    torch.Tensor and DTensor"). Here each such call is made for either kind on its own. A norm over both counts every shard
    once, and a GradScaler skips a step on every rank if a gradient is not finite on one. Every rank must enter it, and do
    the same in it.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import ShardedAMSoftmaxLoss
        >>> from amsoftmax_kernels.optim import mixed_parameters
        >>> backbone, head = torch.nn.Linear(4, 8), ShardedAMSoftmaxLoss(embedding_dim=8, num_classes=100)
        >>> parameters = [*backbone.parameters(), *head.parameters()]
        >>> optimizer, scaler = torch.optim.SGD(parameters, lr=0.1), torch.amp.GradScaler("cpu")
        >>> scaler.scale(head(backbone(torch.randn(16, 4)), torch.randint(100, (16,)))).backward()
        >>> with mixed_parameters():
        ...     scaler.unscale_(optimizer)
        ...     norm = torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        ...     _ = scaler.step(optimizer)
        ...     scaler.update()
    """
    return _Mixed()


class _Mixed(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if not (args and _is_mixed(args[0])):
            return func(*args, **kwargs)
        if name == "stack":  # norms of both kinds, about to be put together
            return func([each.full_tensor() if isinstance(each, DTensor) else each for each in args[0]], *args[1:], **kwargs)
        if name.startswith(_ON_LISTS):
            return _apart(func, args, kwargs)
        return func(*args, **kwargs)


def _is_mixed(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, Tensor) for each in value):
        return False
    return len({isinstance(each, DTensor) for each in value}) == 2


def _apart(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` for plain tensors, then for DTensors; what it returns in the order of the first list."""
    first = args[0]
    results: list[Any] = [None] * len(first)
    for sharded in (False, True):
        places = [i for i, each in enumerate(first) if isinstance(each, DTensor) is sharded]

        def chosen(value: Any, places: list[int] = places) -> Any:
            # Beside the tensors: lists of as many others or of numbers, or one for all.
            each_has_one = isinstance(value, (list, tuple)) and len(value) == len(first)
            return [value[i] for i in places] if each_has_one else value

        returned = func(*map(chosen, args), **{key: chosen(value) for key, value in kwargs.items()})
        if returned is None:  # changed in place
            continue
        for place, each in zip(places, returned, strict=True):
            results[place] = each
    return None if any(each is None for each in results) else results
