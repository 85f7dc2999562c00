"""Open-set identification: a probe of someone in the gallery must be found, one of someone else must raise no alarm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_size
from ..backends.products import product_nt
from . import inputs
from .counting import Array
from .pair_lists import kth_highest
from .results import Curve, Result, at_threshold, percent

_TILE = 1 << 22  # cosines at a time
_RANKS = 100  # that a curve shows


@dataclass
class OpenSet(Result):
    """Detection and identification at one FAR and rank.

    Attributes:
        dir: the share of genuine probes that are detected and identified.
        threshold: the cosine from which on a probe raises an alarm.
        far: the false alarm rate that was asked for.
        rank: up to which a probe's own person counts as identified.
        genuine: number of probes of people in the gallery.
        impostors: number of probes of others.
        gallery: number of samples in the gallery.
    """

    dir: float
    threshold: float
    far: float
    rank: int
    genuine: int
    impostors: int
    gallery: int

    def rows(self) -> list[tuple[str, ...]]:
        return [
            ("gallery", f"{self.gallery:,}"), ("genuine probes", f"{self.genuine:,}"),
            ("impostor probes", f"{self.impostors:,}"),
            (f"DIR at FAR {self.far:g}, rank {self.rank}", percent(self.dir), at_threshold(self.threshold)),
        ]  # fmt: skip


@dataclass
class ProbeScores:
    """What detection and identification need of each probe.

    Attributes:
        mate: ``[P]``, a genuine probe's largest cosine with its own person's samples in the gallery.
        rank: ``[P]``, 1 and the number of other people's samples whose cosine is at least that.
        alarm: ``[I]``, an impostor probe's largest cosine.
    """

    mate: Array
    rank: Array
    alarm: Array

    def threshold(self, far: float) -> float:
        return kth_highest(self.alarm, inputs.accepted(far, len(self.alarm)))

    def rate(self, far: float, rank: int) -> float:
        threshold = self.threshold(far)
        if math.isnan(threshold) or not len(self.mate):
            return math.nan
        return float(((self.mate >= threshold) & (self.rank <= rank)).mean())

    def why_not(self, far: float) -> list[str]:
        """Why there is no rate at a FAR."""
        reason = inputs.too_few(far, len(self.alarm), "impostor probes")
        return ([] if reason is None else [reason]) + ([] if len(self.mate) else ["no rate: there are no genuine probes"])


def open_set(
    gallery: Any, gallery_labels: Any, probes: Any, probe_labels: Any, impostors: Any, far: float = 1e-2, rank: int = 1
) -> OpenSet:
    """Detection and identification rate at a false alarm rate, as in the LFW BLUFR protocol (Liao et al. 2014).

    An impostor probe's score is its largest cosine over the gallery; the threshold is the k-th highest of these with
    k = round(FAR·impostors). A genuine probe counts if its cosine with its own person's nearest sample is at least the
    threshold, and fewer than ``rank`` samples of others are as near: a tie is lost.

    Args:
        gallery: ``[G, D]`` features, any floating-point dtype, a tensor on any device or an array; normalized inside.
        gallery_labels: ``[G]`` integers, one a person.
        probes: ``[P, D]``, of people in the gallery.
        probe_labels: ``[P]``, their labels.
        impostors: ``[I, D]``, of people who are not in the gallery.
        far: false alarm rate in (0, 1].
        rank: at least 1.

    Returns:
        An :class:`OpenSet`. With too few impostors ``dir`` is NaN, and ``notes`` says why.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: shapes do not fit, a feature is not finite, a number is out of range, or a probe's person is not in the
            gallery.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import evaluation as ev
        >>> people = torch.eye(4)
        >>> result = ev.open_set(people[:2], [0, 1], people[[0, 1, 1]], [0, 1, 0], people[2:], far=0.5)
        >>> round(result.dir, 3)
        0.667
    """
    known, known_labels = inputs.matrix("gallery", gallery), inputs.integers("gallery_labels", gallery_labels, len(gallery))
    dim = known.shape[1]
    seen, labels = inputs.matrix("probes", probes, dim), inputs.integers("probe_labels", probe_labels, len(probes))
    unknown = inputs.matrix("impostors", impostors, dim)
    (rate,) = inputs.rates("far", (far,))
    rank = check_size("rank", rank)
    if not len(known):
        raise ValueError("gallery must have at least one row, but it is empty")
    missing = np.setdiff1d(labels.numpy(), known_labels.numpy())
    if len(missing):
        raise ValueError(f"probe_labels must be of people in the gallery, but gallery_labels has no {missing[0]}")
    dtype = torch.float32
    for each in (known, seen, unknown):
        dtype = torch.promote_types(dtype, each.dtype)
    rows = [
        inputs.unit_rows(name, each.to(known.device), dtype=dtype)
        for name, each in (("gallery", known), ("probes", seen), ("impostors", unknown))
    ]
    scores = probe_scores(rows[0], known_labels, rows[1], labels, rows[2])
    result = OpenSet(
        scores.rate(rate, rank), scores.threshold(rate), rate, rank, len(seen), len(unknown), len(known),
        notes=scores.why_not(rate),
    )  # fmt: skip
    ranks = np.arange(1, min(len(known), _RANKS) + 1)
    if not result.notes:
        result.curves.append(Curve(f"DIR at FAR {rate:g}", "rank", "DIR", ranks, [scores.rate(rate, int(r)) for r in ranks]))
        result.curves.append(dir_curve(scores, rank))
    return result


def dir_curve(scores: ProbeScores, rank: int) -> Curve:
    """DIR at up to 200 false alarm rates."""
    k = np.unique(np.geomspace(1, len(scores.alarm), 200).round().astype(np.int64))
    alarms = np.sort(scores.alarm)[::-1][k - 1]
    mates = np.sort(scores.mate[scores.rank <= rank])
    rate = (len(mates) - np.searchsorted(mates, alarms, "left")) / len(scores.mate)
    return Curve(f"DIR at rank {rank}", "FAR", "DIR", k / len(scores.alarm), rate)


def probe_scores(gallery: Tensor, gallery_labels: Tensor, probes: Tensor, labels: Tensor, impostors: Tensor) -> ProbeScores:
    """Scores of unit rows on one device: some probes at a time with the whole gallery."""
    rows = max(_TILE // len(gallery), 1)
    mates, ranks, alarms = [], [], []
    of_gallery = gallery_labels.to(gallery.device)
    with inputs.exact_products(gallery.device):
        for part, people in zip(probes.split(rows), labels.split(rows), strict=True):
            if len(part):
                cosine = product_nt(part, gallery)
                own = people.to(gallery.device)[:, None] == of_gallery
                mate = cosine.masked_fill(~own, -math.inf).amax(1)
                ranks.append((1 + ((cosine >= mate[:, None]) & ~own).sum(1)).cpu())
                mates.append(mate.cpu())
        for part in impostors.split(rows):
            if len(part):
                alarms.append(product_nt(part, gallery).amax(1).cpu())
    empty = torch.empty(0)
    found = [torch.cat(each).numpy() if each else empty.numpy() for each in (mates, ranks, alarms)]
    return ProbeScores(*found)
