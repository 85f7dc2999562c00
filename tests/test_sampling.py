"""Sampled negatives: which classes are drawn, what becomes of those that are not, and how good the gradient is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD
from amsoftmax_kernels.sharded.sampling import draw_classes, draw_size
from amsoftmax_kernels.sharded.shards import local_part, whole

from .cases import relative
from .ranks import Ranks, device

SEED = torch.tensor(7)


def draws(labels: Tensor, num_classes: int, size: int, count: int) -> Tensor:
    """The classes of ``count`` steps, ``[count, size]``."""
    return torch.stack([draw_classes(labels, num_classes, size, SEED, torch.tensor(step)).classes for step in range(count)])


CASES = [(50, 8, 0.3), (7, 5, 0.1), (300, 16, 0.2), (12, 1, 0.5), (9, 0, 0.4), (2, 1, 0.1)]


@pytest.mark.parametrize("C, B, rate", CASES)
def test_a_draw_holds_the_batch_and_others_once(C: int, B: int, rate: float) -> None:
    size = draw_size(rate, C, B)
    generator = torch.Generator().manual_seed(C)
    for step in range(50):
        labels = torch.randint(-1, C + 1, (B,), generator=generator)
        draw = draw_classes(labels, C, size, SEED, torch.tensor(step))
        if size == C:
            continue
        assert draw.classes.shape == (size,) and draw.classes.unique().numel() == size
        assert draw.classes.min() >= 0 and draw.classes.max() < C
        for label, slot in zip(labels.tolist(), draw.labels.tolist(), strict=True):
            assert slot == (-1 if label < 0 else size) if label in (-1, C) else draw.classes[slot] == label
            assert label in (-1, C) or slot < draw.certain


@pytest.mark.parametrize("C, B, rate", [(50, 8, 0.3), (7, 5, 0.1), (300, 16, 0.2), (12, 1, 0.5)])
def test_every_other_class_is_equally_likely(C: int, B: int, rate: float) -> None:
    size, count = draw_size(rate, C, B), 3000
    labels = torch.randint(C, (B,), generator=torch.Generator().manual_seed(C))
    present = labels.unique()
    others = torch.ones(C, dtype=torch.bool)
    others[present] = False
    times = draws(labels, C, size, count).flatten().bincount(minlength=C)
    assert (times[present] == count).all()
    p = (size - len(present)) / (C - len(present))
    deviations = (times[others] - count * p) / math.sqrt(count * p * (1 - p))
    # 5 standard deviations for the worst class; and the mean square of many, 1 at most (strata make it less).
    assert deviations.abs().max() < 5 and deviations.square().mean() < 1.5


def test_the_weighted_sum_is_unbiased() -> None:
    C, B = 60, 9
    size = draw_size(0.3, C, B)
    labels = torch.randint(C, (B,), generator=torch.Generator().manual_seed(1))
    values = torch.rand(C, dtype=torch.float64).exp()
    sums = []
    for step in range(4000):
        draw = draw_classes(labels, C, size, SEED, torch.tensor(step))
        weights = torch.ones(size, dtype=torch.float64)
        weights[draw.certain :] = draw.weight
        sums.append((values[draw.classes] * weights).sum())
    spread = torch.stack(sums)
    assert abs(spread.mean() - values.sum()) < 5 * spread.std() / math.sqrt(len(sums))
    assert spread.std() > 0


def test_draws_repeat_by_seed_and_step_and_differ_otherwise() -> None:
    labels = torch.tensor([3, 5])
    one = draw_classes(labels, 1000, 100, SEED, torch.tensor(4)).classes
    assert torch.equal(one, draw_classes(labels, 1000, 100, SEED, torch.tensor(4)).classes)
    for seed, step in ((8, 4), (7, 5)):
        other = draw_classes(labels, 1000, 100, torch.tensor(seed), torch.tensor(step)).classes
        shared = len(set(one.tolist()) & set(other.tolist()))
        assert shared < 30  # about 10 by chance, and the batch's 2


def test_large_numbers_do_not_overflow() -> None:
    C, labels = 1 << 40, torch.tensor([0, (1 << 40) - 1, 5])
    draw = draw_classes(labels, C, 1 << 16, SEED, torch.tensor(0))
    assert draw.classes.unique().numel() == 1 << 16 and draw.classes.min() >= 0 and draw.classes.max() < C
    assert abs(draw.classes.double().mean() / C - 0.5) < 0.01


D = 8


def make_head(C: int = 200, rate: float = 0.2, **options: Any) -> ak.ShardedAMSoftmaxLoss:
    return ak.ShardedAMSoftmaxLoss(
        D, C, sample_rate=rate, seed=5, dtype=torch.float64, device=device(), **{"scale": 8.0, **options}
    )


def problem(C: int = 200, B: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64).to(device())
    return x, torch.randint(C, (B,), generator=generator).to(device())


def drawn_rows(head: ak.ShardedAMSoftmaxLoss) -> Tensor:
    grad = local_part(head.weight.grad)
    return (grad != 0).any(1).nonzero()[:, 0]


@pytest.mark.parametrize("corrected", [False, True])
def test_only_drawn_rows_are_read_and_only_they_have_a_gradient(corrected: bool) -> None:
    head = make_head(sampling_correction=corrected)
    x, labels = problem()
    loss = head(x, labels)
    loss.backward()
    rows = drawn_rows(head)
    assert len(rows) == (50 if corrected else 40) and set(labels.tolist()) <= set(rows.tolist())
    # The same draw again (a step is counted when it is differentiated), with NaN in every other row.
    other = make_head(sampling_correction=corrected)
    with torch.no_grad():
        spoilt = torch.full_like(other.weight, torch.nan)
        spoilt[rows] = other.weight[rows]
        other.weight.copy_(spoilt)
    again = other(x, labels)
    assert torch.equal(again, loss)
    # And it is the loss over those classes alone.
    if not corrected:
        position = torch.full((200,), -1).scatter_(0, rows.cpu(), torch.arange(len(rows))).to(x.device)
        expected = ak.reference.am_softmax_loss(x, head.weight[rows], position[labels], scale=8.0)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_evaluation_takes_all_classes() -> None:
    head = make_head().eval()
    x, labels = problem()
    expected = ak.reference.am_softmax_loss(x, head.weight, labels, scale=8.0)
    torch.testing.assert_close(head(x, labels), expected, rtol=1e-12, atol=0)


def test_a_forward_pass_run_again_draws_the_same_and_the_next_step_does_not() -> None:
    head = make_head()
    x, labels = problem()
    first = head(x, labels)
    assert torch.equal(head(x, labels), first)
    first.backward()
    assert not torch.equal(head(x, labels), first)
    recomputed = torch.utils.checkpoint.checkpoint(head, x.requires_grad_(), labels, use_reentrant=False)
    recomputed.backward()  # raises if the recomputed tensors are not like the first


def gradients(head: ak.ShardedAMSoftmaxLoss, x: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of ``count`` draws: features' and centres' gradients."""
    of_x, of_w = [], []
    for _ in range(count):
        leaf = x.clone().requires_grad_()
        head.weight.grad = None
        head(leaf, labels).backward()
        of_x.append(leaf.grad)
        of_w.append(head.weight.grad.clone())
    return torch.stack(of_x), torch.stack(of_w)


def test_bias_and_variance_of_the_sampled_gradient(record_property: Any) -> None:
    """Of the full gradient, at 20% of the classes: the corrected one's bias is an order below its spread; plain PartialFC's
    denominator has but the drawn classes, so that its gradient lacks a part however many draws are averaged."""
    C, count = 200, 600
    x, labels = problem(C)
    full = make_head(C, rate=1.0)
    leaf = x.clone().requires_grad_()
    full(leaf, labels).backward()
    measured = {}
    for corrected in (True, False):
        of_x, of_w = gradients(make_head(C, sampling_correction=corrected), x, labels, count)
        bias = relative(of_x.mean(0), leaf.grad), relative(of_w.mean(0), full.weight.grad)
        spread = [
            ((each - each.mean(0)).square().flatten(1).sum(1).mean().sqrt() / exact.norm()).item()
            for each, exact in ((of_x, leaf.grad), (of_w, full.weight.grad))
        ]
        measured[corrected] = bias, spread
    for corrected, (bias, spread) in measured.items():
        record_property(f"corrected={corrected}", f"bias {bias}, spread {spread}")
        print(f"corrected={corrected}: bias of dx, dw {bias}, spread {spread}")
    (bias, spread), (plain_bias, _) = measured[True], measured[False]
    # What is left of the spread in the mean of 600 is 1/24 of it; the softmax is not linear in its denominator.
    assert bias[0] < spread[0] / 5 and bias[1] < spread[1] / 5
    assert plain_bias[0] > 2 * bias[0]
    assert 0.01 < spread[0] < 1


@pytest.mark.parametrize("make", [FusedSGD, FusedAdamW])
def test_rows_not_drawn_do_not_move(make: Any) -> None:
    head, twin = make_head(), make_head()  # which draws the same
    optimizer = make(head, lr=0.1, weight_decay=1e-2, **({"momentum": 0.9} if make is FusedSGD else {}))
    x, labels = problem()
    for step in range(4):
        before = head.weight.detach().clone()
        states = [each.clone() for each in optimizer.state[head.weight].values() if each.dim()]
        twin.zero_grad()
        twin(x, labels).backward()
        rows = drawn_rows(twin)
        head(x, labels).backward()
        optimizer.step()
        moved = (head.weight.detach() != before).any(1).nonzero()[:, 0]
        assert len(rows) == 40 and torch.equal(moved, rows), step
        others = torch.ones(200, dtype=torch.bool).index_fill_(0, rows, False)
        after = [each for each in optimizer.state[head.weight].values() if each.dim()]
        assert not step or all(torch.equal(a[others], b[others]) for a, b in zip(states, after, strict=True))
        assert head.weight.grad is None
    # PyTorch's own, with momentum and weight decay, moves all.
    dense = make_head()
    theirs = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    before = dense.weight.detach().clone()
    dense(x, labels).backward()
    theirs.step()
    assert (dense.weight.detach() != before).any(1).all()


def test_a_drawn_row_takes_the_step_of_its_gradient() -> None:
    """That of ``torch.optim.SGD`` on the drawn rows alone, and a row of a loss that takes all classes like any other."""
    x, labels = problem()
    head, dense = make_head(), make_head()
    optimizer = FusedSGD(head, lr=0.1, momentum=0.9, weight_decay=1e-2)
    velocity = torch.zeros_like(dense.weight)
    for step in range(5):
        head.train(step != 2)
        dense.train(step != 2)
        dense.zero_grad()
        dense(x, labels).backward()
        rows = drawn_rows(dense) if step != 2 else torch.arange(200)
        head(x, labels).backward()
        optimizer.step()
        with torch.no_grad():
            velocity[rows] = 0.9 * velocity[rows] + dense.weight.grad[rows] + 1e-2 * dense.weight[rows]
            dense.weight[rows] -= 0.1 * velocity[rows]
        torch.testing.assert_close(head.weight, dense.weight, rtol=1e-12, atol=1e-15)


def test_two_checkpointed_calls_in_one_backward_pass_are_an_error() -> None:
    head = make_head()
    x, labels = problem()
    run = torch.utils.checkpoint.checkpoint
    both = run(head, x.clone().requires_grad_(), labels, use_reentrant=False)
    both = both + run(head, x.clone().requires_grad_(), labels, use_reentrant=False)
    with pytest.raises(RuntimeError, match="once a backward pass"):
        both.backward()


def test_made_on_meta_it_still_has_its_seed() -> None:
    head = ak.ShardedAMSoftmaxLoss(D, 50, sample_rate=0.2, seed=9, device="meta")
    head.to_empty(device="cpu")
    head.sampling_state.fill_(-7)
    head.reset_parameters()
    assert head.sampling_state.tolist() == [9, 0]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_nothing_is_read_back(monkeypatch: pytest.MonkeyPatch, corrected: bool, fused: bool) -> None:
    """On "meta" tensors, which have no values: reading one, as would make the host wait for a GPU, raises."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # it does not know the device
    head = ak.ShardedAMSoftmaxLoss(D, 5000, sample_rate=0.1, sampling_correction=corrected, backend="chunked", device="meta")
    make = FusedSGD if fused else lambda head, **options: torch.optim.SGD(head.parameters(), **options)
    optimizer = make(head, lr=0.1, momentum=0.9)
    for _ in range(2):
        x, labels = torch.empty(12, D, device="meta", requires_grad=True), torch.empty(12, device="meta", dtype=torch.int64)
        loss, predictions = head(x, labels, return_predictions=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert x.grad is not None and predictions.shape == (12,)
        assert (head.weight.grad is None) == fused


def test_a_correction_weighs_no_class_beyond_the_rate() -> None:
    """Also where the batch has as many rows as the rate has classes."""
    for C, B, rate in ((11_677, 1024, 0.1), (20_000, 1990, 0.1), (20_000, 2048, 0.1), (125_000, 1024, 0.1)):
        draw = draw_classes(torch.full((B,), C), C, draw_size(rate, C, B, corrected=True), SEED, torch.tensor(0))
        assert 1 < draw.weight <= 1 / rate


@pytest.mark.gpu
@pytest.mark.parametrize("corrected", [False, True])
def test_a_gpu_draws_and_learns_the_same(corrected: bool) -> None:
    results = []
    for where in ("cpu", "cuda"):
        head = ak.ShardedAMSoftmaxLoss(
            D, 200, 8.0, sample_rate=0.2, seed=5, sampling_correction=corrected, backend="chunked"
        ).to(where)
        with torch.no_grad():
            head.weight.copy_(torch.randn(200, D, generator=torch.Generator().manual_seed(3)))
        x, labels = (each.to(where) for each in problem())
        optimizer = FusedSGD(head, lr=0.1, momentum=0.9)
        for _ in range(3):
            before = head.weight.detach().clone()
            loss = head(x.float(), labels)
            loss.backward()
            optimizer.step()
        rows = (head.weight.detach() != before).any(1)
        results.append((rows.cpu(), loss.detach().cpu(), head.weight.detach().cpu()))
    (rows, loss, weight), (gpu_rows, gpu_loss, gpu_weight) = results
    assert torch.equal(rows, gpu_rows)
    torch.testing.assert_close(gpu_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gpu_weight, weight, rtol=1e-4, atol=1e-6)


def sampled_step(replicas: int, corrected: bool) -> tuple[Tensor, ...]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    mesh = None if replicas == 1 else init_device_mesh(device().type, (replicas, dist.get_world_size() // replicas))
    head, updated = (make_head(mesh=mesh, sampling_correction=corrected) for _ in range(2))
    x, labels = problem(B=4 * dist.get_world_size())
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    leaf = x[mine].clone().requires_grad_()
    loss = head(leaf, labels[mine])
    loss.backward()
    optimizer = FusedSGD(updated, lr=1.0, momentum=0.9, weight_decay=0.01)
    updated(x[mine].clone().requires_grad_(), labels[mine]).backward()
    optimizer.step()
    grad = whole(head.weight.grad)
    expected = whole(head.weight).detach() * 0.99 - grad  # of the rows that were drawn
    weight = whole(updated.weight).detach()
    drawn = (grad != 0).any(1)
    torch.testing.assert_close(weight[drawn], expected[drawn], rtol=1e-12, atol=1e-14)
    return loss.detach(), leaf.grad, grad.clone(), weight, whole_weights(head, labels)


def whole_weights(head: ak.ShardedAMSoftmaxLoss, labels: Tensor) -> Tensor:
    """How many classes each stands for in the denominator, 0 if it was not drawn, of all shards."""
    import torch.distributed as dist

    shards, weights = head.shards, torch.zeros(head.num_classes, dtype=torch.float64)
    size = draw_size(head.sample_rate, shards.classes, len(labels), head.sampling_correction)
    local = weights[shards.start : shards.stop]
    draw = draw_classes(
        shards.local_labels(labels).cpu(), shards.classes, size, torch.tensor(5 + shards.start), torch.tensor(0)
    )
    local[draw.classes] = draw.weight if head.sampling_correction else 1.0
    local[draw.classes[: draw.certain]] = 1.0
    weights = weights.to(device())
    dist.all_reduce(weights)
    return weights / shards.replicas


def drawn_without_targets() -> Tensor:
    head = make_head()
    optimizer, before = FusedSGD(head, lr=0.1, weight_decay=1.0), local_part(head.weight).detach().clone()
    x, labels = problem(B=1)
    head(x.requires_grad_(), torch.full_like(labels, -100)).backward()  # whose gradient is zero: decay moves the rows
    optimizer.step()
    return (local_part(head.weight).detach() != before).any(1).nonzero()[:, 0]


def test_shards_draw_apart(ranks: Ranks) -> None:
    """Each its own part of its classes: not the same everywhere, which would leave out the same share of each shard."""
    first, second = (set(each.tolist()) for each in ranks.run(2, drawn_without_targets))
    assert len(first) == len(second) == 20 and len(first & second) < 12  # of 100: 4 by chance


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("world, replicas", [(2, 1), (3, 1), (4, 2)])
def test_sharded_draws_are_consistent(ranks: Ranks, world: int, replicas: int, corrected: bool) -> None:
    """The gradients are those of the loss over the drawn classes, whichever rank drew them, in one process."""
    results = ranks.run(world, sampled_step, replicas, corrected)
    loss, _, grad, weight, weights = results[0]
    assert all(torch.equal(each[0], loss) and torch.equal(each[2], grad) for each in results)
    x, labels = problem(B=4 * world)
    start = ak.ShardedAMSoftmaxLoss(D, 200, seed=5, dtype=torch.float64).weight.detach()
    rows = (grad != 0).any(1).nonzero()[:, 0]
    assert set(labels.tolist()) <= set(rows.tolist()) and len(rows) < 200
    assert torch.equal((weight != start).any(1), (grad != 0).any(1))
    assert torch.equal((weights > 0).nonzero()[:, 0], rows) and (weights.max() > 2) == corrected
    position = torch.full((200,), -1).scatter_(0, rows, torch.arange(len(rows)))
    leaf, centres = x.clone().requires_grad_(), start[rows].requires_grad_()
    logits = 8.0 * torch.nn.functional.normalize(leaf) @ torch.nn.functional.normalize(centres).T
    logits = logits - 8.0 * 0.35 * torch.nn.functional.one_hot(position[labels], len(rows)).double()
    expected = torch.nn.functional.cross_entropy(logits + weights[rows].log(), position[labels])
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert relative(grad[rows], centres.grad) < 1e-10
    assert relative(torch.cat([each[1] for each in results]) / world, leaf.grad) < 1e-10
