"""More or fewer classes in a run that goes on: centres and the optimizer's state of the classes that stay are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_size
from .modules import AMSoftmaxLoss
from .values import type_name


@torch.no_grad()
def resize_classes(
    head: AMSoftmaxLoss,
    num_classes: int,
    *,
    keep: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Give a head ``num_classes`` classes, in place; centres of classes that are new are drawn.

    Resume a run with other classes by loading its checkpoint into a head and an optimizer of the old size, then calling
    this. ``head.weight`` is another Parameter afterwards: hand the optimizer over, or make it after this call.

    Args:
        head: either head. Every rank of a sharded one must call this with the same arguments; all centres pass by on each
            rank, a few MB at a time.
        num_classes: the new C.
        keep: ``[n]`` old classes, distinct, n at most ``num_classes``: they become classes 0 to n − 1. None keeps as many as
            there is room for, in their order.
        optimizer: of which the state of kept rows is kept (momentum, Adam's moments), zeros for new ones; hyperparameters
            and schedules stay.

    Raises:
        TypeError, ValueError: an argument is wrong, the optimizer is not the head's, or the head has a margin a class: set
            ``head.margin`` to a number first, and to the new margins afterwards.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import AMSoftmaxLoss, resize_classes
        >>> head = AMSoftmaxLoss(embedding_dim=8, num_classes=100)
        >>> optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        >>> resize_classes(head, 120, optimizer=optimizer)  # classes 100 to 119 are new
        >>> resize_classes(head, 3, keep=torch.tensor([4, 0, 9]), optimizer=optimizer)  # these become 0, 1 and 2
        >>> head.weight.shape
        torch.Size([3, 8])
    """
    if not isinstance(head, AMSoftmaxLoss):
        raise TypeError(f"head must be an AMSoftmaxLoss or a ShardedAMSoftmaxLoss, but it is {type_name(head)}")
    num_classes = check_size("num_classes", num_classes)
    wanted = _wanted(head, num_classes, keep)
    if _has_a_margin_a_class(head):
        raise ValueError("head has a margin for each class: set head.margin to a number first, to the new ones afterwards")
    if optimizer is not None and not any(
        each is head.weight for group in optimizer.param_groups for each in group["params"]
    ):
        raise ValueError("optimizer must be that of head.weight, but it does not hold it")
    shards: Any = getattr(head, "shards", None)
    if shards is not None and shards.mesh is None:
        head.check_alone()  # type: ignore[operator]
    old, rows_of = head.weight, _taker(head)
    sampling_state: Any = getattr(head, "sampling_state", None)

    head.num_classes = num_classes
    head.weight = weight = nn.Parameter(head._empty_weight(old.device, old.dtype), requires_grad=old.requires_grad)
    head.reset_parameters()
    if sampling_state is not None:  # the draws go on
        head.get_buffer("sampling_state").copy_(sampling_state)
    shards = getattr(head, "shards", None)  # others than before
    mine = wanted if shards is None else wanted[shards.start : shards.stop]
    mine = mine.to(old.device)
    kept = rows_of(old, mine)
    local = _by_class(weight, head.subcentres)
    local.copy_(torch.where((mine >= 0).view(-1, *(1,) * (local.dim() - 1)), kept, local))
    if optimizer is not None:
        _hand_over(optimizer, old, weight, lambda each: _like(weight, rows_of(each, mine), shards))


def _wanted(head: AMSoftmaxLoss, num_classes: int, keep: Tensor | None) -> Tensor:
    """Of each new class the old one, -1 where it is new: ``[num_classes]`` on the CPU."""
    old = head.num_classes
    if keep is None:
        keep = torch.arange(min(old, num_classes))
    if not isinstance(keep, Tensor) or keep.is_floating_point() or keep.is_complex() or keep.dtype == torch.bool:
        raise TypeError(f"keep must be a tensor of integers, but it is {type_name(keep)}")
    keep = keep.detach().to("cpu", torch.int64)
    if keep.dim() != 1 or len(keep) > num_classes:
        raise ValueError(
            f"keep must hold at most num_classes={num_classes} classes [n], but its shape is {list(keep.shape)}"
        )
    if len(keep) and (keep.min() < 0 or keep.max() >= old or len(keep.unique()) < len(keep)):
        raise ValueError(f"keep must hold distinct classes in [0, {old})")
    return torch.cat([keep, keep.new_full((num_classes - len(keep),), -1)])


def _has_a_margin_a_class(head: AMSoftmaxLoss) -> bool:
    margin: Any = head.margin
    tensors = [margin, getattr(margin, "margin", None)]
    if isinstance(margin, nn.Module):
        tensors += [*margin.parameters(), *margin.buffers()]
    return any(isinstance(each, Tensor) and each.dim() > 0 and each.shape[0] == head.num_classes for each in tensors)


def _taker(head: AMSoftmaxLoss) -> Callable[[Tensor, Tensor], Tensor]:
    """What takes this process's new classes from a tensor of the old ones, zeros where -1 stands for one."""
    shards: Any = getattr(head, "shards", None)
    if shards is not None:
        return lambda tensor, mine: shards.take_rows(_by_class(tensor, head.subcentres), mine)

    def taken(tensor: Tensor, mine: Tensor) -> Tensor:
        rows = _by_class(tensor, head.subcentres)[mine.clamp(min=0)]
        rows[mine < 0] = 0
        return rows

    return taken


def _by_class(tensor: Tensor, subcentres: int) -> Tensor:
    """What this process has of it with a class a row: ``[C, D]``, with sub-centres ``[C, K, D]``."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a DTensor
    return local if subcentres == 1 else local.view(-1, subcentres, local.shape[-1])


def _like(weight: Tensor, local: Tensor, shards: Any) -> Tensor:
    """The new classes as the optimizer keeps them: of a sharded head's, a DTensor."""
    if hasattr(weight, "to_local"):
        result: Tensor = shards.distribute(local)
        return result
    return local.view(-1, local.shape[-1])


def _hand_over(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, resized: Callable[[Tensor], Tensor]) -> None:
    """Put a parameter in the place of another, with its state: what has a row a class is resized, all else stays."""
    for group in optimizer.param_groups:
        group["params"] = [new if each is old else each for each in group["params"]]
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    shapes = (old.shape, (*old.shape[:-1], 1))
    optimizer.state[new] = {
        key: resized(value) if isinstance(value, Tensor) and tuple(value.shape) in shapes else value
        for key, value in state.items()
    }
