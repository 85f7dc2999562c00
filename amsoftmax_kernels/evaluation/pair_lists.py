"""Verification on pairs that a protocol lists: LFW's ten folds, IJB's templates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..arguments import check_size
from . import inputs
from .counting import Array
from .results import Curve, Result, at_threshold, percent

_THRESHOLDS = np.arange(0, 4, 0.01)  # of squared distances, which InsightFace's verification tries
_CHUNK = 1 << 14  # pairs at a time


@dataclass
class Pairs(Result):
    """Rates over listed pairs.

    Attributes:
        accuracy: mean over the folds of the share of pairs that are judged right.
        std: standard deviation over the folds, of the population as NumPy's and InsightFace's is.
        tar: by FAR, the share of genuine pairs that are accepted.
        threshold: by FAR, the cosine from which on pairs are accepted.
        genuine: number of pairs of the same person.
        impostors: number of pairs of different people.
    """

    accuracy: float
    std: float
    tar: dict[float, float]
    threshold: dict[float, float]
    genuine: int
    impostors: int

    def rows(self) -> list[tuple[str, ...]]:
        rates = [(f"TAR at FAR {far:g}", percent(rate), at_threshold(self.threshold[far])) for far, rate in self.tar.items()]
        return [
            ("genuine pairs", f"{self.genuine:,}"), ("impostor pairs", f"{self.impostors:,}"),
            ("accuracy", f"{100 * self.accuracy:.3f}% ±{100 * self.std:.3f}"), *rates,
        ]  # fmt: skip


@dataclass
class TemplatePairs(Result):
    """Rates over pairs of templates.

    Attributes:
        tar: by FAR, the share of genuine pairs that are accepted.
        threshold: by FAR, the cosine from which on pairs are accepted.
        genuine: number of pairs of the same person.
        impostors: number of pairs of different people.
    """

    tar: dict[float, float]
    threshold: dict[float, float]
    genuine: int
    impostors: int

    def rows(self) -> list[tuple[str, ...]]:
        rates = [(f"TAR at FAR {far:g}", percent(rate), at_threshold(self.threshold[far])) for far, rate in self.tar.items()]
        return [("genuine pairs", f"{self.genuine:,}"), ("impostor pairs", f"{self.impostors:,}"), *rates]


def pairs(first: Any, second: Any, same: Any, folds: int = 10, far: Any = (1e-3,)) -> Pairs:
    """Verification accuracy by cross-validation over listed pairs: LFW's protocol, as InsightFace scores it.

    Each fold is judged with the threshold that is best on the others: of the squared distances 0, 0.01 … 3.99 of unit
    features the first with the highest accuracy, below which a pair counts as the same person's. Folds are consecutive
    pairs; if they cannot be of one size, the first ones have one more. ``tar`` is over all pairs, and its threshold the k-th
    highest impostor cosine, as in :func:`verification`.

    Args:
        first: ``[P, D]`` features, any floating-point dtype, tensor or array; normalized inside.
        second: ``[P, D]``, those to compare them with.
        same: ``[P]`` bools, whether a pair is of one person.
        folds: at least 2, at most P.
        far: false acceptance rates in (0, 1], one or several.

    Returns:
        A :class:`Pairs`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: shapes do not fit, a feature is not finite, or a number is out of range.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import evaluation as ev
        >>> first = torch.eye(20)
        >>> second = torch.cat([first[:10], -first[10:]])
        >>> order = torch.randperm(20)
        >>> result = ev.pairs(first[order], second[order], order < 10, folds=2, far=0.1)
        >>> result.accuracy, result.std
        (1.0, 0.0)
    """
    left = inputs.matrix("first", first)
    right = inputs.matrix("second", second, left.shape[1])
    if len(right) != len(left):
        raise ValueError(f"second must have the {len(left)} rows of first, but it has {len(right)}")
    genuine = inputs.flags("same", same, len(left)).numpy()
    folds = check_size("folds", folds)
    if not 2 <= folds <= len(left):
        raise ValueError(f"folds must be from 2 to the number of pairs, {len(left)}, but it is {folds}")
    fars = inputs.rates("far", far)
    dtype = torch.promote_types(torch.float32, torch.promote_types(left.dtype, right.dtype))
    one = inputs.unit_rows("first", left, dtype=dtype)
    two = inputs.unit_rows("second", right.to(left.device), dtype=dtype)
    distance = (one - two).square().sum(1).cpu().numpy()
    accuracies = _accuracies(distance, genuine, folds)
    scores = (one * two).sum(1).cpu().numpy()
    tar, threshold, notes = _rates(scores[genuine], scores[~genuine], fars)
    return Pairs(
        float(accuracies.mean()), float(accuracies.std()), tar, threshold, int(genuine.sum()), int((~genuine).sum()),
        notes=notes, curves=_curves(scores[genuine], scores[~genuine]),
    )  # fmt: skip


def _accuracies(distance: Array, genuine: Array, folds: int) -> Array:
    """Of each fold, with the threshold that is best on the others."""
    parts = np.array_split(np.arange(len(distance)), folds)
    judged = distance < _THRESHOLDS[:, None]
    right = np.array([(judged[:, part] == genuine[part]).sum(1) for part in parts])
    total = right.sum(0)
    best = [int(np.argmax(total - mine)) for mine in right]
    return np.array([right[fold, at] / len(part) for fold, (at, part) in enumerate(zip(best, parts, strict=True))])


def template_pairs(
    templates: Any, first: Any, second: Any, same: Any, far: Any = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
) -> TemplatePairs:
    """Verification over listed pairs of templates, as in the IJB benchmarks' 1:1 protocol (Maze et al. 2018).

    A template is one feature for several images of a person. The threshold at a FAR is the k-th highest impostor score with
    k = round(FAR·impostors), and what equals it is accepted too. Memory beyond the inputs is a score a pair.

    Args:
        templates: ``[T, D]`` features, any floating-point dtype, a tensor on any device or an array; normalized inside.
        first: ``[P]`` integers, rows of ``templates``.
        second: ``[P]``, those to compare them with.
        same: ``[P]`` bools, whether a pair is of one person.
        far: false acceptance rates in (0, 1], one or several.

    Returns:
        A :class:`TemplatePairs`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: shapes do not fit, an index is out of range, a template is not finite, or a FAR is out of range.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import evaluation as ev
        >>> result = ev.template_pairs(torch.eye(3)[[0, 0, 1, 2]], [0, 0, 1], [1, 2, 3], [True, False, False], far=0.5)
        >>> result.tar
        {0.5: 1.0}
    """
    matrix = inputs.matrix("templates", templates)
    left = inputs.integers("first", first, len(inputs.tensor("first", first)), len(matrix))
    right = inputs.integers("second", second, len(left), len(matrix))
    genuine = inputs.flags("same", same, len(left)).numpy()
    fars = inputs.rates("far", far)
    rows = inputs.unit_rows("templates", matrix)
    scores = np.empty(len(left), np.float64 if rows.dtype == torch.float64 else np.float32)
    for start in range(0, len(left), _CHUNK):
        part = slice(start, start + _CHUNK)
        one, two = (rows[each[part].to(rows.device)] for each in (left, right))
        scores[part] = (one * two).sum(1).cpu().numpy()
    tar, threshold, notes = _rates(scores[genuine], scores[~genuine], fars)
    return TemplatePairs(
        tar, threshold, int(genuine.sum()), int((~genuine).sum()),
        notes=notes, curves=_curves(scores[genuine], scores[~genuine]),
    )  # fmt: skip


_ByFar = dict[float, float]


def _rates(genuine: Array, impostors: Array, fars: tuple[float, ...]) -> tuple[_ByFar, _ByFar, list[str]]:
    """TAR and threshold at each FAR, and why one is NaN."""
    tar: _ByFar = {}
    threshold: _ByFar = {}
    notes: list[str] = []
    for far in fars:
        threshold[far] = kth_highest(impostors, inputs.accepted(far, len(impostors)))
        tar[far] = float((genuine >= threshold[far]).mean()) if len(genuine) and not math.isnan(threshold[far]) else math.nan
        reason = inputs.too_few(far, len(impostors))
        notes += [] if reason is None else [reason]
    if not len(genuine):
        notes.append("no rates: there are no genuine pairs")
    return tar, threshold, notes


def kth_highest(scores: Array, k: int) -> float:
    """The k-th highest score, counted from 1; NaN for k = 0."""
    return float(np.partition(scores, len(scores) - k)[len(scores) - k]) if k else math.nan


def _curves(genuine: Array, impostors: Array) -> list[Curve]:
    """The ROC at a thousand of its points, evenly spaced in log FAR."""
    if not len(genuine) or not len(impostors):
        return []
    ordered = np.sort(impostors)[::-1]
    ranks = np.unique(np.geomspace(1, len(ordered), 1000).round().astype(np.int64))
    genuine = np.sort(genuine)
    tar = 1 - np.searchsorted(genuine, ordered[ranks - 1], "left") / len(genuine)
    return [Curve("ROC", "FAR", "TAR", ranks / len(ordered), tar)]
