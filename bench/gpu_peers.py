"""What is compared on a GPU: our backends, and the same step as others compute it."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

import amsoftmax_kernels as ak

from .peers import MARGIN, SCALE, Loss, Peer, _compiled, eager


def partial_fc(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The algorithm of InsightFace's PartialFC at sample rate 1 on one rank, written from its published description.

    Normalize both, product in float16, cast to float32, clamp to a cosine's range, margin and scale in place, then the
    softmax of the distributed cross-entropy with the logits' memory reused for probabilities and gradient.
    """
    with torch.autocast(features.device.type, torch.float16 if features.is_cuda else torch.bfloat16):
        cosine = linear(normalize(features), normalize(weight))
    with torch.autocast(features.device.type, enabled=False):
        logits = cosine.float().clamp(-1, 1)
        rows = torch.arange(len(labels), device=labels.device)
        logits[rows, labels] = logits[rows, labels] - MARGIN
        logits *= SCALE
        return _InPlaceSoftmaxLoss.apply(logits, labels)  # type: ignore[no-any-return, no-untyped-call]


class _InPlaceSoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits.sub_(logits.amax(1, keepdim=True)).exp_()
        logits.div_(logits.sum(1, keepdim=True))
        ctx.probabilities, ctx.labels = logits, labels
        return -logits.gather(1, labels[:, None]).clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        probabilities, rows = ctx.probabilities, torch.arange(len(ctx.labels), device=ctx.labels.device)
        probabilities[rows, ctx.labels] -= 1
        return probabilities.mul_(grad / len(rows)), None


def _ours(backend: str, save_bytes: int) -> Loss:
    return lambda x, w, y: ak.am_softmax_loss(
        x, w, y, scale=SCALE, margin=MARGIN, backend=backend, save_bytes=save_bytes
    )  # fmt: skip


def _prepared(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (SCALE * normalize(features)).bfloat16(), normalize(weight).bfloat16()


def _cce() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = linear_cross_entropy(*_prepared(features, weight), labels)
        return value

    return loss


def _liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss()

    def loss(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        x, w = _prepared(features, weight)
        value: Tensor = module(w, x, labels)
        return value

    return loss


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = chunked_linear_cross_entropy(*_prepared(features, weight), labels)
        return value.mean()

    return loss


def _without(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def peers() -> list[Peer]:
    """Every way to make the step that is to be timed; ours first."""
    found = []
    for name in ak.available_backends():
        if name != "reference":
            kept, recomputed = functools.partial(_ours, name, 1 << 62), functools.partial(_ours, name, 0)
            found.append(Peer(f"{name}, E kept", kept, lambda B, D, C: 2 * B * C))
            found.append(Peer(f"{name}, recomputed", recomputed, lambda B, D, C: 1 << 30))
    return [
        *found,
        Peer("eager PyTorch", lambda: eager, lambda B, D, C: 14 * B * C + 12 * C * D),
        Peer("torch.compile", _compiled, lambda B, D, C: 10 * B * C + 8 * C * D),
        Peer("PartialFC algorithm", lambda: partial_fc, lambda B, D, C: 12 * B * C + 12 * C * D),
        Peer("CCE", _cce, lambda B, D, C: 8 * C * D, lambda: _without("cut_cross_entropy"), margin=False),
        Peer("Liger", _liger, lambda B, D, C: 12 * C * D, lambda: _without("liger_kernel"), margin=False),
        Peer("quack", _quack, lambda B, D, C: 12 * C * D, lambda: _without("quack"), margin=False),
    ]
