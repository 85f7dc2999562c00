"""The sharded head inside a training loop: DistributedDataParallel, FSDP, autocast, clipping, compile; and what travels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import amsoftmax_kernels as ak
from amsoftmax_kernels.sharded.shards import local_part, whole

from .cases import relative
from .ranks import Ranks, device
from .sharded_head import C, D, backbone, batch, make_head, mine

STEPS = 20


def step_sizes(step: int, world_size: int) -> tuple[int, ...]:
    """Batches that differ between ranks, and change."""
    return tuple(2 + (step + 3 * rank) % 5 for rank in range(world_size))


def train(kind: str) -> dict[str, Tensor]:
    """20 steps on these ranks, parameter by parameter."""
    world = dist.get_world_size()
    mesh = init_device_mesh(device().type, (2, world // 2)) if kind == "2-d" else None
    head = make_head(mesh)
    net: Any = backbone()
    if kind == "fsdp":
        fully_shard(net, mesh=head.shards.mesh)
    else:
        net = DistributedDataParallel(net)
    if kind == "compiled":
        net = torch.compile(net, backend="aot_eager")
    # DTensors apart from plain parameters: PyTorch's foreach, its way on a GPU, does not take them together.
    groups = [{"params": net.parameters()}, {"params": [head.weight]}, {"params": [head.scale]}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=True)
    accumulate = 2 if kind == "accumulated" else 1
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            sizes = step_sizes(step * accumulate + part, world)
            inputs, labels = (mine(each, sizes) for each in batch(step * accumulate + part, sizes))
            if kind == "checkpointed":
                loss = checkpoint(lambda x, y: head(net(x), y), inputs, labels, use_reentrant=False)
            else:
                loss = head(net(inputs), labels)
            (loss / accumulate).backward()
        if kind == "clipped":
            torch.nn.utils.clip_grad_norm_([head.weight], 0.2)
        optimizer.step()
    parameters = {**dict(head.named_parameters()), **dict(net.named_parameters())}
    return {name.split("module.")[-1].removeprefix("_orig_mod."): whole(p).detach().cpu() for name, p in parameters.items()}


def train_alone(kind: str, world: int) -> dict[str, Tensor]:
    head, net = make_head(), backbone()
    optimizer = torch.optim.SGD([*head.parameters(), *net.parameters()], lr=0.05, momentum=0.9, weight_decay=1e-3)
    accumulate = 2 if kind == "accumulated" else 1
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            inputs, labels = batch(step * accumulate + part, step_sizes(step * accumulate + part, world))
            (head(net(inputs), labels) / accumulate).backward()
        if kind == "clipped":
            torch.nn.utils.clip_grad_norm_([head.weight], 0.2)
        optimizer.step()
    return {name: p.detach().cpu() for name, p in (*head.named_parameters(), *net.named_parameters())}


@pytest.mark.parametrize(
    "kind, world",
    [
        ("ddp", 2),
        ("ddp", 3),
        ("fsdp", 2),
        ("2-d", 4),
        ("clipped", 3),
        ("accumulated", 2),
        ("checkpointed", 2),
        ("compiled", 2),
    ],
)
def test_twenty_steps_equal_those_of_one_process(ranks: Ranks, kind: str, world: int) -> None:
    alone = train_alone(kind, world)
    for result in ranks.run(world, train, kind):
        assert result.keys() == alone.keys()
        for name, value in alone.items():
            assert relative(result[name], value) < 1e-10, name
    start = make_head().weight.detach()
    assert relative(start, alone["weight"]) > 0.05  # it did train


def clipped_norm() -> tuple[Tensor, Tensor]:
    head = make_head()
    inputs, labels = batch(0, (4, 4))
    head(mine(inputs, (4, 4))[:, :1].expand(-1, D), mine(labels, (4, 4))).backward()
    expected = whole(head.weight.grad).norm()
    norm = torch.nn.utils.clip_grad_norm_([head.weight], 1e9)
    return whole(norm), expected


def test_clipping_sees_the_global_norm(ranks: Ranks) -> None:
    for norm, expected in ranks.run(2, clipped_norm):
        torch.testing.assert_close(norm, expected)


def autocast_step(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Features float32, products in half precision, the loss scaled where that is customary."""
    world = dist.get_world_size()
    sizes = (16,) * world
    head = ak.ShardedAMSoftmaxLoss(D, C, seed=5, device=device())
    net = DistributedDataParallel(backbone(torch.float32))
    inputs, labels = (mine(each, sizes) for each in batch(0, sizes, torch.float32))
    # GradScaler cannot take plain parameters and DTensors of one optimizer together.
    optimizers = [torch.optim.SGD(each.parameters(), lr=1.0) for each in (net, head)]
    before = copy.deepcopy([whole(p).detach() for p in (*net.parameters(), head.weight)])
    scaler = torch.amp.GradScaler(device().type, init_scale=1024.0, enabled=dtype == torch.float16)
    with torch.autocast(device().type, dtype):
        loss = head(net(inputs), labels)
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return loss.detach(), *(old - whole(p).detach() for old, p in zip(before, (*net.parameters(), head.weight), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaled_loss(ranks: Ranks, dtype: torch.dtype) -> None:
    head, net = ak.ShardedAMSoftmaxLoss(D, C, seed=5, device=device()), backbone(torch.float32)
    inputs, labels = batch(0, (32,), torch.float32)
    loss = head(net(inputs), labels)
    loss.backward()
    exact = [loss.detach(), *(p.grad for p in (*net.parameters(), head.weight))]
    for result in ranks.run(2, autocast_step, dtype):
        for actual, expected in zip(result, exact, strict=True):
            assert relative(actual, expected.cpu()) < 0.03


def far_features(size: float) -> tuple[Tensor, Tensor]:
    head = ak.ShardedAMSoftmaxLoss(D, C, seed=5, device=device())
    x, labels = (mine(each, (16, 16)) for each in batch(0, (16, 16), torch.float32))
    x = (torch.cat([x, x[:, :2]], 1) * size).requires_grad_()
    with torch.autocast(device().type, torch.float16):
        loss = head(x, labels)
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("size", [1e5, 1e-6])
def test_features_past_the_range_of_float16(ranks: Ranks, size: float) -> None:
    x, labels = batch(0, (32,), torch.float32)
    x = (torch.cat([x, x[:, :2]], 1) * size).requires_grad_()
    exact = ak.ShardedAMSoftmaxLoss(D, C, seed=5, device=device())(x, labels)
    exact.backward()
    results = ranks.run(2, far_features, size)
    assert relative(results[0][0], exact.detach()) < 1e-3
    assert relative(torch.cat([each[1] for each in results]) / 2, x.grad) < 3e-3


def overflowing_step() -> tuple[Tensor, Tensor, float]:
    head = ak.ShardedAMSoftmaxLoss(D, C, seed=5, device=device())
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device().type, init_scale=1024.0)
    before = whole(head.weight).detach().clone()
    x = torch.ones(2, D, device=device(), requires_grad=True)
    scaler.scale(head(x, torch.tensor([0, 1], device=device()))).backward()
    if dist.get_rank() == 1:
        local_part(head.weight.grad)[0] = torch.inf  # on one rank alone
    scaler.step(optimizer)
    scaler.update()
    return before, whole(head.weight).detach(), scaler.get_scale()


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: Ranks) -> None:
    for before, after, scale in ranks.run(3, overflowing_step):
        assert torch.equal(before, after) and scale < 1024


class Collectives(TorchDispatchMode):
    """The collective operations that run under it, with the bytes that each rank gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            given = args[1] if "allgather" in name or "reduce_scatter" in name else args[0][0]
            self.seen.append((name.split(".")[1], given.numel() * given.element_size()))
        return function(*args, **(kwargs or {}))


def counted(dtype: torch.dtype, options: dict[str, Any]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    head = ak.ShardedAMSoftmaxLoss(D, C, seed=5, device=device(), **options)
    labels = torch.randint(C, (6,), device=device())
    x = torch.randn(6, D, device=device(), requires_grad=True)
    with torch.autocast(device().type, dtype, enabled=dtype != torch.float32):
        head(x, labels)  # in the first call, sizes and options are exchanged in any case
        with Collectives() as forward:
            loss = head(x, labels)
        with Collectives() as backward:
            loss.backward()
    return forward.seen, backward.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("equal_batches", [True, False])
def test_what_travels(ranks: Ranks, dtype: torch.dtype, equal_batches: bool) -> None:
    b, world = 6, 3
    sizes = [] if equal_batches else [("_allgather_base_", 16)]
    gathered = [("_allgather_base_", b * (D * dtype.itemsize + 8))]
    for forward, backward in ranks.run(world, counted, dtype, {"equal_batches": equal_batches}):
        assert forward == [*sizes, *gathered, ("allreduce_", 2 * b * world * 4)]
        assert backward == [("_reduce_scatter_base_", b * world * D * 4)]


@contextmanager
def recorded_work(monkey: list[str]) -> Iterator[None]:
    """When the reduce-scatter is started and waited for, and when the backend makes which gradient."""
    from amsoftmax_kernels import backends
    from amsoftmax_kernels.sharded import shards as sharding

    chunked = backends.load("chunked")
    backward, scatter, wait = chunked.backward, sharding.ClassShards.scatter_rows, sharding.Scattered.wait
    chunked.backward = lambda *a: (monkey.append(f"backend {tuple(a[3])}"), backward(*a))[1]
    sharding.ClassShards.scatter_rows = lambda *a: (monkey.append("start"), scatter(*a))[1]
    sharding.Scattered.wait = lambda *a: (monkey.append("wait"), wait(*a))[1]
    try:
        yield
    finally:
        chunked.backward, sharding.ClassShards.scatter_rows, sharding.Scattered.wait = backward, scatter, wait


def order_of_work() -> list[str]:
    order: list[str] = []
    with recorded_work(order):
        counted(torch.float32, {"backend": "chunked"})
    return order


def test_the_features_gradient_travels_while_the_centres_is_made(ranks: Ranks) -> None:
    for order in ranks.run(2, order_of_work):
        assert order == ["backend (True, False, False)", "start", "backend (False, True, False)", "wait"]
