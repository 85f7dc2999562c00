"""The Triton backend on few classes, where E·ŵ is made beside the centres' gradient, by the SMs that it leaves idle."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends.triton import tiles as triton_configs

from .cases import Case, relative

pytest.importorskip("triton")
from amsoftmax_kernels.backends import triton as backend

from .test_triton_gradient import DEVICE, gradient_operands

REASON = backend.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"the Triton backend cannot run here: {REASON}")
COMPUTE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter has no bfloat16 products


@pytest.fixture(autouse=True)
def new_tensors_are_poisoned(poisoned: None) -> None: ...


def inputs(D: int) -> list[Tensor]:
    tensors = Case("", "", B=20, C=75, D=D, own=0.5).tensors(torch.float32)
    return [each.clone(memory_format=torch.contiguous_format).to(DEVICE) for each in tensors]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On a GPU large enough: the parts of each E·ŵ that was made so."""
    parts: list[int] = []
    kernel = backend._Kernels.grad_both

    def noted(*arguments: Any) -> bool:
        parts.append(arguments[-1].shape[0])
        return kernel(*arguments)

    monkeypatch.setattr(backend._Kernels, "grad_both", noted)
    pays = triton_configs.GradientConfig.parts_beside
    monkeypatch.setattr(triton_configs.GradientConfig, "parts_beside", lambda *how: 3 if pays(*how) else 0)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(backend, "_multiprocessors", lambda _: 60)
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, COMPUTE], ids=str)
@pytest.mark.parametrize("upstream", [None, -3.0])
@pytest.mark.parametrize(
    ("B", "C", "D", "count"),
    [(1, 1, 16, 1), (16, 16, 32, 1), (17, 33, 48, 3), (40, 300, 128, 2), (15, 100, 96, 4), (70, 129, 112, 9)],
)
def test_the_kernel(
    B: int, C: int, D: int, count: int, upstream: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around its tiles' edges; parts of which the last has fewer classes, or none."""
    monkeypatch.setattr(triton_configs.GradientConfig, "serves", lambda *_: True)
    terms, x_factored, weight, inverse, grad = gradient_operands(B, C, D, dtype)
    w_hat = (weight.float() * inverse[:, None]).to(COMPUTE)
    factor = None if upstream is None else torch.tensor(upstream, device=DEVICE)
    parts = torch.full((count, B, D), math.nan, device=DEVICE)
    kernels = backend._Kernels()
    if not kernels.grad_both(terms, x_factored, w_hat, weight, inverse, grad, factor, parts):
        pytest.skip("there is no such kernel for this GPU")
    exact = terms.double() @ w_hat.double()
    assert relative(parts.double().sum(0), exact) < 2e-6
    alone = torch.full_like(grad, math.nan)
    assert kernels.grad_centres(terms, x_factored, weight, inverse, alone, factor) and torch.equal(grad, alone)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "C", "D"), [(256, 10_516, 512), (1024, 8_000, 512), (64, 300, 272), (70, 9_001, 256)])
def test_the_kernel_at_its_sizes(B: int, C: int, D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits hundreds of times, whichever programs run at the same time."""
    monkeypatch.setattr(triton_configs.GradientConfig, "serves", lambda *_: True)
    *operands, grad = gradient_operands(B, C, D, dtype)
    terms, x_factored, weight, inverse = operands
    w_hat, kernels = (weight.float() * inverse[:, None]).to(COMPUTE), backend._Kernels()
    config = backend._gradient_config(DEVICE)
    if config is None:
        pytest.skip("there is no such kernel for this GPU")
    count = config.parts_beside(B, D, C, backend._multiprocessors(DEVICE), dtype.itemsize)
    parts = inverse.new_empty(max(count, 1), B, D)
    assert kernels.grad_both(terms, x_factored, w_hat, weight, inverse, grad, None, parts)
    assert relative(parts.sum(0), terms.float() @ w_hat.float()) < 1e-5
    alone = torch.full_like(grad, math.nan)
    assert kernels.grad_centres(terms, x_factored, weight, inverse, alone, None) and torch.equal(grad, alone)
    for _ in range(300):
        again, parts_again = torch.full_like(grad, math.nan), torch.full_like(parts, math.nan)
        assert kernels.grad_both(terms, x_factored, w_hat, weight, inverse, again, None, parts_again)
        assert torch.equal(again, grad) and torch.equal(parts_again, parts)


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "s1000": {"scale": 1000.0},
    "no-fn": {"normalize_features": False},
    "filter": {"interclass_filter": 0.4},
    "predictions": {"return_predictions": True},
    "ignored": {"ignore_index": 5},
}


def step(tensors: list[Tensor], needs: tuple[bool, bool] = (True, True), **options: Any) -> tuple[Tensor, ...]:
    leaves = [each.detach().requires_grad_(need) for each, need in zip(tensors[:2], needs, strict=True)]
    scale = options.get("scale")
    wanted = [each for each in (*leaves, scale) if isinstance(each, Tensor) and each.requires_grad]
    with torch.autocast(DEVICE.type, COMPUTE):
        out = ak.am_softmax_loss(*leaves, tensors[2], backend="triton", **options)
    loss, *more = out if isinstance(out, tuple) else (out,)
    upstream = torch.tensor(1.5, device=DEVICE)
    first = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
    again = torch.autograd.grad(loss, wanted, upstream)  # of the same memory
    assert all(map(torch.equal, first, again))
    return loss.detach(), *more, *first


@pytest.mark.parametrize(("name", "D"), [("mean", 32), ("mean", 96), *((name, 64) for name in OPTIONS)])
def test_every_option(name: str, D: int, beside: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as E·ŵ by a library's product, but for the order of its sum."""
    options, tensors = OPTIONS[name], inputs(D)
    actual = step(tensors, **options)
    assert beside == [3, 3]
    monkeypatch.setattr(backend._Kernels, "parts_beside", lambda *_: 0)
    expected = step(tensors, **options)
    assert len(beside) == 2
    *same, by_features, by_weight = actual
    *as_before, exact_by_features, exact_by_weight = expected
    assert all(map(torch.equal, same, as_before)) and torch.equal(by_weight, exact_by_weight)
    # A half-precision copy of ŵ becomes bfloat16 in the library's product alone.
    assert relative(by_features, exact_by_features) < (1e-5 if DEVICE.type == "cuda" else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_against_the_reference(dtype: torch.dtype, beside: list[int]) -> None:
    tensors = inputs(64)
    tensors[1] = tensors[1].to(dtype)
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    loss, *grads = step(tensors, scale=scale)
    leaves = [each.detach().double().requires_grad_() for each in (*tensors[:2], scale)]
    exact = ak.reference.am_softmax_loss(*leaves[:2], tensors[2], scale=leaves[2])
    assert len(beside) == 2 and relative(loss, exact.detach()) < 1e-3 and grads[1].dtype == dtype
    # That of s is the difference of what pulls the targets and the others.
    for grad, right, most in zip(grads, torch.autograd.grad(1.5 * exact, leaves), (5e-3, 5e-3, 2e-2), strict=True):
        assert right.abs().max() > 0 and relative(grad, right) < most + (2**-7 if grad.dtype == torch.bfloat16 else 0)


def test_what_else_is_asked_for(beside: list[int]) -> None:
    """One gradient alone, nothing kept, padded centres, rows of their own; and what is only seen when it is too late."""
    tensors = inputs(64)
    _, by_features, by_weight = step(tensors)
    beside.clear()
    for needs, exact in (((True, False), by_features), ((False, True), by_weight)):
        assert relative(step(tensors, needs)[1], exact) < 2e-3
    step(tensors, save_bytes=0)
    padded = torch.nn.functional.pad(tensors[1], (0, 16))[:, :-16]
    step([tensors[0], padded, *tensors[2:]])
    leaves = [each.detach().requires_grad_() for each in tensors[:2]]
    with torch.autocast(DEVICE.type, COMPUTE):
        rows = ak.am_softmax_loss(*leaves, tensors[2], backend="triton", reduction="none")
    torch.autograd.grad(rows.sum(), leaves)
    assert not beside
    shifted = torch.empty(tensors[1].numel() + 1, device=DEVICE)[1:].view_as(tensors[1]).copy_(tensors[1])
    found = step([tensors[0], shifted, *tensors[2:]])  # an address that is no multiple of 16 is seen only later
    assert len(beside) == 2 and relative(found[1], by_features) < 2e-3 and relative(found[2], by_weight) < 1e-5


def test_an_empty_batch(beside: list[int]) -> None:
    tensors = inputs(64)
    found = step([tensors[0][:0], tensors[1], tensors[2][:0]])
    assert found[0] == 0 and found[1].shape == (0, 64) and not found[2].any() and not beside
    problem = (tensors[0][:0], tensors[1], tensors[2][:0], torch.tensor(30.0, dtype=torch.float64), True, COMPUTE, math.inf)
    how = (*problem, 1 << 30, False, True, True, -100, 0.35, "mean", False)
    # Not its values: what nobody will read is never written.
    torch.library.opcheck(
        torch.ops.amsoftmax_kernels.triton_forward_loss, how, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("D", [40, 64])
def test_as_an_operator(D: int, beside: list[int]) -> None:
    """Sizes without data are those with it."""
    features, weight, labels, upstream = inputs(D)
    problem = (features, weight, labels, torch.tensor(30.0, dtype=torch.float64), True, COMPUTE, math.inf)
    ops = torch.ops.amsoftmax_kernels
    for save_bytes, needs in ((1 << 30, (True, True)), (0, (True, True)), (1 << 30, (True, False))):
        how = (*problem, save_bytes, False, *needs, -100, 0.35, "mean", False)
        torch.library.opcheck(ops.triton_forward_loss, how)
        saved = ops.triton_forward_loss(*how)[3:]
        assert (saved[-1].numel() > 0) == (needs[1] and (D == 64 or save_bytes == 0))
        given = (*problem, *saved, upstream[0].float())
        torch.library.opcheck(ops.triton_backward_loss, (*given, *needs, False))
        both = ops.triton_backward_loss(*given, *needs, False)
        if needs[1] and save_bytes:  # all terms are kept: then in any parts
            beside.clear()
            for i in (0, 1):
                alone = ops.triton_backward_loss(*given, i == 0, i == 1, False)
                assert relative(alone[i], both[i]) < 2e-3 and alone[1 - i].numel() == 0
            assert not beside


def test_when_it_pays() -> None:
    """On an H200's 132 SMs, and never more programs than those."""
    config = triton_configs.GRADIENT[9]
    assert [config.parts_beside(256, 512, C, 132) > 0 for C in (1000, 10_516, 14_000, 16_896, 100_000)] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert config.parts_beside(1024, 512, 10_516, 132) == 3 and config.parts_beside(1024, 512, 12_000, 132) == 0
    assert config.parts_beside(0, 512, 1000, 132) == 0
    for B, size in itertools.product((1, 64, 200, 1024), (2, 4)):
        for width in (32, 128, 256, 512):
            for classes in range(1, 20_000, 397):
                parts = config.parts_beside(B, width, classes, 132, size)
                assert -(-classes // config.classes) + parts * config.product_tiles(B, width) <= 132 or parts == 0
