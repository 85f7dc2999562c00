"""The sharded head by itself: its first centres, odd calls, and that an error on one rank is one on all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.sharded.shards import local_part, whole

from .ranks import Ranks, device
from .sharded_head import C, D, backbone, batch, make_head, mine


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
