"""Verification over all pairs of a set of features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import inputs
from .counting import BINS, UNITS, Array
from .passes import AllPairs, alone
from .results import Curve, Result, at_threshold, percent, roc
from .search import Condition, Counts, Pass, Point, crossing, find, rank

ALL_KEPT = 1 << 22  # pairs of which every score is kept, so that no sample is drawn


@dataclass
class Verification(Result):
    """Rates over all pairs.

    Attributes:
        vr: by FAR, the share of genuine pairs that are accepted.
        threshold: by FAR, the cosine from which on pairs are accepted.
        genuine: number of pairs of the same person.
        impostors: number of pairs of different people.
        eer: the rate at which FAR = FRR, on the ROC with straight lines between its points.
        auc: area under the ROC, ties counted half.
        auc_error: how far ``auc`` may be off, as scores of one histogram bin are taken for ties; 0 for few million pairs.
    """

    vr: dict[float, float]
    threshold: dict[float, float]
    genuine: int
    impostors: int
    eer: float
    auc: float
    auc_error: float

    def rows(self) -> list[tuple[str, ...]]:
        rates = [(f"VR at FAR {far:g}", percent(rate), at_threshold(self.threshold[far])) for far, rate in self.vr.items()]
        area = "no rate" if math.isnan(self.auc) else f"{self.auc:.6f}"
        error = f"±{self.auc_error:.0e}" if self.auc_error > 0 else ""
        return [
            ("genuine pairs", f"{self.genuine:,}"), ("impostor pairs", f"{self.impostors:,}"), *rates,
            ("EER", percent(self.eer)), ("AUC", area, error),
        ]  # fmt: skip


def verification(features: Any, labels: Any, far: Any = (1e-3, 1e-4), *, progress: bool = False) -> Verification:
    """Verification rates over all pairs of features, each pair once, a sample never with itself.

    Scores are cosines, in float32 (float64 for float64). The threshold at a FAR is the k-th highest impostor score with
    k = round(FAR·impostors), and what equals it is accepted too, as in the LFW BLUFR protocol (Liao et al. 2014). Counts,
    rates, thresholds and the EER are exact, ``auc`` up to ``auc_error``. Cosines are made in tiles that are counted and
    forgotten: memory beyond the features' normalized copy does not grow with the number of pairs. Equal pairs may differ in
    the last bit of their cosine, which a library may round otherwise at another place of a product.

    Args:
        features: ``[N, D]`` float64, float32, float16 or bfloat16, a tensor on any device or an array; normalized inside.
        labels: ``[N]`` integers, one a person.
        far: false acceptance rates in (0, 1], one or several.
        progress: whether to show the time left on the standard error, if it takes long.

    Returns:
        A :class:`Verification`. A rate that too few pairs stand behind is NaN, and ``notes`` says why.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: shapes do not fit, a row of ``features`` is not finite, or a FAR is out of range.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import evaluation as ev
        >>> people = torch.arange(50).repeat_interleave(4)
        >>> features = torch.randn(50, 32)[people] + 0.5 * torch.randn(200, 32)
        >>> result = ev.verification(features, people, far=(1e-2, 1e-3))
        >>> result.genuine, result.impostors
        (300, 19600)
        >>> result.vr[1e-2] >= result.vr[1e-3]
        True
    """
    matrix = inputs.matrix("features", features)
    people = inputs.people("labels", labels, len(matrix))
    fars = inputs.rates("far", far)
    order = people.argsort(stable=True)
    rows = alone(matrix.device, lambda: inputs.unit_rows("features", matrix)[order.to(matrix.device)])
    sizes = torch.bincount(people).tolist()
    genuine = sum(size * (size - 1) // 2 for size in sizes)
    pairs = len(rows) * (len(rows) - 1) // 2
    total = Counts(pairs - genuine, genuine)
    scores = AllPairs(rows, people[order], progress)
    with inputs.exact_products(matrix.device):
        points, ends, counted = search(fars, [crossing(total)] if min(total) else [], scores, total)
    result = rates(fars, points, total)
    if ends:
        result.eer = equal_error_rate(ends[0], total)
        result.auc, result.auc_error = area(counted, total)
        result.curves.append(roc_curve(counted))
    elif genuine:
        result.notes.append("no EER and AUC: there are no impostor pairs")
    return result


def search(
    fars: tuple[float, ...], more: list[Condition], scores: Any, total: Counts
) -> tuple[dict[float, Point], list[Point], Pass]:
    """The point of each FAR for which there is one, those of other conditions, and the pass that has the histograms."""
    enough = [far for far in fars if inputs.too_few(far, total.impostors) is None]
    goals = {far: rank(inputs.accepted(far, total.impostors)) for far in enough}
    sample = None if sum(total) <= ALL_KEPT else scores.sample()
    points, counted = find([*goals.values(), *more], scores.scan, total, sample)
    return dict(zip(goals, points, strict=False)), points[len(goals) :], counted


def rates(fars: tuple[float, ...], points: dict[float, Point], total: Counts) -> Verification:
    """VR and threshold at each FAR; the rest is still NaN."""
    nan = math.nan
    result = Verification({}, {}, total.genuine, total.impostors, nan, nan, nan)
    for far in fars:
        point = points.get(far)
        result.threshold[far] = nan if point is None else point.score / UNITS
        result.vr[far] = nan if point is None or not total.genuine else point.at.genuine / total.genuine
        if point is None:
            result.notes.append(str(inputs.too_few(far, total.impostors)))
    if not total.genuine:
        result.notes.append("no rates: there are no genuine pairs")
    return result


def equal_error_rate(point: Point, total: Counts) -> float:
    """Between the ROC's point where FAR first reaches FRR and the one before."""
    before, after = ((far / total.impostors, 1 - true / total.genuine) for far, true in (point.above, point.at))
    excess = before[0] - before[1], after[0] - after[1]
    return before[0] + excess[0] / (excess[0] - excess[1]) * (after[0] - before[0])


def area(counted: Pass, total: Counts) -> tuple[float, float]:
    """AUC, and how far it may be off."""
    kept = [tally.inside[0].scores() if len(tally.inside) == 1 else None for tally in (counted.impostors, counted.genuine)]
    if kept[0] is not None and kept[1] is not None and (len(kept[0]), len(kept[1])) == tuple(total):
        impostors, genuine = np.sort(kept[0]), kept[1]
        below, upto = (np.searchsorted(impostors, genuine, side).sum() for side in ("left", "right"))
        return float(below + upto) / 2 / (total.impostors * total.genuine), 0.0
    impostors, genuine = histograms(counted)
    above = np.cumsum(genuine[::-1])[::-1] - genuine
    pairs = total.impostors * total.genuine
    ties = float(impostors.astype(np.float64) @ genuine)
    return (float(impostors.astype(np.float64) @ above) + ties / 2) / pairs, ties / 2 / pairs


def histograms(counted: Pass) -> tuple[Array, Array]:
    """Of impostors and genuine pairs, a count a bin."""
    found = []
    for tally in (counted.impostors, counted.genuine):
        assert tally.histogram is not None
        counts = tally.histogram.numpy().copy()
        counts[0] = 0  # NO_SCORE
        found.append(counts)
    assert len(found[0]) == BINS
    return found[0], found[1]


def roc_curve(counted: Pass) -> Curve:
    return Curve("ROC", "FAR", "TAR", *roc(*histograms(counted)))
