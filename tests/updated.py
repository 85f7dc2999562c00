"""A head whose optimizer updates the centres in the backward pass, beside the same head with PyTorch's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD

from .cases import relative

D, C, B = 24, 150, 16
# An optimizer of ours, PyTorch's, and the options of both.
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "momentum": (FusedSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 5e-3}),
    "plain": (FusedSGD, torch.optim.SGD, {"lr": 0.5, "weight_decay": 5e-3}),
    "dampening": (FusedSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.8, "dampening": 0.4}),
    "nesterov": (FusedSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.8, "nesterov": True, "weight_decay": 1e-3}),
    "adamw": (FusedAdamW, torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
}


def pair(kind: str, dtype: torch.dtype, **head: Any) -> tuple[Any, Any, Any, Any]:
    """A head and its fused optimizer, the same head and PyTorch's."""
    fused, theirs, options = KINDS[kind]
    torch.manual_seed(3)
    ours = ak.AMSoftmaxLoss(D, C, **{"scale": 8.0, **head}, dtype=dtype)
    other = copy.deepcopy(ours)
    return ours, fused(ours, **options), other, theirs([other.weight], **options)


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of few classes, some of them twice, with ignored rows, and with rows at their centre."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(C, (B,), generator=generator)
    labels[1], labels[5] = labels[0], -100
    return x, labels


def take_step(head: Any, optimizer: Any, x: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    head(x, labels).backward()
    optimizer.step()


def made(**options: Any) -> tuple[ak.AMSoftmaxLoss, FusedSGD, Tensor, Tensor]:
    """A head, its optimizer after one step, and a batch."""
    head, optimizer, *_ = pair("momentum", torch.float64, **options)
    x, labels = batch(0, torch.float64)
    take_step(head, optimizer, x.requires_grad_(), labels)
    return head, optimizer, x, labels


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
            take_step(each, optimizer, x, labels)
        assert head.weight.grad is None
    return relative((head.weight - weight).detach(), (other.weight - weight).detach())
