"""The LFW BLUFR protocol: verification and open-set identification over ten trials (Liao et al. 2014)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from . import inputs
from .all_pairs import verification
from .counting import Array
from .identification import dir_curve, probe_scores
from .results import Curve, Result, percent


class Trial(NamedTuple):
    """Rows of the features, counted from 0: all for verification, and those for open-set identification.

    Attributes:
        test: all of the trial's rows, of which every pair is scored.
        gallery: one row or several of each person to be recognized.
        genuine: probes of people in the gallery.
        impostors: probes of others.
    """

    test: Array
    gallery: Array
    genuine: Array
    impostors: Array


@dataclass
class Blufr(Result):
    """Mean and standard deviation over the trials.

    The protocol reports mean − standard deviation, the table's last column.

    Attributes:
        vr: by FAR, mean and standard deviation (with N − 1) of the verification rate.
        dir: by (FAR, rank), those of the detection and identification rate.
        trials: number of trials.
        genuine: genuine pairs of a trial, the mean.
        impostors: impostor pairs of a trial, the mean.
    """

    vr: dict[float, tuple[float, float]]
    dir: dict[tuple[float, int], tuple[float, float]]
    trials: int
    genuine: float
    impostors: float

    def rows(self) -> list[tuple[str, ...]]:
        named = {f"VR at FAR {far:g}": value for far, value in self.vr.items()}
        named |= {f"DIR at FAR {far:g}, rank {rank}": value for (far, rank), value in self.dir.items()}
        return [
            ("trials", f"{self.trials}"), ("genuine pairs, mean", f"{self.genuine:,.0f}"),
            ("impostor pairs, mean", f"{self.impostors:,.0f}"), ("", "mean", "std", "mean − std"),
            *((name, percent(mean), percent(std), percent(mean - std)) for name, (mean, std) in named.items()),
        ]  # fmt: skip


def load_blufr(path: str | os.PathLike[str]) -> tuple[Array, list[Trial]]:
    """Read the protocol's configuration, ``blufr_lfw_config.mat``, which comes with its authors' toolkit. Needs scipy.

    Features must then be in the order of the file's list of images, 13,233 of LFW's.

    Args:
        path: of the MATLAB file: ``labels``, and a cell a trial of ``testIndex``, ``galIndex`` and ``probIndex``. Probes of
            people who are not in a trial's gallery are its impostors.

    Returns:
        The labels ``[N]`` int64, and the trials.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: scipy is not installed.
        ValueError: it is no such file, or an index is out of range.

    Example:
        >>> import numpy as np, scipy.io
        >>> from amsoftmax_kernels import evaluation as ev
        >>> cells = {name: np.empty((1, 1), object) for name in ("testIndex", "galIndex", "probIndex")}
        >>> for name, rows in (("testIndex", [1, 2, 3]), ("galIndex", [1]), ("probIndex", [2, 3])):
        ...     cells[name][0, 0] = np.array(rows)[:, None]
        >>> scipy.io.savemat("small.mat", {"labels": np.array([[7], [7], [8]]), **cells})
        >>> labels, trials = ev.load_blufr("small.mat")
        >>> trials[0].genuine, trials[0].impostors
        (array([1]), array([2]))
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("load_blufr reads MATLAB files by scipy: pip install amsoftmax-kernels[evaluation]") from error
    with open(path, "rb"):
        pass
    try:
        found = loadmat(path)
    except Exception as error:  # scipy raises whatever it stumbles over
        raise ValueError(f"path must be a MATLAB file, but {path} cannot be read: {error}") from error
    names = ("labels", "testIndex", "galIndex", "probIndex")
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"path must be BLUFR's configuration, but {path} has no {', '.join(missing)}")
    labels = _integers(found["labels"], f"{path}: labels")
    cells = [found[name].ravel() for name in names[1:]]
    if len({len(each) for each in cells}) != 1:
        raise ValueError(f"path must have as many cells of each index, but {path} has {[len(each) for each in cells]}")
    trials = []
    for number, lists in enumerate(zip(*cells, strict=True)):
        rows = []
        for name, each in zip(names[1:], lists, strict=True):
            index = _integers(each, f"{path}: {name}{{{number + 1}}}") - 1
            if len(index) and not 0 <= index.min() <= index.max() < len(labels):
                raise ValueError(
                    f"path must have rows from 1 to {len(labels)}, but {path}: {name}{{{number + 1}}} has others"
                )
            rows.append(index)
        known = np.isin(labels[rows[2]], labels[rows[1]])
        trials.append(Trial(rows[0], rows[1], rows[2][known], rows[2][~known]))
    return labels, trials


def _integers(values: Any, name: str) -> Array:
    """A MATLAB array of whole numbers, of whatever dtype, as a vector."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or (array.dtype.kind == "f" and not (array == np.round(array)).all()):
        raise ValueError(f"path must have whole numbers, but {name} has {array.dtype}")
    return array.astype(np.int64).ravel()


def blufr(
    features: Any, labels: Any, trials: Sequence[Trial], vr_far: Any = (1e-3, 1e-4), dir_far: Any = (1e-2,),
    ranks: Any = (1,), *, progress: bool = False,
) -> Blufr:  # fmt: skip
    """Verification and open-set identification over the trials of the LFW BLUFR protocol (Liao et al. 2014).

    Args:
        features: ``[N, D]`` any floating-point dtype, a tensor on any device or an array; normalized inside.
        labels: ``[N]`` integers, one a person.
        trials: as :func:`load_blufr` reads them.
        vr_far: false acceptance rates of verification, in (0, 1].
        dir_far: false alarm rates of identification, in (0, 1].
        ranks: of identification, at least 1.
        progress: whether to show each trial's progress on the standard error.

    Returns:
        A :class:`Blufr`. A rate that a trial does not have is NaN, and ``notes`` says why.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: shapes do not fit, a feature is not finite, or a number or a trial's row is out of range.

    Example:
        >>> import numpy as np, torch
        >>> from amsoftmax_kernels import evaluation as ev
        >>> labels = np.repeat(np.arange(30), 4)
        >>> features = torch.eye(30)[labels] + 0.1 * torch.randn(120, 30)
        >>> rows = np.arange(120)
        >>> trial = ev.Trial(test=rows, gallery=rows[:40:4], genuine=rows[1:40:4], impostors=rows[40:])
        >>> ev.blufr(features, labels, [trial, trial], vr_far=0.01, dir_far=0.1).trials
        2
    """
    matrix = inputs.matrix("features", features)
    people = inputs.integers("labels", labels, len(matrix))
    vr_fars, dir_fars = inputs.rates("vr_far", vr_far), inputs.rates("dir_far", dir_far)
    chosen = inputs.sizes("ranks", ranks)
    if not trials:
        raise ValueError("trials must have at least one, but it is empty")
    rows = inputs.unit_rows("features", matrix)
    vrs: dict[float, list[float]] = {far: [] for far in vr_fars}
    dirs: dict[tuple[float, int], list[float]] = {(far, rank): [] for far in dir_fars for rank in chosen}
    pairs: list[tuple[int, int]] = []
    notes: list[str] = []
    curves: list[Curve] = []
    for number, trial in enumerate(trials):
        test, gallery, genuine, impostors = (_rows(number, trial, field, len(rows)) for field in Trial._fields)
        result = verification(rows[test.to(rows.device)], people[test], vr_fars, progress=progress)
        pairs.append((result.genuine, result.impostors))
        for far, rate in result.vr.items():
            vrs[far].append(rate)
        parts = [rows[each.to(rows.device)] for each in (gallery, genuine, impostors)]
        scores = probe_scores(parts[0], people[gallery], parts[1], people[genuine], parts[2])
        for far, rank in dirs:
            dirs[far, rank].append(scores.rate(far, rank))
        notes += [f"trial {number + 1}: {note}" for note in result.notes]
        notes += [f"trial {number + 1}: {note}" for far in dir_fars for note in scores.why_not(far)]
        if number == 0:
            curves = list(result.curves)
            if len(scores.mate) and len(scores.alarm):
                curves.append(dir_curve(scores, chosen[0]))
            for curve in curves:
                curve.title += ", first trial"
    means = np.mean(pairs, axis=0)
    return Blufr(
        {far: _spread(each) for far, each in vrs.items()}, {key: _spread(each) for key, each in dirs.items()}, len(trials),
        float(means[0]), float(means[1]), notes=list(dict.fromkeys(notes)), curves=curves,
    )  # fmt: skip


def _rows(number: int, trial: Trial, field: str, count: int) -> torch.Tensor:
    name = f"trials[{number}].{field}"
    rows = inputs.tensor(name, getattr(trial, field))
    return inputs.integers(name, rows, len(rows), count)


def _spread(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
