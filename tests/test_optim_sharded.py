"""Centres updated in the backward pass, sharded over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import amsoftmax_kernels as ak
from amsoftmax_kernels.optim import FusedSGD
from amsoftmax_kernels.sharded.shards import whole

from .cases import relative
from .ranks import Ranks, device
from .updated import KINDS, C, D, batch


def sharded_steps(replicas: int, kind: str, dtype: torch.dtype, sizes: list[int]) -> tuple[Tensor, ...]:
    """The whole centres after some steps, and this rank's gradients, of batches of these sizes."""
    world = dist.get_world_size()
    mesh = None if replicas == 1 else init_device_mesh(device().type, (replicas, world // replicas))
    fused, _, settings = KINDS[kind]
    head = ak.ShardedAMSoftmaxLoss(D, C, 8.0, mesh=mesh, seed=1, dtype=dtype, device=device(), save_bytes=0)
    optimizer = fused(head, **settings)
    grads = []
    start = sum(sizes[: dist.get_rank()])
    mine = slice(start, start + sizes[dist.get_rank()])
    for step in range(3):
        x, labels = (each.to(device()) for each in batch(step, dtype))
        leaf = x[mine].clone().requires_grad_()
        head(leaf, labels[mine]).backward()
        optimizer.step()
        grads.append(leaf.grad / world)
        assert head.weight.grad is None
    return whole(head.weight).detach(), torch.cat(grads)


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
@pytest.mark.parametrize(("replicas", "sizes"), [(1, [9, 7]), (2, [11, 5]), (2, [4, 0, 5, 7]), (1, [0, 8, 8])])
def test_sharded_steps_are_those_of_one_process(ranks: Ranks, replicas: int, sizes: list[int], kind: str) -> None:
    results = ranks.run(len(sizes), sharded_steps, replicas, kind, torch.float64, sizes)
    head = ak.ShardedAMSoftmaxLoss(D, C, 8.0, seed=1, dtype=torch.float64)
    optimizer = KINDS[kind][1]([head.weight], **KINDS[kind][2])
    grads = []
    for step in range(3):
        x, labels = batch(step, torch.float64)
        leaf = x.clone().requires_grad_()
        optimizer.zero_grad()
        head(leaf, labels).backward()
        optimizer.step()
        grads.append(leaf.grad)
    for weight, _ in results:
        assert torch.equal(weight, results[0][0]) and relative(weight.cpu(), head.weight.detach()) < 1e-12
    for step in range(3):
        parts = [grad.split([size] * 3)[step].cpu() for size, (_, grad) in zip(sizes, results, strict=True)]
        assert relative(torch.cat(parts), grads[step]) < 1e-12


def plain_head_in_a_group() -> str:
    class Head(ak.AMSoftmaxLoss): ...

    head = Head(D, C, device=device())
    optimizer = FusedSGD(head, lr=0.1)
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="ShardedAMSoftmaxLoss") as caught:
        head(torch.randn(4, D, device=device()), torch.arange(4, device=device()))
    assert torch.equal(head.weight, before) and optimizer.skipped == 0
    return str(caught.value)


def test_a_plain_head_on_several_ranks_is_an_error(ranks: Ranks) -> None:
    assert all("this rank's rows alone" in each for each in ranks.run(2, plain_head_in_a_group))
