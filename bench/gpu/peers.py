"""What is compared on a GPU: our backends, and the same step as others compute it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

import amsoftmax_kernels as ak

from ..loss.peers import MARGIN, SCALE, Loss, Peer, compiled, eager

HALF_CENTRES = "bfloat16 centres"


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


def normalized(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s·x̂ and ŵ in bfloat16 as a linear cross-entropy takes them, as part of the step."""
    return (SCALE * normalize(features)).bfloat16(), normalize(weight).bfloat16(), labels


def pre_normalized(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same as leaves: neither they nor their gradients' way through the normalization is part of the step."""
    with torch.no_grad():
        x, w, _ = normalized(features, weight, labels)
    return x.requires_grad_(), w.requires_grad_(), labels


def half_centres(features: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centres in bfloat16, as linear cross-entropies take theirs, and so their gradient."""
    return features, weight.detach().bfloat16().requires_grad_(), labels


def _of_half_centres(B: int, D: int, C: int) -> int:
    """E, less what centres and their gradient are smaller; but they are made of float32 ones first."""
    return max(2 * B * C - 4 * C * D, -2 * C * D)


def _cce() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, w, labels: linear_cross_entropy(x, w, labels)


def _cce_whole() -> Loss:
    """Without its filter, which leaves small gradients out: of many classes nearly all."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, w, labels: linear_cross_entropy(x, w, labels, filter_eps=None)


def _liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss()
    return lambda x, w, labels: module(w, x, labels)


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, w, labels: chunked_linear_cross_entropy(x, w, labels).mean()


def _whole(make: Callable[[], Loss]) -> Callable[[], Loss]:
    """With the normalization, as a margin-softmax head needs it."""

    def whole() -> Loss:
        loss = make()
        return lambda *tensors: loss(*normalized(*tensors))

    return whole


def _linear_cross_entropies() -> list[Peer]:
    """Libraries without a margin: their step alone, given what it takes, and with the normalization."""
    found = []
    for name, make, package, memory in (
        ("CCE", _cce, "cut_cross_entropy", 8),
        ("CCE, all of it", _cce_whole, "cut_cross_entropy", 8),
        ("Liger", _liger, "liger_kernel", 12),
        ("quack", _quack, "quack", 12),
    ):
        needed, missing = functools.partial(_times_centres, memory), functools.partial(_without, package)
        found.append(Peer(f"{name}, pre-normalized", make, needed, missing, False, pre_normalized))
        found.append(Peer(name, _whole(make), needed, missing, False))
    return found


def _times_centres(factor: int, B: int, D: int, C: int) -> int:
    return factor * C * D


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
            found.append(Peer(f"{name}, {HALF_CENTRES}", kept, _of_half_centres, given=half_centres))
    return [
        *found,
        Peer("eager PyTorch", lambda: eager, lambda B, D, C: 14 * B * C + 12 * C * D),
        Peer("torch.compile", compiled, lambda B, D, C: 10 * B * C + 8 * C * D),
        Peer("PartialFC algorithm", lambda: partial_fc, lambda B, D, C: 12 * B * C + 12 * C * D),
        *_linear_cross_entropies(),
    ]
