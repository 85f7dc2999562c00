"""A sharded head beside a plain backbone: one optimizer, one GradScaler, one norm; and what must not go unsaid."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import amsoftmax_kernels as ak
from amsoftmax_kernels.optim import mixed_parameters
from amsoftmax_kernels.sharded.shards import whole

from .ranks import Ranks, device

C, D, INPUTS, ROWS = 21, 6, 8, 8
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(INPUTS, 16), nn.PReLU(), nn.Linear(16, D)).to(device())
        scale = nn.Parameter(torch.tensor(20.0, device=device()))
        self.head = ak.ShardedAMSoftmaxLoss(D, C, scale, seed=3, device=device())

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.head(self.backbone(x), labels)
        return loss


def batch(step: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of one step."""
    generator = torch.Generator().manual_seed(step)
    x, labels = torch.randn(ROWS, INPUTS, generator=generator), torch.randint(C, (ROWS,), generator=generator)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return x.chunk(world)[rank].to(device()), labels.chunk(world)[rank].to(device())


def train(kind: str, overflow: bool) -> list[Tensor]:
    """Five steps with one of everything; in the third a gradient of the last shard alone is not finite."""
    model = Model()
    backbone = DistributedDataParallel(model.backbone) if dist.is_initialized() else model.backbone
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[kind](parameters)
    scaler = torch.amp.GradScaler(device().type, init_scale=1024.0)
    norms = []
    for step in range(5):
        x, labels = batch(step)
        scaler.scale(model.head(backbone(x), labels)).backward()
        grad = model.head.weight.grad
        assert grad is not None
        local = grad.to_local() if hasattr(grad, "to_local") else grad
        if overflow and step == 2 and (not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1):
            local[-1, 0] = torch.inf
        with mixed_parameters():
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(parameters, 0.5))
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == (512.0 if overflow else 1024.0)
    return [torch.stack([whole(each) for each in norms]), *(whole(each).detach().cpu() for each in parameters)]


@pytest.mark.parametrize("overflow", [False, True], ids=["finite", "overflow"])
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_one_optimizer_one_scaler_and_one_norm(ranks: Ranks, kind: str, overflow: bool) -> None:
    expected = train(kind, overflow)
    for found in ranks.run(2, train, kind, overflow):
        for got, right in zip(found, expected, strict=True):
            assert torch.allclose(got, right, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_outside_of_it_plain_and_sharded_lists_are_as_ever() -> None:
    first, second = torch.ones(3), torch.ones(2)
    with mixed_parameters():
        assert torch.equal(torch.stack([first, first]), torch.ones(2, 3))
        torch._foreach_mul_([first, second], 2.0)
    assert first.eq(2).all() and second.eq(2).all()


def whole_model(kind: str) -> tuple[Tensor, Tensor]:
    """Gradients of a model that has the head in it, as docs/sharded.md wraps one."""
    model = Model()
    wrapped: Any = model
    if kind == "ddp":
        ignored = [f"head.{name}" for name, _ in model.head.named_parameters()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        wrapped = DistributedDataParallel(model)
    elif kind == "fsdp":
        fully_shard(model, ignored_params=set(model.head.parameters()))
    wrapped(*batch(0)).backward()
    weight = model.backbone.get_parameter("0.weight").grad
    assert weight is not None and model.head.weight.grad is not None
    return whole(weight), whole(model.head.weight.grad)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_model_that_contains_the_head(ranks: Ranks, kind: str) -> None:
    expected = whole_model("alone")
    for found in ranks.run(2, whole_model, kind):
        assert all(torch.allclose(*each, rtol=1e-4, atol=1e-6) for each in zip(found, expected, strict=True))


def made_too_early() -> str:
    with mock.patch.object(dist, "is_initialized", lambda: False):
        head = ak.ShardedAMSoftmaxLoss(D, C, device=device())
    assert head.shards.mesh is None
    try:
        head(torch.randn(3, D, device=device()), torch.arange(3, device=device()))
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_head_made_before_the_process_group_says_so(ranks: Ranks) -> None:
    assert all("before torch.distributed.init_process_group" in each for each in ranks.run(2, made_too_early))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_launched_process_without_a_group_says_so(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head: Any = ak.ShardedAMSoftmaxLoss(D, C)
    call = torch.compile(head, backend="eager") if compiled else head
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(torch.randn(3, D), torch.arange(3))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(RuntimeWarning, match="one of 4"):
        call(torch.randn(3, D), torch.arange(3))


def second_derivative(reduction: str) -> str:
    head = ak.ShardedAMSoftmaxLoss(D, C, seed=3, reduction=reduction, device=device())
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(dist.get_rank())).to(device()).requires_grad_()
    weight = torch.ones((), device=device(), requires_grad=True)
    loss = (weight * head(x, torch.arange(4, device=device()))).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    try:
        torch.autograd.grad(grad.norm(), weight)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_the_same_error_on_all_ranks(ranks: Ranks, reduction: str) -> None:
    assert all("differentiated once" in each for each in ranks.run(2, second_derivative, reduction))


def wrapped_head() -> None:
    head = ak.ShardedAMSoftmaxLoss(8, 20, device=device())
    with pytest.raises(TypeError, match="Wrap the backbone alone"):
        torch.nn.parallel.DistributedDataParallel(head)
    head(torch.randn(4, 8, device=device()), torch.arange(4, device=device())).backward()  # it is as it was


def test_a_head_wrapped_in_data_parallel_says_what_to_do(ranks: Ranks) -> None:
    ranks.run(2, wrapped_head)
