"""Centres updated in the backward pass: the trajectory of ``torch.optim``, and a training loop around it."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import shard, streams
from amsoftmax_kernels.backends.update import Blocks
from amsoftmax_kernels.margins import AnnealedAdditiveMargin
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD

from .cases import relative
from .updated import KINDS, C, D, batch, made, pair, take_step


def as_in_caffe(cosine: Tensor, labels: Tensor, norm: Tensor) -> Tensor:
    return cosine - 0.2 * cosine.square() - 0.1


HEADS: dict[str, dict[str, Any]] = {
    "kept": {},
    "recomputed": {"save_bytes": 0},
    "function": {"margin": as_in_caffe, "save_bytes": 0},
    "per class": {"margin": torch.linspace(0.1, 0.4, C)},
    "annealed": {"margin": AnnealedAdditiveMargin(0.0, 0.4, 0.01)},
    "unbounded": {"scale": 100.0},
    "norm": {"normalize_features": False, "scale": 1.0},
    "filter": {"interclass_filter": 0.3},
}


def train(kind: str, dtype: torch.dtype, steps: int, **head: Any) -> tuple[float, float]:
    """How far apart both are after some steps: centres and state, and the worst gradient of the features."""
    ours, fused, other, theirs = pair(kind, dtype, **head)
    worst = 0.0
    for step in range(steps):
        (x, labels), grads = batch(step, dtype), []
        for module, optimizer in ((ours, fused), (other, theirs)):
            leaf = x.clone().requires_grad_()
            module(leaf, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            grads.append(leaf.grad)
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
                if step == 5:
                    group["weight_decay"] = 0.01
        worst = max(worst, relative(*grads))
        assert ours.weight.grad is None
    apart = [relative(ours.weight, other.weight)]
    mine, his = fused.state[ours.weight], theirs.state[other.weight]
    assert set(mine) == set(his)
    apart += [relative(mine[name], value) for name, value in his.items() if value is not None]
    return max(apart), worst


@pytest.mark.parametrize("kind", list(KINDS))
def test_twenty_steps_are_those_of_torch_optim(kind: str, small_chunks: None) -> None:
    for how in ("kept", "recomputed"):
        assert max(train(kind, torch.float64, 20, **HEADS[how])) < 1e-12
    assert max(train(kind, torch.float32, 20, **HEADS["recomputed"])) < (1e-5 if kind != "adamw" else 1e-3)


@pytest.mark.parametrize("how", list(HEADS))
def test_every_kind_of_head(how: str, small_chunks: None) -> None:
    assert max(train("momentum", torch.float64, 6, **HEADS[how])) < 1e-12


def test_one_chunk() -> None:
    assert max(train("momentum", torch.float64, 6)) < 1e-12
    assert max(train("adamw", torch.float64, 6, save_bytes=0)) < 1e-12


def test_the_numbers_can_differ() -> None:
    """The comparison is no tautology: another learning rate is seen, and a target's part that is left out."""
    fused, theirs, options = KINDS["plain"]
    with mock.patch.dict(KINDS, plain=(fused, lambda parameters, **_: theirs(parameters, lr=0.4), options)):
        assert train("plain", torch.float64, 3)[0] > 1e-3
    ours, _fused, other, theirs = pair("plain", torch.float64, save_bytes=0)
    x, labels = batch(0, torch.float64)
    with mock.patch.object(shard.Targets, "add_", lambda *_: None), mock.patch.object(shard, "_chunk_size", lambda *_: 64):
        ours(x, labels).backward()
    other(x, labels).backward()
    theirs.step()
    assert relative(ours.weight, other.weight) > 1e-3


@pytest.mark.parametrize("labels", ["empty", "ignored"])
def test_a_batch_without_rows_still_decays(labels: str) -> None:
    ours, fused, other, theirs = pair("momentum", torch.float64)
    x, y = batch(0, torch.float64)
    for rows, values in ((x, y), (x[:0], y[:0]) if labels == "empty" else (x, torch.full_like(y, -100))):
        for module, optimizer in ((ours, fused), (other, theirs)):
            take_step(module, optimizer, rows.clone().requires_grad_(), values)
    assert relative(ours.weight, other.weight) < 1e-12


@pytest.mark.parametrize("kind", list(KINDS))
def test_checkpoints_go_both_ways(kind: str) -> None:
    ours, fused, other, theirs = pair(kind, torch.float64)
    fused_again, theirs_again = pair(kind, torch.float64)[:2], pair(kind, torch.float64)[2:]
    for step in range(3):
        x, labels = batch(step, torch.float64)
        for module, optimizer in ((ours, fused), (other, theirs)):
            take_step(module, optimizer, x, labels)
    for (module, optimizer), (source, state) in ((fused_again, (other, theirs)), (theirs_again, (ours, fused))):
        buffer = io.BytesIO()
        torch.save(state.state_dict(), buffer)
        buffer.seek(0)
        module.load_state_dict(source.state_dict())
        optimizer.load_state_dict(torch.load(buffer))
    x, labels = batch(7, torch.float64)
    for module, optimizer in ((ours, fused), (other, theirs), fused_again, theirs_again):
        take_step(module, optimizer, x, labels)
    for module in (other, fused_again[0], theirs_again[0]):
        assert relative(module.weight, ours.weight) < 1e-13


def test_momentum_switched_on_later_and_off() -> None:
    ours, fused, other, theirs = pair("plain", torch.float64)
    for step, momentum in enumerate((0, 0.9, 0.9, 0)):
        x, labels = batch(step, torch.float64)
        for module, optimizer in ((ours, fused), (other, theirs)):
            optimizer.param_groups[0]["momentum"] = momentum
            take_step(module, optimizer, x, labels)
    assert relative(ours.weight, other.weight) < 1e-13


def test_a_scheduler_drives_it() -> None:
    ours, fused, other, theirs = pair("momentum", torch.float64)
    schedules = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (fused, theirs)]
    for step in range(3):
        x, labels = batch(step, torch.float64)
        for module, optimizer, schedule in ((ours, fused, schedules[0]), (other, theirs, schedules[1])):
            take_step(module, optimizer, x, labels)
            schedule.step()
    assert fused.param_groups[0]["lr"] == 0.0625 and relative(ours.weight, other.weight) < 1e-13


def test_a_gradient_from_elsewhere_alone_is_applied() -> None:
    ours, fused, other, theirs = pair("momentum", torch.float64)
    for module, optimizer in ((ours, fused), (other, theirs)):
        module.weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relative(ours.weight, other.weight) < 1e-15


def test_a_gradient_that_is_not_asked_for_leaves_the_centres() -> None:
    head, optimizer, x, labels = made()
    before = head.weight.detach().clone()
    (grad,) = torch.autograd.grad(head(x, labels), x)
    assert grad.any() and torch.equal(head.weight, before)
    head(x, labels).backward(inputs=[x])
    assert torch.equal(head.weight, before)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(head(x, labels), head.weight)
    assert torch.equal(head.weight, before)
    with torch.no_grad():
        head(x, labels)
    head(x, labels).backward(inputs=[x, head.weight])  # as of all parameters of a model: it cannot be told from the others
    with pytest.warns(RuntimeWarning, match="told its inputs"):
        optimizer.step()
    head(x, labels).backward()
    assert not torch.equal(head.weight, before)


def test_frozen_centres_are_left() -> None:
    head, _optimizer, x, labels = made()
    head.weight.requires_grad_(False)
    before = head.weight.detach().clone()
    head(x, labels).backward()
    assert torch.equal(head.weight, before)


def test_a_closure_is_called_and_its_step_ended() -> None:
    head, optimizer, x, labels = made()
    before = head.weight.detach().clone()

    def closure() -> Tensor:
        loss = head(x, labels)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0 and not torch.equal(head.weight, before)
    optimizer.step(closure)


def test_the_step_is_counted_in_float32_whatever_the_default_is() -> None:
    head, x, labels = ak.AMSoftmaxLoss(4, 5), torch.randn(2, 4), torch.tensor([0, 1])
    optimizer = FusedAdamW(head)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for _ in range(300):
            take_step(head, optimizer, x, labels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[head.weight]["step"].item() == 300


def test_a_copy_of_the_head_has_a_gradient_again() -> None:
    head, optimizer, x, labels = made()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(ak.AMSoftmaxLoss(D, C, dtype=torch.float64)))):
        other(x, labels).backward()
        assert other.weight.grad is not None
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    loaded(x, labels).backward()
    assert loaded.weight.grad is not None
    del optimizer
    head(x, labels).backward()  # nobody is there to update it
    assert head.weight.grad is not None


def test_the_last_optimizer_counts() -> None:
    head, first, x, labels = made()
    second = FusedSGD(head, lr=0.0)
    before = head.weight.detach().clone()
    head(x, labels).backward()
    second.step()
    assert torch.equal(head.weight, before) and not first._pending


def test_a_grad_scaler() -> None:
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        backbone, head = torch.nn.Linear(D, D), ak.AMSoftmaxLoss(D, C)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        centres = FusedSGD(head, lr=0.5, momentum=0.9, scaler=scaler)
        optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
        for step in range(3):
            x, labels = batch(step, torch.float32)
            optimizer.zero_grad()
            scaler.scale(head(backbone(x), labels)).backward()
            scaler.step(optimizer)
            scaler.step(centres)
            scaler.update()
        results.append((head.weight.detach(), backbone.weight.detach()))
    assert all(relative(a, b) < 1e-6 for a, b in zip(*results, strict=True))


def test_in_a_model_that_is_compiled_or_checkpointed() -> None:
    torch.manual_seed(0)
    start = torch.nn.Linear(D, D)
    heads = []
    for how in ("eager", "compiled", "whole step compiled", "checkpointed"):
        backbone, head = copy.deepcopy(start), pair("momentum", torch.float32)[0]
        optimizer = FusedSGD(head, lr=0.5, momentum=0.9)
        call: Any = torch.compile(head, backend="eager") if how == "compiled" else head
        if how == "checkpointed":
            call = functools.partial(torch.utils.checkpoint.checkpoint, head, use_reentrant=False)

        def step(x: Tensor, labels: Tensor, backbone: Any = backbone, call: Any = call, optimizer: Any = optimizer) -> None:
            call(backbone(x), labels).backward()
            optimizer.step()

        run: Any = torch.compile(step, backend="eager") if how == "whole step compiled" else step
        for number in range(3):
            run(*batch(number, torch.float32))
        heads.append(head.weight.detach())
    assert all(torch.equal(heads[0], other) for other in heads[1:])


def test_blocks_put_chunks_together() -> None:
    torch.manual_seed(0)
    grad, seen = torch.randn(100, 3), []
    with mock.patch("amsoftmax_kernels.backends.update._SHARED_ELEMENTS", 3 * 16):
        for sizes in ([100], [1, 15, 16, 30, 38], [40, 60]):
            blocks, start, found = Blocks(100, 3, lambda block: block.mul_(2)), 0, []
            for size in sizes:
                found += list(blocks.of(start, grad[start : start + size]))
                start += size
            assert [first for first, _ in found] == list(range(0, 100, 16))
            seen.append(torch.cat([block for _, block in found]))
    assert all(torch.equal(each, 2 * grad) for each in seen)


def test_threads_keep_little_memory() -> None:
    """What the update needs beside the chunk is bounded."""
    head = ak.AMSoftmaxLoss(64, 20_000, dtype=torch.bfloat16, save_bytes=0)
    optimizer = FusedAdamW(head)
    head(torch.randn(64, 64), torch.arange(64)).backward()
    optimizer.step()
    assert sum(each.nbytes for each in streams._kept.__dict__.get("buffers", {}).values()) <= streams.WORKSPACE_BYTES
