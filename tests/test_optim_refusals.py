"""Centres updated in the backward pass: what is refused, and that neither centres nor state have changed then."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends.update import Update
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD

from .updated import C, D, batch, made, pair


def unchanged(head: ak.AMSoftmaxLoss, optimizer: Any, error: type[Exception], match: str, work: Callable[[], Any]) -> None:
    """That the error comes and nothing else: neither centres nor state change."""
    before = [head.weight.detach().clone(), *(each.clone() for each in optimizer.state[head.weight].values())]
    with pytest.raises(error, match=match):
        work()
    after = [head.weight, *optimizer.state[head.weight].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


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


class _Broken(Exception): ...


def test_a_step_that_breaks_off_says_so(small_chunks: None) -> None:
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
def test_a_row_that_is_not_finite_changes_no_centre(fill: float, small_chunks: None) -> None:
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


def test_one_class_that_is_not_finite_is_left_alone(small_chunks: None) -> None:
    head, optimizer, *_ = pair("momentum", torch.float32, save_bytes=0)
    with torch.no_grad():
        head.weight[70] *= 1e-29 / head.weight[70].norm()
    before = head.weight.detach().clone()
    x, labels = batch(0, torch.float32)
    (1e15 * head(x, labels)).backward()
    optimizer.step()
    moved = (head.weight != before).any(1)
    assert not moved[70] and moved.sum() == C - 1 and optimizer.skipped == 1 and head.weight.isfinite().all()


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
