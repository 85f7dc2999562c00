"""Centres updated by a kernel, in Triton and in C++: on a GPU where there is one, else interpreted and emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import chunking
from amsoftmax_kernels.backends.kernels import TargetParts
from amsoftmax_kernels.backends.update import SGD, AdamW, Update

from .cases import relative
from .updated import KINDS, B, C, D, batch

CPU = torch.device("cpu")
RULES = [SGD(0.1, 0.9, 0.2, 0.01, False, False), SGD(0.1, 0.9, 0.0, 0.0, True, True), SGD(0.1, 0.0, 0.0, 0.1, False, False),
         AdamW(0.1, 0.9, 0.99, 1e-8, 0.01, 3)]  # fmt: skip


@pytest.fixture(autouse=True)
def new_tensors_are_poisoned(poisoned: None) -> None: ...


def launch(
    name: str, unit: Tensor, centres: Tensor, inverse: Tensor, parts: TargetParts, start: int, update: Update,
    whole: bool = False, out: Tensor | None = None,
) -> None:  # fmt: skip
    """One launch of a backend's kernel."""
    kernels = backends.load(name).fused.kernels  # type: ignore[attr-defined]
    kernels.update_centres(unit, centres, inverse, parts, start, update, whole, out)


@pytest.mark.parametrize("kind", list(KINDS))
def test_steps_are_those_of_torch_optim(kind: str, fused_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of 256 classes, and pieces of 100, with duplicate and ignored labels; and by the other backend's rows."""
    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(chunking, "finish_size", lambda width: 100)
    fused, theirs, options = KINDS[kind]
    torch.manual_seed(3)
    start, classes = torch.randn(300, D), 300
    for head in ({}, {"save_bytes": 0, "margin": torch.linspace(0.1, 0.4, classes)}):
        ours = ak.AMSoftmaxLoss(D, classes, **{"scale": 8.0, "backend": fused_backend, **head})
        other = ak.AMSoftmaxLoss(D, classes, **{"scale": 8.0, "backend": "reference", **head, "save_bytes": None})
        for module in (ours, other):
            module.set_centres(start)
        mine, his = fused(ours, **options), theirs([other.weight], **options)
        for step in range(3):
            x, labels = batch(step, torch.float32)
            grads = []
            for module, optimizer in ((ours, mine), (other, his)):
                leaf = x.clone().requires_grad_()
                optimizer.zero_grad()
                module(leaf, labels).backward()
                optimizer.step()
                grads.append(leaf.grad)
            # In C++ float32 is multiplied as TF32.
            assert relative(*grads) < (1e-5 if fused_backend == "triton" else 2e-3)
            apart = relative(ours.weight.detach() - start, other.weight.detach() - start)
            assert apart < (1e-4 if fused_backend == "triton" else 5e-2)
    assert mine.skipped == 0


def made(rule: Any, dtype: torch.dtype, drawn: bool, seed: int | None) -> tuple[Update, Tensor, Tensor, TargetParts]:
    """An update of C classes, dŵ, 1/‖w‖ and the targets' parts, of which two classes have one."""
    generator = torch.Generator().manual_seed(1)
    total = 2 * C if drawn else C

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    states = 2 if isinstance(rule, AdamW) else 1 if rule.momentum else 0
    first = isinstance(rule, SGD) and rule.first
    state = tuple((torch.zeros(total, D, device=CPU) if first else normal(total, D).abs()).to(dtype) for _ in range(states))
    rows = torch.randperm(total, generator=generator)[:C] if drawn else None
    update = Update(rule, normal(total, D).to(dtype), state, class_start=1000, rows=rows, seed=seed, step=2, loss_scale=4.0)
    slots = torch.full((C,), -1, dtype=torch.int32, device=CPU)
    slots[7], slots[C - 1] = 0, 3
    width = chunking.padded(D)
    unit = torch.cat([normal(C, D), torch.full((C, width - D), torch.nan, device=CPU)], 1)
    return update, unit, update.centres(0, C).float().norm(dim=1).reciprocal(), TargetParts(slots, normal(B, D))


def by_hand(update: Update, unit: Tensor, inverse: Tensor, parts: TargetParts) -> None:
    """The same in plain PyTorch."""
    w_hat = update.centres(0, C).float() * inverse[:, None]
    g = unit[:, :D]
    grad = (g - (g * w_hat).sum(1, keepdim=True) * w_hat) * inverse[:, None]
    for place in (7, C - 1):
        grad[place] += parts.rows[parts.slots[place]]
    update.apply_(0, update.unscaled(grad))


@pytest.mark.parametrize("rule", RULES, ids=["sgd", "first, nesterov", "plain", "adamw"])
@pytest.mark.parametrize("how", ["whole", "drawn", "replicas"])
def test_the_kernel_is_the_update_in_plain_pytorch(rule: Any, how: str, fused_backend: str) -> None:
    ways = [made(rule, torch.float32, how == "drawn", None) for _ in range(2)]
    (ours, *inputs), (plain, *_) = ways
    by_hand(plain, *inputs)
    unit, inverse, parts = inputs
    for first, last in ((0, 37), (37, C)):
        of_them = parts._replace(slots=parts.slots[first:last])
        centres = ours.centres(first, last - first)
        if how != "replicas":
            launch(fused_backend, unit[first:last], centres, inverse[first:last], of_them, first, ours)
            continue
        grad = torch.empty(last - first, D)  # which they add up
        launch(fused_backend, unit[first:last], centres, inverse[first:last], of_them, first, ours, out=grad)
        launch(fused_backend, grad, centres, inverse[first:last], of_them, first, ours, whole=True)
    start = made(rule, torch.float32, how == "drawn", None)[0]
    for a, b, before in zip(*((each.weight, *each.state) for each in (ours, plain, start)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert relative(a - before, b - before) < 1e-5
    assert ours.tally.total() == 0


@pytest.mark.parametrize("rule", RULES, ids=["sgd", "first, nesterov", "plain", "adamw"])
def test_bfloat16_is_rounded_by_the_same_bits(rule: Any, fused_backend: str) -> None:
    ways = [made(rule, torch.bfloat16, False, 5) for _ in range(2)]
    (ours, *inputs), (plain, *_) = ways
    by_hand(plain, *inputs)
    unit, inverse, parts = inputs
    launch(fused_backend, unit, ours.centres(0, C), inverse, parts, 0, ours)
    for a, b in zip((ours.weight, *ours.state), (plain.weight, *plain.state), strict=True):
        # The last bit of a float32 decides now and then.
        assert a.dtype == torch.bfloat16 and (a != b).float().mean() < 1e-3
        torch.testing.assert_close(a, b, rtol=2**-7, atol=0)


@pytest.mark.parametrize("rule", RULES[:1] + RULES[3:], ids=["sgd", "adamw"])
def test_a_class_that_is_not_finite_is_left_alone(rule: Any, fused_backend: str) -> None:
    update, unit, inverse, parts = made(rule, torch.float32, False, None)
    before = [each.clone() for each in (update.weight, *update.state)]
    unit[3, 5], unit[40, 0] = torch.inf, torch.nan
    launch(fused_backend, unit, update.centres(0, C), inverse, parts, 0, update)
    assert update.tally.total() == 2
    for each, old in zip((update.weight, *update.state), before, strict=True):
        same = (each == old).all(1)
        assert same.nonzero()[:, 0].tolist() == [3, 40] and each.isfinite().all()
