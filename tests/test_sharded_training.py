"""The sharded head inside a training loop: DistributedDataParallel, FSDP, autocast, clipping, compile; and its errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import amsoftmax_kernels as ak
from amsoftmax_kernels.sharded.shards import local_part, whole

from .cases import relative
from .ranks import Ranks, device

C, D, INPUTS, STEPS = 37, 8, 6, 20


def backbone(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, D)).to(device(), dtype)


def batch(step: int, sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and labels of all ranks' rows."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(sum(sizes), INPUTS, generator=generator, dtype=torch.float64)
    return inputs.to(device(), dtype), torch.randint(C, (sum(sizes),), generator=generator).to(device())


def mine(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return tensor.split(sizes)[dist.get_rank()]


def step_sizes(step: int, world_size: int) -> tuple[int, ...]:
    """Batches that differ between ranks, and change."""
    return tuple(2 + (step + 3 * rank) % 5 for rank in range(world_size))


def make_head(mesh: Any = None, **options: Any) -> ak.ShardedAMSoftmaxLoss:
    return ak.ShardedAMSoftmaxLoss(
        D, C, nn.Parameter(torch.tensor(16.0, dtype=torch.float64, device=device())), mesh=mesh, seed=5,
        dtype=torch.float64, device=device(), **options,
    )  # fmt: skip


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


def wrong_on_one_rank(what: str) -> tuple[str, str]:
    reduction = "sum" if what == "options" and dist.get_rank() == 1 else "mean"
    odd = what if dist.get_rank() == 1 else None
    head = ak.ShardedAMSoftmaxLoss(
        D, C + (odd == "classes"), seed=5 + (odd == "seed"), device=device(), reduction=reduction,
        interclass_filter=0.5 if odd == "filter" else None, equal_batches=what == "filter",
        sample_rate=0.5 if odd == "sampling" else 1.0,
    )  # fmt: skip
    if what == "sizes":
        head.equal_batches = True
    if odd == "frozen":
        head.requires_grad_(False)
    if odd == "failure":
        head._checked = failing  # type: ignore[method-assign]
    x, labels = torch.randn(3, D, device=device()), torch.tensor([0, 1, 2], device=device())
    if dist.get_rank() == 1:
        x, labels = (x[1:], labels[1:]) if what == "sizes" else (x, labels)
        x = {"shape": x[:, 1:], "dtype": x.int(), "other dtype": x.double()}.get(what, x)
        labels = labels + C if what == "label" else labels
    try:
        head(x, labels)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def failing(*arguments: Any) -> Any:
    raise MemoryError("out of memory, say")


@pytest.mark.parametrize(
    "what, kind, own, other",
    [
        ("shape", "ValueError", "share D", "rank 1 of the mesh"),
        ("dtype", "TypeError", "features must be one of", "rank 1 of the mesh"),
        ("label", "ValueError", "labels must lie in", "rank 1 of the mesh"),
        (
            "other dtype",
            "ValueError",
            "rank 0 differs from this one's features.dtype=torch.float64, compute_dtype",
            "rank 1 differs from this one's features.dtype=torch.float32",
        ),
        (
            "options",
            "ValueError",
            "rank 0 differs from this one's reduction='sum'",
            "1 differs from this one's reduction='mean'",
        ),
        ("classes", "ValueError", f"this one's num_classes={C + 1}", f"rank 1 differs from this one's num_classes={C}"),
        ("seed", "ValueError", "this one's seed=6", "rank 1 differs from this one's seed=5"),
        (
            "filter",
            "ValueError",
            "this one's interclass_filter=0.5",
            "rank 1 differs from this one's interclass_filter=None",
        ),
        ("frozen", "ValueError", "this one's weight.requires_grad=False", "this one's weight.requires_grad=True"),
        (
            "sampling",
            "ValueError",
            "this one's sample_rate=0.5, sampling_correction=False, training=True",
            "this one's sample_rate=1.0, sampling_correction=None, training=None",
        ),
        ("sizes", "ValueError", "equal_batches promises", "((3, 2, 3),)"),
        ("failure", "MemoryError", "out of memory", "rank 1 of the mesh"),
    ],
)
def test_a_wrong_argument_on_one_rank_raises_on_all(ranks: Ranks, what: str, kind: str, own: str, other: str) -> None:
    results = ranks.run(3, wrong_on_one_rank, what)
    assert results[1][0] == kind and own in results[1][1]
    for name, message in (results[0], results[2]):
        assert name == "ValueError" and other in message


def first_values() -> Tensor:
    head = ak.ShardedAMSoftmaxLoss(D, 5000, seed=11, device=device())
    assert isinstance(head.weight, DTensor)
    return whole(head.weight).detach().cpu()


def test_centres_are_drawn_alike_on_any_number_of_ranks(ranks: Ranks) -> None:
    alone = ak.ShardedAMSoftmaxLoss(D, 5000, seed=11, device=device()).weight.detach().cpu()
    assert abs(alone.norm(dim=1).mean().item() - 1) < 0.05
    assert (alone[:4096].mean(0).abs() < 0.05).all() and not torch.equal(alone[:904], alone[4096:])
    for world in (2, 3):
        for result in ranks.run(world, first_values):
            assert torch.equal(result, alone)


def unseeded() -> Tensor:
    torch.manual_seed(dist.get_rank())
    return whole(ak.ShardedAMSoftmaxLoss(D, C, device=device()).weight).detach().cpu()


def test_without_a_seed_ranks_still_draw_one_head(ranks: Ranks) -> None:
    first, second = ranks.run(2, unseeded)
    assert torch.equal(first, second)
    assert first.unique(dim=0).shape[0] == C  # no shard is another's copy


def odd_calls() -> None:
    sizes = (5, 3)
    inputs, labels = batch(0, sizes)
    x, y = inputs[:, :1].expand(-1, D).contiguous(), labels
    x, y = mine(x, sizes), mine(y, sizes)
    head = make_head()
    with torch.no_grad():
        without = head(x, y)
    assert not without.requires_grad
    leaf = x.clone().requires_grad_()
    loss = head(leaf, y)
    assert torch.equal(loss.detach(), without)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone(), whole(head.weight.grad).clone()
    leaf.grad, head.weight.grad = None, None
    loss.backward()
    assert torch.equal(leaf.grad, once[0]) and torch.equal(whole(head.weight.grad), once[1])
    # Frozen centres, frozen features.
    head.requires_grad_(False)
    leaf.grad, head.weight.grad = None, None
    head(leaf, y).backward()
    assert torch.equal(leaf.grad, once[0]) and head.weight.grad is None
    head.requires_grad_(True)
    head(x, y).backward()
    assert torch.equal(whole(head.weight.grad), once[1])
    # int32 labels, strided features.
    strided = torch.stack([x, x], 2)[:, :, 0]
    assert torch.equal(head(strided, y.int()).detach(), without)
    # A NaN row makes the mean NaN on every rank, and only its own loss of the rows.
    head.reduction = "none"
    spoilt = x.clone()
    if dist.get_rank() == 0:
        spoilt[1] = torch.nan
    rows = head(spoilt, y)
    assert rows.isnan().sum() == (dist.get_rank() == 0)
    # A second derivative is an error.
    head.reduction = "mean"
    (grad,) = torch.autograd.grad(head(leaf, y), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()
    # Cosines of few classes.
    expected = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(whole(head.weight)).T
    torch.testing.assert_close(head.cosine(x), expected)


def test_odd_calls(ranks: Ranks) -> None:
    ranks.run(2, odd_calls)


def test_without_a_process_group_it_is_the_plain_head() -> None:
    head = make_head()
    plain = ak.AMSoftmaxLoss(D, C, 16.0, dtype=torch.float64, device=device())
    assert not isinstance(head.weight, DTensor)
    with torch.no_grad():
        plain.weight.copy_(head.weight)
    inputs, labels = batch(0, (9,))
    x = inputs[:, :1].expand(-1, D)
    torch.testing.assert_close(head(x, labels), plain(x, labels), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"mesh": 3}, TypeError, "mesh must be"),
        ({"sample_rate": 0.0}, ValueError, "sample_rate must lie"),
        ({"sample_rate": "1"}, TypeError, "sample_rate must be"),
        ({"seed": -1}, ValueError, "seed must lie"),
        ({"seed": 1.0}, TypeError, "seed must be"),
        ({"equal_batches": 1}, TypeError, "equal_batches must be"),
        ({"margin": "m"}, TypeError, "margin must be"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ak.ShardedAMSoftmaxLoss(D, C, **options)


def made_on_meta() -> tuple[Tensor, Tensor, float]:
    later = ak.ShardedAMSoftmaxLoss(D, 5000, seed=11, device="meta")
    later.to_empty(device=device())
    later.reset_parameters()
    twin = copy.deepcopy(later)
    x, labels = torch.ones(2, D, device=device()), torch.tensor([0, 1], device=device())
    assert torch.equal(twin(x, labels), later(x, labels)) and "5000" in repr(twin)
    return whole(later.weight).detach(), whole(twin.weight).detach(), twin.weight.grad


def test_made_on_meta_and_copied(ranks: Ranks) -> None:
    alone = ak.ShardedAMSoftmaxLoss(D, 5000, seed=11).weight.detach()
    for later, twin, _ in ranks.run(2, made_on_meta):
        assert torch.equal(later, alone) and torch.equal(twin, alone)


def wrong_meshes() -> None:
    three = init_device_mesh(device().type, (1, 1, 2))
    with pytest.raises(ValueError, match="mesh must have one dimension"):
        ak.ShardedAMSoftmaxLoss(D, C, mesh=three)
    with pytest.raises(ValueError, match="device must be of the mesh"):
        ak.ShardedAMSoftmaxLoss(D, C, mesh=init_device_mesh(device().type, (2,)), device="xpu")
    with pytest.raises(ValueError, match="cannot be sharded"):
        ak.ShardedAMSoftmaxLoss(D, C, backend="reference")
    first = DeviceMesh(device().type, [0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="mesh must contain every rank"):
            ak.ShardedAMSoftmaxLoss(D, C, mesh=first)


def test_wrong_meshes(ranks: Ranks) -> None:
    ranks.run(2, wrong_meshes)


def repeated() -> bool:
    inputs, labels = batch(0, (8, 8), torch.float32)
    net, results = backbone(torch.float32), []
    for _ in range(3):
        head = ak.ShardedAMSoftmaxLoss(D, C, seed=5, device=device())
        x = mine(net(inputs), (8, 8)).detach().requires_grad_()
        head(x, mine(labels, (8, 8))).backward()
        results.append((x.grad, local_part(head.weight.grad)))
    return all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_same_bits_every_time(ranks: Ranks) -> None:
    assert all(ranks.run(2, repeated))
