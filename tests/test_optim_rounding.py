"""Centres and state in bfloat16, updated in the backward pass: stochastic rounding, and what resumes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import rounding
from amsoftmax_kernels.backends.update import SGD, AdamW, Update
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD

from .updated import C, D, batch, take_step


def test_rounding_is_to_a_neighbour_and_unbiased() -> None:
    torch.manual_seed(0)
    value, classes, draws = torch.randn(40, 50), torch.arange(40), 4000
    low = (value.view(torch.int32) & ~0xFFFF).view(torch.float32).double()
    high = ((value.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32).double()
    total, target = torch.zeros(40, 50, dtype=torch.float64), torch.empty(40, 50, dtype=torch.bfloat16)
    for step in range(draws):
        rounding.round_(target, value.clone(), classes, rounding.key(1, step, 0))
        rounded = target.double()
        assert ((rounded == low) | (rounded == high)).all()
        total += rounded
    # A coin's spread is half a unit at most: of 2,000 means the farthest is some 3.5 times that over the root of the draws.
    error = (total / draws - value.double()) / (high - low).abs()
    assert error.abs().max() < 5 * 0.5 / draws**0.5 and error.mean().abs() < 5 * 0.41 / (draws * value.numel()) ** 0.5
    # What bfloat16 holds stays as it is, and no two of steps, tensors, classes and columns share their bits.
    rounding.round_(target, low.float(), classes, rounding.key(1, 0, 0))
    assert torch.equal(target.double(), low)
    half = torch.full((40, 50), 1 + 2.0**-8)
    patterns = []
    for key in (rounding.key(1, 0, 0), rounding.key(1, 0, 1), rounding.key(1, 1, 0), rounding.key(2, 0, 0)):
        rounding.round_(target, half.clone(), classes, key)
        patterns += [target > 1, *(target > 1).T[:3], *(target > 1)[:3]]
    same = [a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(patterns) for b in patterns[:i]]
    assert not any(same)


def test_infinities_stay() -> None:
    target = torch.empty(1, 2, dtype=torch.bfloat16)
    rounding.round_(target, torch.tensor([[torch.inf, -torch.inf]]), torch.tensor([0]), 5)
    assert target.tolist() == [[torch.inf, -torch.inf]]


@pytest.mark.parametrize("rule", [SGD(0.1, 0.9, 0.0, 0.01, False, False), AdamW(0.1, 0.9, 0.99, 1e-8, 0.01, 3)])
def test_the_bits_do_not_depend_on_chunks_shards_or_draws(rule: Any) -> None:
    torch.manual_seed(0)
    states = 2 if isinstance(rule, AdamW) else 1
    start = [torch.rand(C, D).to(torch.bfloat16) for _ in range(1 + states)]
    grad = torch.randn(C, D)

    def run(pieces: list[tuple[int, int]], shards: int, drawn: bool) -> list[Tensor]:
        tensors = [each.clone() for each in start]
        size = -(-C // shards)
        for first in range(0, C, size):
            mine = [each[first : first + size] for each in tensors]
            rows = torch.arange(len(mine[0])).flip(0) if drawn else None
            update = Update(rule, mine[0], tuple(mine[1:]), class_start=first, rows=rows, seed=7, step=2)
            own = grad[first : first + size]
            for begin, end in pieces:
                part = own.flip(0)[begin:end] if drawn else own[begin:end]
                if len(part):
                    update.apply_(begin, part.clone())
        return tensors

    whole = run([(0, C)], 1, False)
    for pieces, shards, drawn in (
        ([(0, 37), (37, 80), (80, C)], 1, False),
        ([(0, 20), (20, C)], 3, False),
        ([(0, C)], 2, True),
    ):
        assert all(torch.equal(a, b) for a, b in zip(whole, run(pieces, shards, drawn), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole, start, strict=True))


def test_bfloat16_learns_what_rounding_to_nearest_loses(small_chunks: None) -> None:
    """Steps of less than half a bit: without random bits no centre moves."""
    moved = {}
    for stochastic in (True, False):
        torch.manual_seed(0)
        head = ak.AMSoftmaxLoss(D, C, scale=8.0, dtype=torch.bfloat16, save_bytes=0)
        start = head.weight.detach().clone()
        optimizer = FusedSGD(head, lr=4e-4, stochastic_rounding=stochastic)
        x, labels = batch(0, torch.bfloat16)
        first = head(x, labels).item()
        for _ in range(500):
            take_step(head, optimizer, x, labels)
        moved[stochastic] = first - head(x, labels).item(), (head.weight != start).float().mean().item()
    torch.manual_seed(0)
    head = ak.AMSoftmaxLoss(D, C, scale=8.0, dtype=torch.float32, save_bytes=0)
    head.weight.data.copy_(start)
    optimizer, x = FusedSGD(head, lr=4e-4), x.float()
    first = head(x, labels).item()
    for _ in range(500):
        take_step(head, optimizer, x, labels)
    full = first - head(x, labels).item()
    assert full > 0.3 and abs(moved[True][0] - full) < 0.2 * full
    assert moved[False][0] < 0.3 * full and moved[False][1] < 0.3 * moved[True][1]


@pytest.mark.parametrize("make", [FusedSGD, FusedAdamW])
def test_bfloat16_is_the_same_for_any_number_of_threads_and_resumed(make: Any, small_chunks: None) -> None:
    options = {"lr": 0.01, "seed": 5, **({"momentum": 0.9} if make is FusedSGD else {})}
    ends, threads = [], torch.get_num_threads()
    for count, resumed in ((1, False), (3, False), (2, True)):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        head = ak.AMSoftmaxLoss(D, C, dtype=torch.bfloat16, save_bytes=0)
        optimizer = make(head, **options)
        for step in range(4):
            if resumed and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make(head, **options)
                optimizer.load_state_dict(state)
            take_step(head, optimizer, *batch(step, torch.bfloat16))
        ends.append([head.weight.detach().clone(), *(each for each in optimizer.state[head.weight].values() if each.dim())])
    torch.set_num_threads(threads)
    assert all(each.dtype == torch.bfloat16 for each in ends[0])
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_the_states_dtype() -> None:
    head = ak.AMSoftmaxLoss(D, C, dtype=torch.bfloat16)
    optimizer = FusedSGD(head, lr=0.1, momentum=0.9, state_dtype=torch.float32)
    x, labels = batch(0, torch.bfloat16)
    head(x, labels).backward()
    optimizer.step()
    momentum = optimizer.state[head.weight]["momentum_buffer"].clone()
    assert momentum.dtype == torch.float32
    again = FusedSGD(head, lr=0.1, momentum=0.9, state_dtype=torch.float32)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[head.weight]["momentum_buffer"], momentum)  # not by way of the centres' dtype


def test_float64_features_with_bfloat16_centres() -> None:
    for make in (FusedSGD, FusedAdamW):
        head = ak.AMSoftmaxLoss(D, C, dtype=torch.bfloat16)
        optimizer, before = make(head, lr=0.1), head.weight.detach().clone()
        head(*batch(0, torch.float64)).backward()
        optimizer.step()
        assert not torch.equal(head.weight, before) and head.weight.isfinite().all()
    half = ak.AMSoftmaxLoss(D, C, dtype=torch.float16)
    optimizer = FusedAdamW(half)
    half(*batch(0, torch.float32)).backward()
    assert optimizer.state[half.weight]["exp_avg_sq"].dtype == torch.float32


def test_checkpoints_of_bfloat16_through_dcp(tmp_path: Any) -> None:
    """With the number of the step, on which the random bits depend."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def fresh() -> tuple[ak.AMSoftmaxLoss, FusedSGD]:
        torch.manual_seed(0)
        head = ak.AMSoftmaxLoss(D, C, dtype=torch.bfloat16)
        return head, FusedSGD(head, lr=0.1, momentum=0.9)

    def train_on(head: ak.AMSoftmaxLoss, optimizer: FusedSGD, first: int, last: int) -> None:
        for step in range(first, last):
            take_step(head, optimizer, *batch(step, torch.float32))

    head, optimizer = fresh()
    train_on(head, optimizer, 0, 3)
    model, state = get_state_dict(head, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    again, resumed = fresh()
    model, state = get_state_dict(again, resumed)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(again, resumed, model_state_dict=model, optim_state_dict=state)
    assert resumed.state[again.weight]["step"].item() == 3
    for pair_ in ((head, optimizer), (again, resumed)):
        train_on(*pair_, 3, 5)
    assert torch.equal(head.weight, again.weight)
