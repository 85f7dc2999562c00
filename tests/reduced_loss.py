"""Checks of a reduced loss on fused kernels, whoever wrote them, against plain PyTorch in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import Forward, Problem, chunking, fused, margin
from amsoftmax_kernels.backends.kernels import Kernels, RawLabels

from .cases import Case, relative


def check_the_margin_kernel(
    kernels: Kernels, reduction: str, normalize: bool, parts: int, compute_dtype: torch.dtype, device: torch.device
) -> None:
    """From a target that is everything to one that is nothing, a row ignored and one out of range; in ``parts``, if any."""
    repeats, D = 15, 20  # more rows than a program takes at a time
    z = torch.tensor([0.0, 1e-30, 1.0, 1e10, 1e38, 1.0, 1.0, 1e-20, 0.0]).repeat(repeats)
    cosine = torch.tensor([0.5, 1.0, 1.0, -1.0, -1.0, 0.2, 0.35, 0.99, 0.0]).repeat(repeats)
    shift = torch.tensor([0.0, 0.0, 0.0, 0.0, 1400.0, -20.0, 0.0, 0.0, 0.0]).repeat(repeats)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -1]).repeat(repeats)
    B = len(z)
    generator = torch.Generator().manual_seed(parts)
    features = torch.randn(B, D, generator=generator)
    features[-1] = math.nan  # of an ignored row
    norm = torch.linspace(1, 50, B)
    empty = torch.empty(0)

    def on(where: torch.device, dtype: torch.dtype) -> tuple[Problem, Forward, Tensor]:
        vectors = Forward(*(each.to(where, dtype) for each in (z, shift, cosine, norm, *[empty] * 6)))
        scale = torch.tensor(60.0, dtype=torch.float64)
        weight = torch.empty(9, D, device=where)
        problem = Problem(features.to(where), weight, labels.to(where), scale, normalize, compute_dtype, math.inf)
        return problem, vectors, torch.tensor(8 * repeats, device=where)

    expected = margin.constant_margin(*on(torch.device("cpu"), torch.float64), 0.35, reduction, True)
    problem, saved, count = on(device, torch.float32)
    shares = None
    if parts:
        shares = torch.rand(1, parts, B, generator=generator, dtype=torch.float64)
        shares = (shares / shares.sum(1) * z).to(device)
        saved.z.fill_(math.nan)
    loss = saved.z.new_full((B,) if reduction == "none" else (), math.nan)
    derivatives = saved.z.new_full((3, B), math.nan)
    x_factored = saved.z.new_full((B, chunking.padded(D)), math.nan, dtype=chunking.panel_dtype(compute_dtype))
    s = fused.scale_of(problem.scale, normalize)
    kernels.constant_margin(
        problem, saved, shares, count, s, 0.35, reduction, loss, derivatives, None if reduction == "none" else x_factored
    )
    for got, exact in zip((loss, derivatives), expected, strict=True):
        assert torch.allclose(got.cpu().double(), exact, rtol=1e-6, atol=1e-45)
    assert torch.allclose(saved.z.cpu(), z, rtol=1e-6, atol=0)
    if reduction == "none":
        return
    by_z = expected[1][0] * (60.0 if normalize else norm)
    exact = torch.where(labels[:, None] < 0, 0, features.double() / norm[:, None] * by_z[:, None])
    rows = exact.norm(dim=1)
    wrong = (x_factored[:, :D].cpu().double() - exact).norm(dim=1)
    assert (wrong <= rows * (2**-8 if compute_dtype.itemsize == 2 else 1e-3) + 1e-38).all()
    assert relative(x_factored[:, :D].cpu().double()[:3], exact[:3]) < 1e-2 and not x_factored[:, D:].any()

    # A label out of range: that row's loss is NaN, and so the reduced one.
    problem.labels[1] = 9
    kernels.constant_margin(problem, saved, shares, count, s, 0.35, reduction, loss, derivatives, x_factored)
    assert loss.isnan() and derivatives[0, 1].isnan() and not derivatives[0, 2:].isnan().any()


def check_labels_made_with_the_rows(kernels: Kernels, labels: Tensor, ignore_index: int, device: torch.device) -> None:
    """By the kernel that prepares the rows, as by the one for labels alone; and the rows as with labels that are there."""
    B, C, D = len(labels), 5, 20
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(rows, D, generator=generator).to(device) for rows in (B, C))
    scale = torch.tensor(30.0, dtype=torch.float64)
    ignored = labels == ignore_index
    expected = labels.long().masked_fill((labels < 0) | (labels >= C), C).masked_fill(ignored, -1)
    found = []
    for raw in (True, False):
        problem = Problem(features, weight, expected.to(device), scale, True, torch.float32, math.inf)
        num_rows = torch.full((), -7, device=device)
        given = RawLabels(labels.to(device), ignore_index, num_rows) if raw else None
        if raw:
            problem.labels.fill_(-7)
        vectors = [features.new_full((B,), math.nan) for _ in range(4)]
        x_hat, w_hat = (features.new_full((rows, 32), math.nan) for rows in (B, C))
        inverse_norm = features.new_full((C,), math.nan)
        kernels.prepare_rows(problem, given, 30.0, x_hat, *vectors, w_hat, inverse_norm)
        assert torch.equal(problem.labels.cpu(), expected)
        assert num_rows.item() == (max((~ignored).sum().item(), 1) if raw else -7)
        found.append((*vectors, x_hat, w_hat, inverse_norm))
    assert all(map(torch.equal, *found)) and not any(each.isnan().any() for each in found[0])


def curved(cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
    return cosine - 0.2 - 0.1 * cosine.square()


def check_a_reduced_loss(
    backend: str,
    needed: str,
    normalize: bool,
    save_bytes: int | None,
    tolerance: float,
    device: torch.device,
    constant: bool = True,
) -> None:
    """The gradients of one argument, or of all of them, twice from one graph, times an upstream gradient."""
    features, weight, labels, _ = Case("", "", B=24, C=70, D=20, own=0.7).tensors(torch.float32)
    labels[3], labels[5:9] = -100, labels[5]
    found = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        tensors = {"features": features, "weight": weight, "scale": torch.tensor(20.0)}
        tensors = {
            key: each.to(device, dtype, copy=True).requires_grad_(needed in (key, "all")) for key, each in tensors.items()
        }
        loss = ak.am_softmax_loss(
            tensors["features"], tensors["weight"], labels.to(device), scale=tensors["scale"], backend=name,
            normalize_features=normalize, save_bytes=save_bytes, margin=0.35 if constant else curved,
        )  # fmt: skip
        if loss.requires_grad:
            loss.backward(torch.full_like(loss, -3.0), retain_graph=True)
            (2 * loss).backward()
        found.append({key: each.grad for key, each in tensors.items()})
    for key, exact in found[1].items():
        got = found[0][key]
        if exact is None or not (normalize or key != "scale"):
            assert got is None or not got.any()
        else:
            assert got is not None and relative(got.double(), exact) < tolerance, key
