"""A step of the centres, taken where their gradient is made: SGD or AdamW, on some classes at a time.

Each rule is that of ``torch.optim`` of its name. Chunks of classes are apart, so threads may apply them at once. A class
whose gradient is not finite is left as it is, its state too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from . import Problem, rounding, streams

ELEMENTS = 1 << 18  # that are updated at once: all of a rule's passes over them stay in a core's cache
_SHARED_ELEMENTS = 1 << 22  # that replicas add up at once


class SGD(NamedTuple):
    """``torch.optim.SGD``: state of one tensor, or of none without momentum."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    first: bool  # there is no velocity yet: it becomes the gradient, whatever the dampening

    def numbers(self) -> tuple[float, float, float, float, float, float]:
        """What a kernel takes: lr, decay, factors of old velocity and gradient, that of Nesterov's look ahead, and none."""
        momentum, undamped = (0.0, 1.0) if self.first else (self.momentum, 1 - self.dampening)
        return float(self.lr), float(self.weight_decay), momentum, undamped, float(self.momentum), 0.0

    def apply_(self, w: Tensor, grad: Tensor, *state: Tensor) -> None:
        """Overwrites all of them, ``[n, D]`` of one dtype."""
        if self.weight_decay:
            grad.add_(w, alpha=self.weight_decay)
        for velocity in state:
            if self.first:
                velocity.copy_(grad)
            elif self.dampening:
                velocity.mul_(self.momentum).add_(grad, alpha=1 - self.dampening)
            else:
                torch.add(grad, velocity, alpha=self.momentum, out=velocity)
            grad = grad.add_(velocity, alpha=self.momentum) if self.nesterov else velocity
        w.add_(grad, alpha=-self.lr)


class AdamW(NamedTuple):
    """``torch.optim.AdamW``: state of the two moments."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int  # 1 for the first

    def numbers(self) -> tuple[float, float, float, float, float, float]:
        """What a kernel takes: the step's length, what is left of w, the moments' rates, eps, the root's correction."""
        length, root = self.lr / (1 - self.beta1**self.step), (1 - self.beta2**self.step) ** -0.5
        return length, 1 - self.lr * self.weight_decay, 1 - self.beta1, 1 - self.beta2, self.eps, root

    def apply_(self, w: Tensor, grad: Tensor, mean: Tensor, square: Tensor) -> None:
        """Overwrites all of them, ``[n, D]`` of one dtype."""
        length, left, _, _, _, correction = self.numbers()
        if self.weight_decay:
            w.mul_(left)
        mean.lerp_(grad, 1 - self.beta1)
        square.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        root = torch.sqrt(square, out=grad).mul_(correction).add_(self.eps)
        w.addcdiv_(mean, root, value=-length)


@dataclass
class Tally:
    """What has become of an optimizer's updates."""

    begun: bool = False  # a class has had its step in the backward pass that is under way
    skipped: list[Tensor | int] = field(default_factory=list)  # numbers of classes that were left as they are

    def count(self, classes: Tensor) -> None:
        """Add some that were left; on a GPU in place, as the host does not read it."""
        if classes.device.type == "cpu":
            self.skipped.append(int(classes))
        elif self.skipped and isinstance(self.skipped[-1], Tensor):
            self.skipped[-1] += classes
        else:
            self.skipped.append(classes)

    def total(self) -> int:
        self.skipped = [sum(int(each) for each in self.skipped)]
        return int(self.skipped[0])


@dataclass(frozen=True)
class Update:
    """What a backward pass does with the gradient of its classes in the place of returning it."""

    rule: SGD | AdamW
    weight: Tensor  # [N, D] this rank's centres, to be written
    state: tuple[Tensor, ...]  # [N, D] each, to be written
    class_start: int = 0  # the class of the first of them
    rows: Tensor | None = None  # [C] int64: where the problem's classes are in weight and state; None: all in order
    seed: int | None = None  # of stochastic rounding; None rounds to the nearest
    step: int = 0  # that it depends on
    loss_scale: float = 1.0  # a GradScaler's factor, which is in every gradient
    blocks: Blocks | None = None  # gradients go through these first, and chunks come in order
    tally: Tally = field(default_factory=Tally)

    def keys(self) -> list[int]:
        """Of the random bits of weight and two tensors of state."""
        return [0 if self.seed is None else rounding.key(self.seed, self.step, i) for i in range(3)]

    def centres(self, start: int, count: int) -> Tensor:
        """The problem's centres from ``start`` on ``[count, D]``, as they are now."""
        places = slice(start, start + count)
        return self.weight[places] if self.rows is None else self.weight.index_select(0, self.rows[places])

    def unscaled(self, grad: Tensor) -> Tensor:
        """``grad`` without a GradScaler's factor."""
        return grad if self.loss_scale == 1 else grad / self.loss_scale

    def apply_(self, start: int, grad: Tensor) -> None:
        """One step of the problem's classes from ``start`` on, of gradient ``grad [n, D]``, which is overwritten."""
        for first, block in [(start, grad)] if self.blocks is None else self.blocks.of(start, grad):
            rows = _rows(grad.shape[1])
            for offset in range(0, len(block), rows):
                self._apply_some(first + offset, block[offset : offset + rows])

    def without_gradient_(self, num_classes: int, dtype: torch.dtype) -> None:
        """A step of all the problem's classes where the batch is empty: decay and momentum go on."""
        width = self.weight.shape[1]
        for first in range(0, num_classes, _rows(width)):
            count = min(_rows(width), num_classes - first)
            self.apply_(first, self.weight.new_zeros(count, width, dtype=dtype))

    def _apply_some(self, start: int, grad: Tensor) -> None:
        places = slice(start, start + len(grad))
        whole = [self.weight, *self.state]
        if self.rows is None:
            targets = [each[places] for each in whole]
            rooms = [each if each.dtype == grad.dtype else _room(f"update {i}", grad) for i, each in enumerate(targets)]
            values = [room if room is each else room.copy_(each) for room, each in zip(rooms, targets, strict=True)]
        else:
            targets = whole
            values = [each.index_select(0, self.rows[places]).to(grad.dtype) for each in whole]
        keep = _not_finite(grad)
        before = None if keep is None else [each.clone() for each in values]
        self.tally.begun = True
        self.rule.apply_(values[0], grad, *values[1:])
        if keep is not None and before is not None:
            self.tally.count(keep.sum())
            for value, old in zip(values, before, strict=True):
                value.copy_(torch.where(keep[:, None], old, value))
        for i, (target, value) in enumerate(zip(targets, values, strict=True)):
            if value is not target:
                self._store(i, places, target, value)

    def _store(self, number: int, places: slice, target: Tensor, value: Tensor) -> None:
        """The step's ``number``-th tensor at ``places``, rounded as it is to be."""
        if self.seed is not None and target.dtype == torch.bfloat16:
            where = torch.arange(places.start, places.stop, device=value.device) if self.rows is None else self.rows[places]
            rounded = torch.empty_like(value, dtype=torch.bfloat16) if self.rows is not None else target
            rounding.round_(rounded, value.float(), where + self.class_start, rounding.key(self.seed, self.step, number))
            value = rounded
        if self.rows is not None:
            target.index_copy_(0, self.rows[places], value.to(target.dtype))
        elif value is not target:
            target.copy_(value)


class Blocks:
    """Gradients of classes in order, added up over replicas so many classes at a time, whatever the replicas' chunks are."""

    def __init__(self, num_classes: int, width: int, add_up: Callable[[Tensor], Tensor]) -> None:
        self._num_classes, self._rows, self._add_up = num_classes, max(_SHARED_ELEMENTS // max(width, 1), 1), add_up
        self._block: Tensor | None = None

    def of(self, start: int, grad: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The blocks that ``grad [n, D]`` of the classes from ``start`` on completes, with their first classes."""
        while len(grad):
            first = start // self._rows * self._rows
            size, begin = min(self._rows, self._num_classes - first), start - first
            if self._block is None:
                self._block = grad.new_empty(size, grad.shape[1])
            part = grad[: size - begin]
            self._block[begin : begin + len(part)] = part
            start, grad = start + len(part), grad[len(part) :]
            if begin + len(part) == size:
                block, self._block = self._block, None
                self._add_up(block)
                yield first, block


def _rows(width: int) -> int:
    """Classes that are updated at once."""
    return max(ELEMENTS // max(width, 1), 1)


def _not_finite(grad: Tensor) -> Tensor | None:
    """Which rows are not ``[n]``; None if all are, which on a GPU the host does not know."""
    if grad.device.type == "cpu" and math.isfinite(grad.sum().item()):
        return None
    return ~grad.isfinite().all(1)


def _room(name: str, like: Tensor) -> Tensor:
    """Memory as large as ``like``, which on a CPU the thread keeps."""
    return streams.workspace(name, tuple(like.shape), like) if like.device.type == "cpu" else torch.empty_like(like)


def own_centres(problem: Problem) -> tuple[Problem, Tensor]:
    """The problem with the batch's own centres alone, and for each class which of those it is ``[C]`` int32, -1 for none.

    Rows of one class share the centre of the first of them; as in the problem, labels past the centres are of no class here.
    """
    labels, (B, C) = problem.labels, (len(problem.labels), problem.weight.shape[0])
    ordered, order = labels.sort(stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    places = torch.arange(B, device=labels.device)
    first = order[torch.where(begins, places, 0).cummax(0).values]
    slots = torch.empty_like(labels).scatter_(0, order, first)
    present = (labels >= 0) & (labels < C)
    of_class = labels.new_full((C + 1,), -1, dtype=torch.int32)
    of_class.scatter_(0, torch.where(present, labels, C), slots.to(torch.int32))
    own = problem.weight.index_select(0, labels.clamp(0, C - 1))
    return problem._replace(weight=own, labels=torch.where(present, slots, torch.where(labels < 0, -1, B))), of_class[:C]
