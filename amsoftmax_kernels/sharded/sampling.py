"""Sampled negatives (PartialFC, An et al. 2021): which of a shard's classes a step computes with.

Every class of the batch is kept and the rest is a stratified sample of the others: the classes that are not in the batch,
put in a circle and turned by a random angle, are cut into as many stretches of equal length as there are draws, and each
stretch gives one class at random. So every one of them is equally likely (exactly: the number of draws over their number),
none is drawn twice, and nothing is sorted but the batch's labels. The random numbers are a hash of a seed, a step and a
position: the same on every device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..hashing import random_numbers


class Draw(NamedTuple):
    """The classes of a step."""

    classes: Tensor  # [n] int64, distinct: the batch's own first, in order
    labels: Tensor  # [B] int64: where in ``classes`` each row's target is; n where it is not on this shard, -1 if ignored
    certain: int  # so many of ``classes``, from the first on, stand for themselves alone
    weight: float  # how many classes each of the others stands for


def draw_size(rate: float, num_classes: int, batch: int, corrected: bool = False) -> int:
    """How many of ``num_classes`` to draw: the rate's share, and at least one beside every class that a batch may have.

    If ``corrected``, the rate's share beside those: that of few others would weigh too much.
    """
    own = min(batch, num_classes)
    if corrected:
        return own + math.ceil(rate * (num_classes - own))
    return min(num_classes, max(math.ceil(rate * num_classes), own + 1))


def draw_classes(labels: Tensor, num_classes: int, size: int, seed: Tensor, step: Tensor) -> Draw:
    """Draw ``size`` (of :func:`draw_size`, less than ``num_classes``) classes of a shard without synchronizing.

    ``labels [B]`` are local: ``num_classes`` where the target is elsewhere, -1 where ignored. ``seed`` and ``step`` are 0-d
    int64 tensors on their device. :attr:`Draw.weight` makes the weighted sum over the drawn classes an unbiased estimate of
    the sum over all: with P classes in the batch, the K − P first draws (K = min(B, num_classes), known to the host) count
    for themselves like the batch's own, and the others, size − K of num_classes − K, for the rest.
    """
    device, certain = labels.device, min(len(labels), num_classes)
    ordered = labels.masked_fill(labels < 0, num_classes).sort().values
    first = ordered < num_classes
    first[1:] &= ordered[1:] != ordered[:-1]
    slots = (first.cumsum(0) - 1).masked_fill_(~first, certain)
    present = torch.full((certain + 1,), 2 * num_classes, device=device)
    present = present.scatter_(0, slots, ordered)[:certain]  # the batch's classes in order, then what is none
    count = first.sum()

    index = torch.arange(size, device=device)
    stretch = (index - count).clamp_(min=0)
    draws, others = (size - count).clamp_(min=1), (num_classes - count).clamp_(min=1)
    low = torch.div(stretch * others, draws, rounding_mode="floor")
    high = torch.div((stretch + 1) * others, draws, rounding_mode="floor")
    random = random_numbers(torch.arange(-1, size, device=device), seed, step)
    drawn = (low + random[1:] % (high - low).clamp_(min=1) + random[0] % others) % others
    # From the n-th class that is not in the batch to its number: skip those of the batch that come before it.
    skipped = present - torch.minimum(torch.arange(certain, device=device), count)
    before = torch.searchsorted(skipped, drawn, right=True)
    own = present[index.clamp(max=certain - 1)] if certain else drawn
    classes = torch.where(index < count, own, drawn + before)
    here = (labels >= 0) & (labels < num_classes)
    where = torch.searchsorted(present, labels.clamp(min=0)).masked_fill_(~here, size).masked_fill_(labels < 0, -1)
    return Draw(classes, where, certain, (num_classes - certain) / (size - certain))
