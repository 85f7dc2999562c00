"""More or fewer classes in a run that goes on, in one process and sharded."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.margins import AdditiveMargin
from amsoftmax_kernels.sharded.shards import whole

from .ranks import Ranks, device

D, C = 5, 13
KEEPS: list[tuple[int, list[int] | None]] = [(17, None), (9, None), (13, [12, 0, 5]), (20, [3, 12, 1, 0]), (2, [])]


def made(sharded: bool) -> tuple[Any, torch.optim.Optimizer]:
    head: Any
    head = ak.ShardedAMSoftmaxLoss(D, C, seed=1, sample_rate=0.9, device=device()) if sharded else ak.AMSoftmaxLoss(D, C)
    head.set_centres(torch.arange(C * D, dtype=torch.float32).view(C, D) + 1)
    return head, torch.optim.AdamW(head.parameters(), lr=0.01)


def stepped(head: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x, labels = torch.randn(8, D, generator=generator), torch.randint(head.num_classes, (8,), generator=generator)
    head(x.to(device()), labels.to(device())).backward()
    optimizer.step()
    optimizer.zero_grad()


def snapshot(head: Any, optimizer: torch.optim.Optimizer, when: str) -> dict[str, Tensor]:
    tensors = {"weight": head.weight, **optimizer.state[head.weight]}
    return {f"{when} {key}": whole(value).detach().cpu().clone() for key, value in tensors.items()}


def resized(sharded: bool, num_classes: int, keep: list[int] | None) -> dict[str, Tensor]:
    """Centres and state before and after."""
    head, optimizer = made(sharded)
    stepped(head, optimizer, 0)
    before = snapshot(head, optimizer, "before")
    draws = head.sampling_state.clone() if sharded else torch.zeros(2)
    kept = None if keep is None else torch.tensor(keep, dtype=torch.int64)
    ak.resize_classes(head, num_classes, keep=kept, optimizer=optimizer)
    after = snapshot(head, optimizer, "after")
    assert head.num_classes == num_classes and len(optimizer.state) == 1
    assert optimizer.param_groups[0]["params"][0] is head.weight
    if sharded:
        assert torch.equal(draws, head.sampling_state)
        assert head.shards.num_classes == num_classes
    stepped(head, optimizer, 1)  # and it trains
    assert len(optimizer.state) == 1
    return before | after


def check(found: dict[str, Tensor], num_classes: int, keep: list[int] | None) -> None:
    kept = list(range(min(C, num_classes))) if keep is None else keep
    for key in ("weight", "exp_avg", "exp_avg_sq"):
        before, after = found[f"before {key}"], found[f"after {key}"]
        assert after.shape == (num_classes, D) and torch.equal(after[: len(kept)], before[kept])
        new = after[len(kept) :]
        assert new.ne(0).all() and new.abs().max() < 3 if key == "weight" and len(new) else new.eq(0).all()
    assert found["after step"] == found["before step"]


@pytest.mark.parametrize(("num_classes", "keep"), KEEPS)
def test_one_process(num_classes: int, keep: list[int] | None) -> None:
    for sharded in (False, True):
        check(resized(sharded, num_classes, keep), num_classes, keep)


@pytest.mark.parametrize(("num_classes", "keep"), KEEPS)
def test_sharded(ranks: Ranks, num_classes: int, keep: list[int] | None) -> None:
    """Over three ranks, of which one may have no class; new centres are those of any number of ranks."""
    alone = resized(True, num_classes, keep)
    for found in ranks.run(3, resized, True, num_classes, keep):
        check(found, num_classes, keep)
        kept = len(range(min(C, num_classes)) if keep is None else keep)
        assert torch.equal(found["after weight"][kept:], alone["after weight"][kept:])


def in_small_pieces() -> Tensor:
    from amsoftmax_kernels.sharded import shards

    head, _ = made(True)
    with mock.patch.object(shards, "_PIECE_ELEMENTS", 2 * D):  # these processes run other tests too
        ak.resize_classes(head, 11, keep=torch.tensor([10, 2, 7]))
    assert dist.get_world_size() == 2
    return whole(head.weight).detach()[:3].cpu()


def test_pieces(ranks: Ranks) -> None:
    centres = torch.arange(C * D, dtype=torch.float32).view(C, D) + 1
    assert all(torch.equal(found, centres[[10, 2, 7]]) for found in ranks.run(2, in_small_pieces))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes"),
        ({"num_classes": 20, "keep": torch.tensor([0.5])}, TypeError, "keep"),
        ({"num_classes": 20, "keep": torch.tensor([0, 0])}, ValueError, "distinct"),
        ({"num_classes": 20, "keep": torch.tensor([13])}, ValueError, r"\[0, 13\)"),
        ({"num_classes": 2, "keep": torch.tensor([1, 2, 3])}, ValueError, "at most"),
    ],
)
def test_errors_change_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    head, optimizer = made(False)
    weight = head.weight
    with pytest.raises(error, match=message):
        ak.resize_classes(head, optimizer=optimizer, **options)
    assert head.weight is weight and head.num_classes == C


class PerClass(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.margins = torch.nn.Parameter(torch.rand(C))

    def forward(self, cosine: Tensor, labels: Tensor, norm: Tensor) -> Tensor:
        return cosine - self.margins[labels]


@pytest.mark.parametrize(
    "margin", [torch.rand(C), AdditiveMargin(torch.rand(C)), PerClass()], ids=["tensor", "object", "module"]
)
def test_a_margin_for_each_class_is_refused(margin: Any) -> None:
    head = ak.AMSoftmaxLoss(D, C, margin=margin)
    with pytest.raises(ValueError, match="margin"):
        ak.resize_classes(head, 20)
    assert head.num_classes == C


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam])
def test_other_optimizers_go_on(make: Any) -> None:
    head, _ = made(False)
    optimizer = make(head.parameters(), lr=0.01)
    stepped(head, optimizer, 0)
    ak.resize_classes(head, 20, optimizer=optimizer)
    stepped(head, optimizer, 1)
    assert torch.isfinite(head.weight).all()


def test_another_head_or_optimizer() -> None:
    head, _ = made(False)
    with pytest.raises(ValueError, match=r"head\.weight"):
        ak.resize_classes(head, 20, optimizer=torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1))
    assert head.num_classes == C
    with pytest.raises(TypeError, match="head"):
        ak.resize_classes(torch.nn.Linear(2, 2), 20)  # type: ignore[arg-type]
