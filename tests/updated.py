"""A head whose optimizer updates the centres in the backward pass, beside the same head with PyTorch's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.optim import FusedSGD

from .cases import relative


def two_steps_apart(make: Any, tensors: tuple[Tensor, Tensor, Tensor], num_classes: int, **options: Any) -> float:
    """How far apart two steps of ``make``, FusedSGD or FusedAdamW, and of ``torch.optim``'s move ``[C, D]`` centres."""
    x, weight, labels = tensors
    head = ak.AMSoftmaxLoss(x.shape[1], num_classes, 8.0, dtype=x.dtype, **options)
    head.set_centres(weight)
    other = copy.deepcopy(head)
    theirs = torch.optim.SGD if make is FusedSGD else torch.optim.AdamW
    pairs = (head, make(head, lr=0.05)), (other, theirs(other.parameters(), lr=0.05))
    for _ in range(2):
        for each, optimizer in pairs:
            each(x, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert head.weight.grad is None
    return relative((head.weight - weight).detach(), (other.weight - weight).detach())
