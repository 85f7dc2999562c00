"""Checks of the C++ kernels, emulated or on a GPU: from the very operands that each is given, and of whole steps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import Problem, chunking, cuda
from amsoftmax_kernels.backends.cuda import build
from amsoftmax_kernels.backends.kernels import Cosines, Rows

from .cases import Case, evaluate, relative

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16]
NVCC = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc on this machine")
CUTLASS = pytest.mark.skipif(build.find_cutlass() is None, reason=f"no CUTLASS headers: pip install {build.CUTLASS}")


def ours(dtype: torch.dtype, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 as where TF32 is allowed: there is nothing else to multiply float32 with."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return evaluate(ak.am_softmax_loss, *tensors, backend="cuda", **options)


def rounded_to_tf32(values: Tensor) -> Tensor:
    """Ten bits of fraction, to the nearest."""
    return ((values.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def check_the_cosine_kernel(
    B: int, N: int, width: int, dtype: torch.dtype, partial_sums: int | None, device: torch.device = CPU, rtol: float = 1e-5
) -> None:
    """Products, exponentials, sums, masks and maxima from the very operands it was given."""
    generator = torch.Generator().manual_seed(B + width)
    x_hat, w_hat = (torch.randn(n, width, generator=generator).mul_(width**-0.5).to(device, dtype) for n in (B, N))
    if dtype == torch.float32:
        x_hat, w_hat = (rounded_to_tf32(each) for each in (x_hat, w_hat))
    labels = torch.randint(1000, 1000 + 2 * N, (B,), generator=generator)  # half of them in this chunk
    factor, shift = torch.rand(B, generator=generator) * 40 + 1, torch.randn(B, generator=generator)
    labels, factor, shift = (each.to(device) for each in (labels, factor, shift))
    cosine = x_hat.double() @ w_hat.double().T
    target = labels[:, None] == torch.arange(1000, 1000 + N, device=device)
    kernels = cuda._Kernels()
    for with_shift, limit in itertools.product((True, False), (math.inf, 0.1)):
        weight = torch.empty(N, width, dtype=dtype, device=device)
        problem = Problem(x_hat, weight, labels, None, 30.0, True, dtype, limit)
        parts = (partial_sums or kernels.streams(problem, N), B)
        terms = x_hat.new_full((B, chunking.padded(N)), math.nan, dtype=chunking.panel_dtype(dtype))
        z, best = factor.new_full(parts, math.nan, dtype=torch.float64), factor.new_full(parts, math.nan)
        best_class = labels.new_full(parts, -7)
        rows = Rows(x_hat, factor, factor, factor, shift if with_shift else None)
        kernels.cosine_exp(problem, 1000, rows, w_hat, Cosines(terms, z, best, best_class))
        exponent = cosine * factor.double()[:, None] - (shift.double()[:, None] if with_shift else 0)
        expected = exponent.exp2().masked_fill(target | (cosine > limit), 0)
        assert not terms[:, N:].any()
        assert relative(terms[:, :N].double(), expected) < (rtol if dtype == torch.float32 else 2**-8)
        assert torch.allclose(z.sum(0), expected.sum(1), rtol=rtol, atol=1e-12)
        negatives = cosine.masked_fill(target, -math.inf)
        values, where = best.max(0)
        assert torch.allclose(values.double(), negatives.max(1).values, atol=1e-6)
        chosen = best_class.gather(0, where[None])[0]
        found = chosen >= 0
        assert torch.equal(found, values > -math.inf)
        at = negatives[found].gather(1, (chosen[found] - 1000)[:, None])[:, 0]
        assert torch.allclose(at, values[found].double(), atol=1e-6)
        # Nothing but the sums, and nothing but the maxima under the filter.
        alone = torch.full_like(z, math.nan)
        kernels.cosine_exp(problem, 1000, rows, w_hat, Cosines(z=alone))
        assert torch.equal(alone, z)
        maxima, rows = Cosines(best=best, best_class=best_class), rows._replace(shift=None)
        kernels.cosine_exp(problem, 1000, rows._replace(factor=factor * 100), w_hat, maxima)
        allowed = negatives.masked_fill(cosine > limit, -math.inf).max(1).values
        assert torch.allclose(best.max(0).values.double(), allowed, atol=1e-6)
        kernels.cosine_exp(problem, 1000, rows, w_hat, maxima)
        assert best.max() == -math.inf or (factor > 92.33).any()


def check(case: Case, actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """As near the exact result as half-precision operands allow: an error of 2^-11 in a cosine is one of s · 2^-11."""
    scale = case.options.get("scale", 30.0)
    smallest = min(each.norm(dim=1).min().item() for each in case.tensors(torch.float32)[:2])
    floor = scale / smallest * 1e-3 if case.degenerate else 1e-12
    for name, got, expected in zip(("loss", "features", "weight"), actual, exact, strict=True):
        error, size = (got.double() - expected).norm().item(), expected.norm().item()
        assert error <= 1e-2 * max(1.0, scale / 64) * size + floor, (name, error, size)


def check_the_gradient_kernel(B: int, N: int, D: int, dtype: torch.dtype, device: torch.device = CPU) -> None:
    """From the very operands it was given; and nothing is written beside the gradient."""
    generator = torch.Generator().manual_seed(B + N + D)
    width = -(-D // 16) * 16
    terms = torch.rand(B, -(-N // 16) * 16 + 16, generator=generator).to(device, torch.bfloat16)[:, 8 : 8 + N]
    x_factored = torch.randn(B, width, generator=generator)
    x_factored[:, D:] = 0
    x_factored = x_factored.to(device, torch.bfloat16)
    weight = torch.randn(N + 2, D + 16, generator=generator).to(device, dtype)[1 : N + 1, 8 : D + 8]
    inverse_norm = 1 / weight.float().norm(dim=1)
    whole = weight.new_full((N + 2, D + 16), 7)
    grad = whole[1 : N + 1, 8 : D + 8]
    done = cuda._Kernels().grad_centres(terms, x_factored, weight, inverse_norm, grad)
    assert done
    unit = weight.double() * inverse_norm.double()[:, None]
    product = (terms.double().T @ x_factored.double())[:, :D]
    along = (product * unit).sum(1, keepdim=True)
    expected = (product - along * unit) * inverse_norm.double()[:, None]
    rounding = {torch.float32: 1e-5 * max(1, B / 1024), torch.float16: 2**-10, torch.bfloat16: 2**-7}[
        dtype
    ]  # sums of B terms
    assert relative(grad.double(), expected) < rounding
    whole[1 : N + 1, 8 : D + 8] = 7
    assert (whole == 7).all()
