"""What is compared: each arm is a loss with its hyper-parameters, which were chosen the same way for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from amsoftmax_kernels import AMSoftmaxLoss
from amsoftmax_kernels.margins import AngularMargin, AnnealedAdditiveMargin, SphereFaceMargin

from .heads import CentreLoss, LSoftmaxLoss, SoftmaxLoss

MARGINS = (0.25, 0.30, 0.35, 0.40, 0.45, 0.50)
BASELINES = ("softmax", "am-softmax-0.35")  # every arm's paired differences are to these
WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class Arm:
    """A loss by its name in HEADS, with what that takes, and how its network and centres are trained."""

    name: str
    loss: str
    learning_rate: float
    options: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = WEIGHT_DECAY
    centres: str = "float32"  # or "bfloat16": updated by FusedSGD with stochastic rounding


def _softmax(dim: int, classes: int, steps: int) -> nn.Module:
    return SoftmaxLoss(dim, classes)


def _l_softmax(dim: int, classes: int, steps: int, m: int, minimum: float) -> nn.Module:
    # λ of the authors' CIFAR-10 training, whose 30,000 iterations are ours; for harder data they advise a minimum.
    margin = SphereFaceMargin(m, base=1000.0, gamma=2e-5 * 30_000 / steps, power=45.0, minimum=minimum)
    return LSoftmaxLoss(dim, classes, margin)


def _a_softmax(dim: int, classes: int, steps: int, m: int) -> nn.Module:
    # λ of the authors' training on CASIA, whose 28,000 iterations are ours.
    margin = SphereFaceMargin(m, base=1000.0, gamma=0.12 * 28_000 / steps, power=1.0, minimum=5.0)
    return AMSoftmaxLoss(dim, classes, margin=margin, normalize_features=False)


def _normface(dim: int, classes: int, steps: int, scale: float) -> nn.Module:
    return AMSoftmaxLoss(dim, classes, scale=nn.Parameter(torch.tensor(scale)), margin=0.0)


def _centre_loss(dim: int, classes: int, steps: int, weight: float) -> nn.Module:
    return CentreLoss(dim, classes, weight)


def _arcface(dim: int, classes: int, steps: int, scale: float, margin: float) -> nn.Module:
    return AMSoftmaxLoss(dim, classes, scale=scale, margin=AngularMargin(margin))


def _am_softmax_no_fn(dim: int, classes: int, steps: int, margin: float) -> nn.Module:
    # The authors' margin grows over the first 8,000 of their 30,000 iterations.
    annealed = AnnealedAdditiveMargin(0.0, margin, margin / max(1, round(steps * 8 / 30)))
    return AMSoftmaxLoss(dim, classes, margin=annealed, normalize_features=False)


def _am_softmax(dim: int, classes: int, steps: int, scale: float, margin: float, **rest: Any) -> nn.Module:
    return AMSoftmaxLoss(dim, classes, scale=scale, margin=margin, **rest)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "softmax": _softmax,
    "l-softmax": _l_softmax,
    "a-softmax": _a_softmax,
    "normface": _normface,
    "centre-loss": _centre_loss,
    "arcface": _arcface,
    "am-softmax-no-fn": _am_softmax_no_fn,
    "am-softmax": _am_softmax,
}

# Nine settings of each loss: three learning rates by three values of its own parameter.
LEARNING_RATES = (0.025, 0.05, 0.1)
GRIDS: dict[str, tuple[dict[str, Any], ...]] = {
    "softmax": tuple({"weight_decay": value} for value in (2e-4, 5e-4, 2e-3)),  # it has none of its own
    "l-softmax": ({"m": 2, "minimum": 0.0}, {"m": 2, "minimum": 5.0}, {"m": 4, "minimum": 5.0}),
    "a-softmax": tuple({"m": value} for value in (2, 3, 4)),
    "normface": tuple({"scale": value} for value in (5.0, 10.0, 20.0)),
    "centre-loss": tuple({"weight": value} for value in (0.001, 0.008, 0.05)),
    "arcface": tuple({"scale": value, "margin": 0.5} for value in (10.0, 15.0, 30.0)),
    "am-softmax-no-fn": tuple({"margin": value} for value in (0.2, 0.3, 0.4)),
    "am-softmax": tuple({"scale": value, "margin": 0.35} for value in (10.0, 15.0, 30.0)),
}


def candidates() -> list[Arm]:
    """All that `--tune` tries."""
    return [
        _arm(f"{loss} lr={rate:g} " + " ".join(f"{k}={v:g}" for k, v in own.items()), loss, rate, own)
        for loss, grid in GRIDS.items()
        for rate, own in itertools.product(LEARNING_RATES, grid)
    ]


def _arm(name: str, loss: str, learning_rate: float, own: dict[str, Any], **rest: Any) -> Arm:
    options = {key: value for key, value in own.items() if key != "weight_decay"}
    return Arm(name, loss, learning_rate, options, own.get("weight_decay", WEIGHT_DECAY), **rest)


# What `--tune` chose: the learning rate and the loss's own parameter.
CHOSEN: dict[str, tuple[float, dict[str, Any]]] = {
    "softmax": (0.05, {"weight_decay": 2e-4}),
    "l-softmax": (0.05, {"m": 4, "minimum": 5.0}),
    "a-softmax": (0.05, {"m": 2}),
    "normface": (0.05, {"scale": 5.0}),
    "centre-loss": (0.1, {"weight": 0.05}),
    "arcface": (0.05, {"scale": 15.0, "margin": 0.5}),
    "am-softmax-no-fn": (0.1, {"margin": 0.3}),
    "am-softmax": (0.025, {"scale": 15.0, "margin": 0.35}),
}


def arms() -> list[Arm]:
    """All arms of the full run. The margins of AM-Softmax share what was chosen at 0.35."""
    return list(_arms())


def _arms() -> Iterator[Arm]:
    for loss, (rate, own) in CHOSEN.items():
        if loss != "am-softmax":
            yield _arm(loss, loss, rate, own)
    rate, own = CHOSEN["am-softmax"]
    for margin in MARGINS:
        yield _arm(f"am-softmax-{margin:.2f}", "am-softmax", rate, own | {"margin": margin})
    yield _arm("am-softmax-0.35-bfloat16", "am-softmax", rate, own, centres="bfloat16")
    yield _arm("am-softmax-0.35-subcentres", "am-softmax", rate, own | {"subcentres": 3})


QUICK = ("softmax", "am-softmax-0.35")


def by_name(names: list[str]) -> list[Arm]:
    """These arms, in the order of the full run.

    Raises:
        ValueError: there is none of a name.
    """
    known = {arm.name: arm for arm in arms()}
    for name in names:
        if name not in known:
            raise ValueError(f"--arms: there is no {name!r}, but {', '.join(known)}")
    return [arm for name, arm in known.items() if name in names]


def make_head(arm: Arm, embedding_dim: int, num_classes: int, steps: int) -> nn.Module:
    """The arm's head for a training of ``steps``."""
    head = HEADS[arm.loss](embedding_dim, num_classes, steps, **arm.options)
    return head.to(torch.bfloat16) if arm.centres == "bfloat16" else head


def step_margin(head: nn.Module) -> None:
    """Count a training step of a margin that is annealed."""
    step = getattr(getattr(head, "margin", None), "step", None)
    if step is not None:
        step()
