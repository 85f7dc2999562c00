"""The loss as it is computed elsewhere: one function each that makes a step, forward and backward, of given tensors."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

from amsoftmax_kernels import am_softmax_loss

SCALE, MARGIN = 30.0, 0.35

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # features [B, D], weight [C, D], labels [B]


@dataclass(frozen=True)
class Peer:
    """One way to compute the loss."""

    name: str
    make: Callable[[], Loss]
    # Bytes it is expected to need above inputs and gradients, for a problem of B, D, C in 4-byte elements.
    memory: Callable[[int, int, int], int]
    unavailable: Callable[[], str | None] = lambda: None
    margin: bool = True  # whether it computes the margin, and so must give the same loss
    # What a step is given instead of a problem's tensors, made once; None where it is those.
    given: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None


def eager(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Normalize, linear, take the margin off the target, cross-entropy."""
    cosine = linear(normalize(features), normalize(weight))
    margins = torch.full((len(labels), 1), -MARGIN, dtype=cosine.dtype, device=cosine.device)
    return cross_entropy(SCALE * cosine.scatter_add(1, labels[:, None], margins), labels)


def _ours(save_bytes: int | None) -> Callable[[], Loss]:
    return lambda: lambda x, w, y: am_softmax_loss(x, w, y, scale=SCALE, margin=MARGIN, save_bytes=save_bytes)


def compiled() -> Loss:
    torch._dynamo.reset()
    loss: Loss = torch.compile(eager)
    return loss


def _cosface() -> Loss:
    """Its centres are a parameter [D, C]: the weight's own storage is put there, its gradient read through a transpose."""
    from pytorch_metric_learning.losses import CosFaceLoss

    made: dict[torch.Size, torch.nn.Module] = {}

    def loss(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if weight.shape not in made:
            made.clear()
            made[weight.shape] = CosFaceLoss(1, weight.shape[1], margin=MARGIN, scale=SCALE)
            made[weight.shape].num_classes = weight.shape[0]  # type: ignore[assignment]
        module = made[weight.shape]
        del module._parameters["W"]
        module.W = weight.T
        try:
            value: Tensor = module(features, labels)
        finally:
            del module.W
            module.register_parameter("W", None)
        return value

    return loss


def _linear_cross_entropy(chunked: bool) -> Loss:
    """``chunked``: with its default options, which cut the batch and leave one row a chunk where C/D is near B or above.

    Its documentation calls that a win only for B ≥ D, so the plain path stands beside it.
    """
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def loss(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        x, w = SCALE * normalize(features), normalize(weight)
        if torch.is_autocast_enabled(x.device.type):  # the chunked operator does not cast by itself
            x, w = x.to(torch.bfloat16), w.to(torch.bfloat16)
        value: Tensor = torch.nn.functional.linear_cross_entropy(x, w, labels, options=options)
        return value

    return loss


def _without_compiler() -> str | None:
    return None if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"


def _without_cosface() -> str | None:
    return None if importlib.util.find_spec("pytorch_metric_learning") else "pytorch-metric-learning is not installed"


def _without_linear_cross_entropy() -> str | None:
    return None if hasattr(torch.nn.functional, "linear_cross_entropy") else "this PyTorch has none"


PEERS = [
    Peer("ours", _ours(None), lambda B, D, C: min(4 * B * C, 1 << 30)),
    Peer("ours, save_bytes=0", _ours(0), lambda B, D, C: 64 << 20),
    Peer("eager PyTorch", lambda: eager, lambda B, D, C: 4 * (5 * B * C + 2 * C * D)),
    Peer("torch.compile", compiled, lambda B, D, C: 4 * (4 * B * C + 2 * C * D), _without_compiler),
    Peer("CosFaceLoss", _cosface, lambda B, D, C: 4 * (8 * B * C + 3 * C * D), _without_cosface),
    Peer(
        "linear_cross_entropy",
        lambda: _linear_cross_entropy(chunked=True),
        lambda B, D, C: 4 * 4 * C * D,
        _without_linear_cross_entropy,
        margin=False,
    ),
    Peer(
        "the same, not chunked",
        lambda: _linear_cross_entropy(chunked=False),
        lambda B, D, C: 4 * (4 * B * C + 2 * C * D),
        _without_linear_cross_entropy,
        margin=False,
    ),
]


def step(loss: Loss, features: Tensor, weight: Tensor, labels: Tensor, *, autocast: bool = False) -> Tensor:
    """Forward, under bfloat16 autocast if asked, and backward from fresh gradients; the loss."""
    features.grad = weight.grad = None
    with torch.autocast(features.device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):  # as a graph wants
        value = loss(features, weight, labels)
    value.backward()
    return value.detach()


def problem(B: int, D: int, C: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random features [B, D] and centres [C, D], float32 leaves that require grad, and labels [B]."""
    generator = torch.Generator(device).manual_seed(seed)
    features = torch.randn(B, D, generator=generator, device=device).requires_grad_()
    weight = torch.randn(C, D, generator=generator, device=device).requires_grad_()
    return features, weight, torch.randint(C, (B,), generator=generator, device=device)
