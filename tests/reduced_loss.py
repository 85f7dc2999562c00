"""Checks of a reduced loss on fused kernels, whoever wrote them, against plain PyTorch in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import Forward, Problem, fused, margin
from amsoftmax_kernels.backends.kernels import Kernels

from .cases import Case, relative


def check_the_margin_kernel(kernels: Kernels, normalize: bool, mean: bool, device: torch.device) -> None:
    """From a target that is everything to one that is nothing, rows ignored and one whose label is out of range."""
    repeats = 15  # more rows than a program takes at a time
    z = torch.tensor([0.0, 1e-30, 1.0, 1e10, 1e38, 1.0, 1.0, 1e-20, 0.0]).repeat(repeats)
    cosine = torch.tensor([0.5, 1.0, 1.0, -1.0, -1.0, 0.2, 0.35, 0.99, 0.0]).repeat(repeats)
    shift = torch.tensor([0.0, 0.0, 0.0, 0.0, 1400.0, -20.0, 0.0, 0.0, 0.0]).repeat(repeats)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -1]).repeat(repeats)
    norm = torch.linspace(1, 50, len(z))
    empty = torch.empty(0)

    def on(where: torch.device, dtype: torch.dtype) -> tuple[Problem, Forward]:
        vectors = Forward(*(each.to(where, dtype) for each in (z, shift, cosine, norm, *[empty] * 6)))
        weight, features = torch.empty(9, 20, device=where), torch.empty(len(z), 20, device=where)
        return Problem(features, weight, labels.to(where), None, 60.0, normalize, torch.float32, math.inf), vectors

    expected = margin.additive_margin(*on(torch.device("cpu"), torch.float64), 0.35, mean)
    problem, saved = on(device, torch.float32)
    halves = torch.stack([saved.z / 4, saved.z * 0.75]).double()[None]  # z's parts, of two streams
    saved = saved._replace(loss=torch.empty_like(saved.z), derivatives=saved.z.new_empty(3, len(z)))
    kernels.additive_margin(problem, halves, saved, fused.scale_of(problem), 0.35, mean)
    assert saved.loss is not None and saved.derivatives is not None
    found = saved.loss.clone(), saved.derivatives.clone()
    for got, exact in zip(found, expected, strict=True):
        assert torch.allclose(got.cpu().double(), exact, rtol=1e-6, atol=1e-45)
    assert relative(found[1][1], expected[1][1]) < 1e-6  # by t: no row's is lost beside a tolerance
    rows = margin.additive_margin(*on(torch.device("cpu"), torch.float64), 0.35, False)
    assert relative(expected[0] * (8 * repeats if mean else 1), rows[0]) < 1e-15  # of nine rows one is ignored

    problem.labels[1] = 9
    kernels.additive_margin(problem, halves, saved, fused.scale_of(problem), 0.35, mean)
    assert saved.loss[1].isnan() and saved.derivatives[:, 1].isnan().all()
    assert not saved.loss[2:].isnan().any() and not saved.derivatives[:, 2:].isnan().any()


def on_the_device(problem: Problem) -> float | Tensor:
    """In the place of ``fused.scale_of``: a scale whose value the host does not know."""
    if not problem.normalize_features:
        return 1.0
    scale = problem.fixed_scale if problem.scale is None else problem.scale.item()
    return torch.tensor(scale, device=problem.features.device)


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
