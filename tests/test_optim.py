"""Centres updated in the backward pass: the trajectory of ``torch.optim``, what is refused, and stochastic rounding."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import chunking, rounding, shard, streams
from amsoftmax_kernels.backends.update import SGD, AdamW, Blocks, Update
from amsoftmax_kernels.margins import AnnealedAdditiveMargin
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD

from .cases import relative
from .ranks import Ranks, device

D, C, B = 24, 150, 16
# What becomes of them, ours and PyTorch's.
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "momentum": (FusedSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 5e-3}),
    "plain": (FusedSGD, torch.optim.SGD, {"lr": 0.5, "weight_decay": 5e-3}),
    "dampening": (FusedSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.8, "dampening": 0.4}),
    "nesterov": (FusedSGD, torch.optim.SGD, {"lr": 0.5, "momentum": 0.8, "nesterov": True, "weight_decay": 1e-3}),
    "adamw": (FusedAdamW, torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
}


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


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of classes, in streams, of problems that are small."""
    monkeypatch.setitem(shard._CHUNK_ELEMENTS, "cpu", 32 * (B + D))
    monkeypatch.setattr(shard, "_SMALL", 1)
    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", 1)


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
def test_twenty_steps_are_those_of_torch_optim(kind: str, short_chunks: None) -> None:
    for how in ("kept", "recomputed"):
        assert max(train(kind, torch.float64, 20, **HEADS[how])) < 1e-12
    assert max(train(kind, torch.float32, 20, **HEADS["recomputed"])) < (1e-5 if kind != "adamw" else 1e-3)


@pytest.mark.parametrize("how", list(HEADS))
def test_every_kind_of_head(how: str, short_chunks: None) -> None:
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
            optimizer.zero_grad()
            module(rows.clone().requires_grad_(), values).backward()
            optimizer.step()
    assert relative(ours.weight, other.weight) < 1e-12


@pytest.mark.parametrize("kind", list(KINDS))
def test_checkpoints_go_both_ways(kind: str) -> None:
    ours, fused, other, theirs = pair(kind, torch.float64)
    fused_again, theirs_again = pair(kind, torch.float64)[:2], pair(kind, torch.float64)[2:]
    for step in range(3):
        x, labels = batch(step, torch.float64)
        for module, optimizer in ((ours, fused), (other, theirs)):
            module(x, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (module, optimizer), (source, state) in ((fused_again, (other, theirs)), (theirs_again, (ours, fused))):
        buffer = io.BytesIO()
        torch.save(state.state_dict(), buffer)
        buffer.seek(0)
        module.load_state_dict(source.state_dict())
        optimizer.load_state_dict(torch.load(buffer))
    x, labels = batch(7, torch.float64)
    for module, optimizer in ((ours, fused), (other, theirs), fused_again, theirs_again):
        module(x, labels).backward()
        optimizer.step()
    for module in (other, fused_again[0], theirs_again[0]):
        assert relative(module.weight, ours.weight) < 1e-13


def test_momentum_switched_on_later_and_off() -> None:
    ours, fused, other, theirs = pair("plain", torch.float64)
    for step, momentum in enumerate((0, 0.9, 0.9, 0)):
        x, labels = batch(step, torch.float64)
        for module, optimizer in ((ours, fused), (other, theirs)):
            optimizer.param_groups[0]["momentum"] = momentum
            optimizer.zero_grad()
            module(x, labels).backward()
            optimizer.step()
    assert relative(ours.weight, other.weight) < 1e-13


def test_a_scheduler_drives_it() -> None:
    ours, fused, other, theirs = pair("momentum", torch.float64)
    schedules = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (fused, theirs)]
    for step in range(3):
        x, labels = batch(step, torch.float64)
        for module, optimizer, schedule in ((ours, fused, schedules[0]), (other, theirs, schedules[1])):
            optimizer.zero_grad()
            module(x, labels).backward()
            optimizer.step()
            schedule.step()
    assert fused.param_groups[0]["lr"] == 0.0625 and relative(ours.weight, other.weight) < 1e-13


def unchanged(head: ak.AMSoftmaxLoss, optimizer: Any, error: type[Exception], match: str, work: Callable[[], Any]) -> None:
    """That the error comes and nothing else: neither centres nor state change."""
    before = [head.weight.detach().clone(), *(each.clone() for each in optimizer.state[head.weight].values())]
    with pytest.raises(error, match=match):
        work()
    after = [head.weight, *optimizer.state[head.weight].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def made(**options: Any) -> tuple[ak.AMSoftmaxLoss, FusedSGD, Tensor, Tensor]:
    """A head, its optimizer after one step, and a batch."""
    head, optimizer, *_ = pair("momentum", torch.float64, **options)
    x, labels = batch(0, torch.float64)
    x.requires_grad_()
    head(x, labels).backward()
    optimizer.step()
    return head, optimizer, x, labels


def test_a_second_backward_pass_before_step_is_an_error() -> None:
    head, optimizer, x, labels = made()
    head(x, labels).backward()
    unchanged(head, optimizer, RuntimeError, r"before FusedSGD\.step\(\)", lambda: head(x, labels).backward())
    optimizer.step()
    head(x, labels).backward()


def test_create_graph_is_an_error() -> None:
    head, optimizer, x, labels = made()
    loss = head(x, labels)
    unchanged(head, optimizer, RuntimeError, "create_graph", lambda: torch.autograd.grad(loss, x, create_graph=True))
    unchanged(head, optimizer, RuntimeError, "create_graph", lambda: loss.backward(create_graph=True))


def test_a_gradient_from_elsewhere_is_an_error() -> None:
    head, optimizer, x, labels = made()
    head.weight.grad = torch.ones_like(head.weight)
    unchanged(head, optimizer, RuntimeError, "gradient from elsewhere", lambda: head(x, labels).backward())
    optimizer.zero_grad()
    unchanged(
        head, optimizer, RuntimeError, "gradient from elsewhere",
        lambda: (head(x, labels) + 0.1 * head.weight.square().sum()).backward(),
    )  # fmt: skip
    optimizer.zero_grad()
    other = 0.1 * head.weight.sum()  # what is made first is differentiated last
    (other + head(x, labels)).backward()
    with pytest.raises(RuntimeError, match="gradient from elsewhere"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="broken off"):
        head(x, labels)


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


def test_other_refusals() -> None:
    head, optimizer, x, labels = made()
    for work in (lambda: copy.deepcopy(optimizer), lambda: pickle.dumps(optimizer)):
        with pytest.raises(TypeError, match="state_dict"):
            work()
    reference = ak.AMSoftmaxLoss(D, C, backend="reference")
    kept = FusedSGD(reference, lr=0.1)
    with pytest.raises(ValueError, match="'reference'"):
        reference(x.float(), labels)
    assert kept.skipped == 0
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    unchanged(head, optimizer, RuntimeError, "weight alone", lambda: head(x, labels))
    head, optimizer, x, labels = made()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with pytest.raises(RuntimeError, match="another Parameter"):
        head(x, labels).backward()
    head, optimizer, x, labels = made()
    optimizer.param_groups[0]["maximize"] = True
    unchanged(head, optimizer, ValueError, "maximize", lambda: head(x, labels))
    for hook in ("register_hook", "register_post_accumulate_grad_hook"):
        head, optimizer, x, labels = made()
        getattr(head.weight, hook)(lambda grad: None)
        unchanged(head, optimizer, RuntimeError, "hooks", functools.partial(head, x, labels))


def test_a_step_is_of_the_weight_that_the_loss_had() -> None:
    head, optimizer, x, labels = made()
    other = torch.randn(C, D, dtype=torch.float64, requires_grad=True)
    call = torch.func.functional_call
    unchanged(head, optimizer, RuntimeError, "another Parameter", lambda: call(head, {"weight": other}, (x, labels)))
    loss = head(x, labels)
    FusedSGD(head, lr=0.1)
    unchanged(head, optimizer, RuntimeError, "another optimizer", loss.backward)
    head, optimizer, x, labels = made()
    loss = head(x, labels)
    ak.resize_classes(head, C + 10, optimizer=optimizer)
    unchanged(head, optimizer, RuntimeError, "changed for another one", loss.backward)
    head(x, labels).backward()


def test_a_loss_of_before_the_step_is_an_error(fused_backend: str) -> None:
    """Kernels write where autograd does not look: without a new version the old loss would be differentiated wrongly."""
    head, x, labels = ak.AMSoftmaxLoss(D, C, backend=fused_backend, save_bytes=0), *batch(0, torch.float32)
    optimizer, x = FusedSGD(head, lr=0.1, momentum=0.9), x.requires_grad_()
    first, second = head(x, labels), head(x, labels)
    first.backward()
    optimizer.step()
    unchanged(head, optimizer, RuntimeError, "modified by an inplace operation", second.backward)
    head(x, labels).backward()


def test_the_head_twice_in_one_backward_pass_is_an_error_for_good() -> None:
    head, optimizer, x, labels = made()
    both = head(x, labels) + head(2 * x, labels)
    with pytest.raises(RuntimeError, match="twice in one backward pass"):
        both.backward()
    for work in (optimizer.step, optimizer.state_dict, lambda: head(x, labels)):
        with pytest.raises(RuntimeError, match="broken off"):
            work()
    with pytest.warns(RuntimeWarning, match="broken off"):
        state = head.state_dict()
    with pytest.raises(RuntimeError, match="broken off"):
        FusedSGD(head, lr=0.1), head(x, labels)
    head.load_state_dict(state)
    optimizer = FusedSGD(head, lr=0.1)
    head(x, labels).backward()
    optimizer.step()


def test_a_closure_is_called_and_its_step_ended() -> None:
    head, optimizer, x, labels = made()
    before = head.weight.detach().clone()

    def closure() -> Tensor:
        loss = head(x, labels)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0 and not torch.equal(head.weight, before)
    optimizer.step(closure)


def test_a_compiled_training_step() -> None:
    torch.manual_seed(0)
    ends = []
    start = torch.nn.Linear(D, D)
    for compiled in (False, True):
        backbone, head = copy.deepcopy(start), pair("momentum", torch.float32)[0]
        optimizer = FusedSGD(head, lr=0.5, momentum=0.9)

        def step(x: Tensor, labels: Tensor, backbone: Any = backbone, head: Any = head, optimizer: Any = optimizer) -> None:
            head(backbone(x), labels).backward()
            optimizer.step()

        run = torch.compile(step, backend="eager") if compiled else step
        for number in range(3):
            run(*batch(number, torch.float32))
        ends.append(head.weight.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("make", [FusedSGD, FusedAdamW])
def test_state_of_other_classes_is_refused(make: Any) -> None:
    options = {"momentum": 0.9} if make is FusedSGD else {}
    heads = [ak.AMSoftmaxLoss(D, classes) for classes in (C, C + 20)]
    optimizers = [make(head, lr=0.1, **options) for head in heads]
    x, labels = batch(0, torch.float32)
    heads[1](x, labels).backward()
    optimizers[1].step()
    optimizers[0].load_state_dict(optimizers[1].state_dict())
    before = heads[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="state has"):
        heads[0](x, labels)
    assert torch.equal(heads[0].weight, before)


def test_the_step_is_counted_in_float32_whatever_the_default_is() -> None:
    head, x, labels = ak.AMSoftmaxLoss(4, 5), torch.randn(2, 4), torch.tensor([0, 1])
    optimizer = FusedAdamW(head)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for _ in range(300):
            head(x, labels).backward()
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[head.weight]["step"].item() == 300


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
            head(*batch(step, torch.float32)).backward()
            optimizer.step()

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


def test_wrong_arguments() -> None:
    head = ak.AMSoftmaxLoss(4, 5)
    for make in (FusedSGD, FusedAdamW):
        with pytest.raises(TypeError, match="head must be"):
            make(head.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="learning rate"):
            make(head, lr=-0.1)
        with pytest.raises(TypeError, match="state_dtype"):
            make(head, state_dtype=torch.int32)
        with pytest.raises(ValueError, match="stochastic_rounding"):
            make(head, stochastic_rounding=True)
        with pytest.raises(ValueError, match="seed"):
            make(head, seed=-1)
        with pytest.raises(TypeError, match="scaler"):
            make(head, scaler=1024.0)
    assert head._centres_optimizer is None


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


class _Broken(Exception): ...


def test_a_step_that_breaks_off_says_so(short_chunks: None) -> None:
    head, optimizer, x, labels = made(save_bytes=0)
    calls, apply_ = [], Update.apply_

    def failing(self: Update, start: int, grad: Tensor) -> None:
        calls.append(start)
        if len(calls) == 3:
            raise _Broken
        apply_(self, start, grad)

    with mock.patch.object(Update, "apply_", failing), pytest.raises(_Broken):
        head(x, labels).backward()
    for work in (lambda: head(x, labels), optimizer.step):
        unchanged(head, optimizer, RuntimeError, "broken off", work)
    head.reset_parameters()
    with pytest.warns(RuntimeWarning, match="broken off"):
        state = head.state_dict()
    head.load_state_dict(state)
    head(x, labels).backward()


@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_changes_no_centre(fill: float, short_chunks: None) -> None:
    for kind in ("momentum", "adamw"):
        head, optimizer, *_ = pair(kind, torch.float64, save_bytes=0)
        x, labels = batch(0, torch.float64)
        head(x, labels).backward()
        optimizer.step()
        before = [head.weight.detach().clone(), *(each.clone() for each in optimizer.state[head.weight].values())]
        spoilt = x.clone()
        spoilt[3, 2] = fill
        head(spoilt, labels).backward()
        optimizer.step()
        after = [head.weight, *optimizer.state[head.weight].values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.dim())
        assert optimizer.skipped == C
        head(x, labels).backward()
        assert not torch.equal(head.weight, before[0])


def test_one_class_that_is_not_finite_is_left_alone(short_chunks: None) -> None:
    head, optimizer, *_ = pair("momentum", torch.float32, save_bytes=0)
    with torch.no_grad():
        head.weight[70] *= 1e-29 / head.weight[70].norm()
    before = head.weight.detach().clone()
    x, labels = batch(0, torch.float32)
    (1e15 * head(x, labels)).backward()
    optimizer.step()
    moved = (head.weight != before).any(1)
    assert not moved[70] and moved.sum() == C - 1 and optimizer.skipped == 1 and head.weight.isfinite().all()


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


def test_a_grad_scaler_that_it_was_not_given_is_an_error() -> None:
    head = ak.AMSoftmaxLoss(D, C)
    scaler, centres = torch.amp.GradScaler("cpu"), FusedSGD(head, lr=0.5)
    x, labels = batch(0, torch.float32)
    scaler.scale(head(x, labels)).backward()
    with pytest.raises(RuntimeError, match="scaler=scaler"):
        scaler.step(centres)
    head.load_state_dict(ak.AMSoftmaxLoss(D, C).state_dict())
    centres = FusedSGD(head, lr=0.5)
    head(x, labels).backward()
    centres.step()


def test_in_a_model_that_is_compiled_or_checkpointed() -> None:
    torch.manual_seed(0)
    start = torch.nn.Linear(D, D)
    heads = []
    for how in ("eager", "compiled", "checkpointed"):
        backbone, head = copy.deepcopy(start), pair("momentum", torch.float32)[0]
        optimizer = FusedSGD(head, lr=0.5, momentum=0.9)
        call: Any = torch.compile(head, backend="eager") if how == "compiled" else head
        if how == "checkpointed":
            run = torch.utils.checkpoint.checkpoint

            def call(*inputs: Any, head: Any = head, run: Any = run) -> Tensor:
                loss: Tensor = run(head, *inputs, use_reentrant=False)
                return loss

        for step in range(3):
            x, labels = batch(step, torch.float32)
            call(backbone(x), labels).backward()
            optimizer.step()
        heads.append(head.weight.detach())
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])


# Stochastic rounding.


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


def test_bfloat16_learns_what_rounding_to_nearest_loses(short_chunks: None) -> None:
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
            head(x, labels).backward()
            optimizer.step()
        moved[stochastic] = first - head(x, labels).item(), (head.weight != start).float().mean().item()
    torch.manual_seed(0)
    head = ak.AMSoftmaxLoss(D, C, scale=8.0, dtype=torch.float32, save_bytes=0)
    head.weight.data.copy_(start)
    optimizer, x = FusedSGD(head, lr=4e-4), x.float()
    first = head(x, labels).item()
    for _ in range(500):
        head(x, labels).backward()
        optimizer.step()
    full = first - head(x, labels).item()
    assert full > 0.3 and abs(moved[True][0] - full) < 0.2 * full
    assert moved[False][0] < 0.3 * full and moved[False][1] < 0.3 * moved[True][1]


@pytest.mark.parametrize("make", [FusedSGD, FusedAdamW])
def test_bfloat16_is_the_same_for_any_number_of_threads_and_resumed(make: Any, short_chunks: None) -> None:
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
            x, labels = batch(step, torch.bfloat16)
            head(x, labels).backward()
            optimizer.step()
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


# Over ranks.


def sharded_steps(replicas: int, kind: str, dtype: torch.dtype, sizes: list[int]) -> tuple[Tensor, ...]:
    """The whole centres after some steps, and this rank's gradients, of batches of these sizes."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from amsoftmax_kernels.sharded.shards import whole

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
        parts, start = [], 0
        for size, (_, grad) in zip(sizes, results, strict=True):
            parts.append(grad.split([size] * 3)[step].cpu())
            start += size
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
