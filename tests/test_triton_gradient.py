"""Triton's kernel for the centres' gradient by itself: around its tiles, at its sizes, and what it leaves to others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from amsoftmax_kernels.backends import chunking
from amsoftmax_kernels.backends.triton import tiles as triton_configs

from .triton_kernels import DEVICE, MARKS, backend

pytestmark = MARKS


def gradient_operands(B: int, C: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """E, a∘x̂, w, 1/‖w‖ and a place for dw, for ``_Kernels.grad_centres``."""
    generator = torch.Generator().manual_seed(B * C + D)
    terms = torch.rand(B, chunking.padded(C) + 16, generator=generator).bfloat16()[:, :C]
    x_factored, weight = torch.randn(B, D, generator=generator).bfloat16(), torch.randn(C, D, generator=generator).to(dtype)
    weight[C // 2] = 0
    norm = weight.double().norm(dim=1)
    inverse = torch.where(norm > 0, 1 / norm, 0).float()
    grad = torch.full_like(weight, math.nan)
    # One allocation each: what a slice has beside it, too.
    return terms._base.to(DEVICE)[:, :C], *(each.to(DEVICE) for each in (x_factored, weight, inverse, grad))


def gradient_error(grad: Tensor, exact: Tensor) -> float:
    """Relative to the largest, beside the rounding to the gradient's dtype."""
    error = (grad.double() - exact).abs()
    if grad.dtype != torch.float32:
        cut = grad.dtype == torch.bfloat16 and DEVICE.type == "cpu"  # by the interpreter
        of_dtype = torch.finfo(grad.dtype)
        error -= of_dtype.eps * (1.0 if cut else 0.5) * exact.abs() + of_dtype.smallest_normal
    return float(error.max()) / max(float(exact.abs().max()), 1e-30)


def exact_gradient(terms: Tensor, x_factored: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    g, unit = terms.double().T @ x_factored.double(), weight.double() * inverse.double()[:, None]
    return (g - (g * unit).sum(1, keepdim=True) * unit) * inverse.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("B", "C", "D"), [(1, 1, 16), (16, 16, 32), (17, 33, 48), (40, 300, 128), (15, 100, 96), (70, 129, 112), (200, 400, 64)]
)
def test_the_gradient_kernel(B: int, C: int, D: int, dtype: torch.dtype) -> None:
    """Around its tiles' edges."""
    operands = gradient_operands(B, C, D, dtype)
    done = backend._Kernels().grad_centres(*operands)
    assert done == (backend._gradient_config(DEVICE) is not None)
    if not done:
        pytest.skip("there is no such kernel for this GPU")
    grad = operands[-1]
    assert gradient_error(grad, exact_gradient(*operands[:4])) < (2e-6 if DEVICE.type == "cpu" else 1e-5)
    assert not grad[C // 2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("B", "C", "D"),
    [(256, 10_516, 512), (1024, 70_000, 512), (4096, 40_000, 256), (1, 40_000, 512), (64, 300, 272)],
)
def test_the_gradient_kernel_at_its_sizes(B: int, C: int, D: int, dtype: torch.dtype) -> None:
    """One step a tile or many, and hundreds of times the same bits."""
    operands = gradient_operands(B, C, D, dtype)
    if not backend._Kernels().grad_centres(*operands):
        pytest.skip("there is no such kernel for this GPU")
    assert gradient_error(operands[-1], exact_gradient(*operands[:4])) < 1e-5
    for _ in range(300):
        again = torch.full_like(operands[-1], math.nan)
        assert backend._Kernels().grad_centres(*operands[:4], again)
        assert torch.equal(again, operands[-1])


def test_what_the_gradient_kernel_leaves_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    terms, x_factored, weight, inverse, grad = gradient_operands(40, 50, 64)
    monkeypatch.setattr(backend, "_gradient_config", lambda _: triton_configs.GRADIENT[9])
    shifted = torch.zeros(50 * 64 + 1, device=DEVICE)[1:].view(50, 64)
    wide = torch.zeros(40, 528, device=DEVICE).bfloat16()
    for left in (
        (terms, x_factored.float(), weight, inverse, grad),
        (terms, x_factored, weight.bfloat16(), inverse, grad),
        (terms, x_factored, weight[:, :56].bfloat16(), inverse, grad[:, :56].bfloat16()),
        (terms, x_factored, shifted, inverse, grad),
        (terms, x_factored, weight, inverse, shifted),
        (terms, x_factored, weight.T.contiguous().T, inverse, grad),
        (terms, x_factored, weight[:, :60], inverse, grad[:, :60].contiguous()),
        (terms, wide, weight.repeat(1, 9)[:, :528], inverse, grad.repeat(1, 9)[:, :528].contiguous()),
    ):
        assert not backend._Kernels().grad_centres(*left)
    assert grad.isnan().all()


@pytest.mark.parametrize("entry", list(triton_configs.GRADIENT))
@pytest.mark.parametrize(
    ("rows", "classes", "width", "dtype"),
    [
        (1, 1, 32, torch.float32),
        (33, 65, 240, torch.float32),
        (65, 129, 512, torch.float32),
        (33, 65, 512, torch.float16),
        (32, 64, 256, torch.float32),
    ],
)
def test_the_gradient_tables_tiles(
    rows: int, classes: int, width: int, dtype: torch.dtype, entry: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tile that is used on a GPU, one element past it."""
    if DEVICE.type == "cuda" and entry != torch.cuda.get_device_capability()[0]:
        pytest.skip("another architecture's")
    monkeypatch.setattr(backend, "_gradient_config", lambda _: triton_configs.GRADIENT[entry])
    generator = torch.Generator().manual_seed(rows)
    terms = torch.rand(rows, classes + 15 & -16, generator=generator).bfloat16().to(DEVICE)[:, :classes]
    x_factored = torch.randn(rows, width, generator=generator).bfloat16().to(DEVICE)
    weight = torch.randn(classes, width, generator=generator).to(DEVICE, dtype)
    inverse, grad = 1 / weight.float().norm(dim=1), torch.full_like(weight, math.nan)
    assert backend._Kernels().grad_centres(terms, x_factored, weight, inverse, grad)
    exact = exact_gradient(terms, x_factored, weight, inverse)
    assert gradient_error(grad, exact) < (2e-6 if DEVICE.type == "cpu" else 1e-5)
