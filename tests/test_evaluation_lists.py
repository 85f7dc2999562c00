"""Protocols on listed pairs, trials and galleries, against enumeration; results as tables, JSON and figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amsoftmax_kernels import evaluation as ev

from .test_evaluation import enumerated, kth, planted


def test_ten_folds_as_insightface_scores_them() -> None:
    """Its loop over thresholds and folds, written out."""
    generator = torch.Generator().manual_seed(0)
    same = torch.rand(237, generator=generator) < 0.5
    first = torch.randn(237, 8, generator=generator)
    second = torch.where(
        same[:, None], first + 1.2 * torch.randn(237, 8, generator=generator), torch.randn(237, 8, generator=generator)
    )
    one, two = (torch.nn.functional.normalize(each).numpy() for each in (first, second))
    distance, truth = np.square(one - two).sum(1), same.numpy()
    lengths = [24] * 7 + [23] * 3
    edges = np.cumsum([0, *lengths])
    accuracies = []
    for fold in range(10):
        held = np.zeros(237, bool)
        held[edges[fold] : edges[fold + 1]] = True
        best = max(np.arange(0, 4, 0.01), key=lambda each: ((distance < each) == truth)[~held].sum())
        accuracies.append(((distance < best) == truth)[held].mean())
    result = ev.pairs(first, second, same, folds=10, far=(0.1, 1e-5))
    assert result.accuracy == pytest.approx(np.mean(accuracies)) and result.std == pytest.approx(np.std(accuracies))
    cosine = (one * two).sum(1)
    assert result.tar[0.1] == pytest.approx((cosine[truth] >= kth(cosine[~truth], 0.1)).mean())
    assert math.isnan(result.tar[1e-5]) and "too few" in result.notes[0]


def test_templates_against_enumeration() -> None:
    features, labels = planted(60, 12, 1)
    scores = enumerated(features, labels)
    first, second = torch.tril_indices(60, 60, -1)
    result = ev.template_pairs(features, first, second, labels[first] == labels[second], far=(0.1, 1e-3, 1e-6))
    assert (result.genuine, result.impostors) == (len(scores.genuine), len(scores.impostors))
    for far in (0.1, 1e-3):
        assert result.tar[far] == (scores.genuine >= kth(scores.impostors, far)).mean()
    assert math.isnan(result.tar[1e-6])
    everyone = ev.verification(features, labels, (0.1, 1e-3))
    assert {far: everyone.threshold[far] for far in (0.1, 1e-3)} == {far: result.threshold[far] for far in (0.1, 1e-3)}


def test_lists_that_do_not_fit() -> None:
    rows = torch.eye(4)
    for arguments, message in (
        ((rows, rows[:3], [True] * 4), "second must have the 4 rows"),
        ((rows, rows[:, :3], [True] * 4), "second must have the 4 dimensions"),
        ((rows, rows, [True] * 3), "same must have shape"),
        ((rows, rows, [2, 0, 1, 0]), "same must be bools"),
        ((rows, rows, [True] * 4, 5), "folds must be from 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ev.pairs(*arguments)
    for first, same, message in (
        ([0, 4], [True, False], r"first must lie in \[0, 4\), but first\[1\] is 4"),
        ([0], [0, 1], "second"),
    ):
        with pytest.raises(ValueError, match=message):
            ev.template_pairs(rows, first, [1, 2], same)


def by_hand(gallery: Any, known: Any, probes: Any, labels: Any, impostors: Any, far: float, rank: int) -> float:
    """One probe at a time."""
    unit = [torch.nn.functional.normalize(each.double()) for each in (gallery, probes, impostors)]
    alarms = (unit[2] @ unit[0].T).numpy().round(9).max(1)
    threshold = kth(alarms, far)
    hits = []
    for scores, label in zip((unit[1] @ unit[0].T).numpy().round(9), labels.tolist(), strict=True):
        own = known.numpy() == label
        mate = scores[own].max()
        hits.append(mate >= threshold and 1 + (scores[~own] >= mate).sum() <= rank)
    return float(np.mean(hits))


@pytest.mark.parametrize("far, rank", [(0.5, 1), (0.05, 1), (0.05, 3), (1.0, 10)])
def test_open_set_against_enumeration(far: float, rank: int) -> None:
    features, labels = planted(300, 40, 2)
    labels = (labels + 3) // 7
    known, rest = labels < 20, labels >= 20
    gallery, probes = features[known][::2], features[known][1::2]
    of_gallery, of_probes = labels[known][::2], labels[known][1::2]
    probes, of_probes = probes[torch.isin(of_probes, of_gallery)], of_probes[torch.isin(of_probes, of_gallery)]
    result = ev.open_set(gallery, of_gallery, probes, of_probes, features[rest], far, rank)
    assert result.dir == pytest.approx(by_hand(gallery, of_gallery, probes, of_probes, features[rest], far, rank))
    assert result.dir > 0
    with pytest.raises(ValueError, match="probe_labels must be of people in the gallery, but gallery_labels has no 99"):
        ev.open_set(gallery, of_gallery, probes[:1], [99], features[rest])
    few = ev.open_set(gallery, of_gallery, probes, of_probes, features[rest][:3], far=0.1)
    assert math.isnan(few.dir) and "3 impostor probes are too few" in str(few)


def configuration(folder: Path, labels: Any, trials: int, changed: Any = None) -> Path:
    """BLUFR's file for some labels, as MATLAB would write it."""
    io = pytest.importorskip("scipy.io")
    cells = {name: np.empty((trials, 1), object) for name in ("testIndex", "galIndex", "probIndex")}
    for trial in range(trials):
        order = np.random.default_rng(trial).permutation(len(labels))
        people, gallery = np.unique(labels[order], return_index=True)
        known = order[gallery[: len(people) // 2]]
        rest = np.setdiff1d(order, known)
        for name, rows in (("testIndex", order), ("galIndex", known), ("probIndex", rest)):
            cells[name][trial, 0] = rows[:, None].astype(np.float64) + 1
    io.savemat(folder / "config.mat", {"labels": labels[:, None].astype(np.uint16), **cells, **(changed or {})})
    return folder / "config.mat"


def test_blufr_is_the_mean_of_its_trials(tmp_path: Path) -> None:
    features, people = planted(150, 20, 3)
    path = configuration(tmp_path, (people.numpy() + 3) // 7, 3)
    labels, trials = ev.load_blufr(path)
    assert (labels == (people.numpy() + 3) // 7).all() and len(trials) == 3
    rates, found = [], []
    for trial in trials:
        assert sorted(trial.test) == list(range(150))
        assert np.isin(labels[trial.genuine], labels[trial.gallery]).all()
        assert not np.isin(labels[trial.impostors], labels[trial.gallery]).any()
        each = torch.from_numpy(labels)
        scores = enumerated(features[trial.test], each[trial.test])
        rates.append((scores.genuine >= kth(scores.impostors, 1e-3)).mean())
        found.append(by_hand(features[trial.gallery], each[trial.gallery], features[trial.genuine], each[trial.genuine],
                             features[trial.impostors], 0.1, 2))  # fmt: skip
    result = ev.blufr(features, labels, trials, vr_far=1e-3, dir_far=0.1, ranks=(1, 2))
    assert result.vr[1e-3] == pytest.approx((np.mean(rates), np.std(rates, ddof=1)))
    assert result.dir[0.1, 2] == pytest.approx((np.mean(found), np.std(found, ddof=1)))
    assert "mean − std" in str(result) and json.loads(json.dumps(result.as_json()))["dir"]["0.1, 1"]
    with pytest.raises(ValueError, match=r"trials\[0\].gallery must lie in \[0, 150\)"):
        ev.blufr(features, labels, [trials[0]._replace(gallery=np.array([150]))])


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    pytest.importorskip("scipy.io")
    labels = np.arange(12) % 4
    for changed, message in (
        ({"testIndex": np.array([[np.ones(2)], [np.ones(3)]], object)}, "as many cells"),
        ({"labels": np.full((12, 1), 0.5)}, "whole numbers"),
        ({"labels": np.zeros((3, 1))}, "rows from 1 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            ev.load_blufr(configuration(tmp_path, labels, 1, changed))
    (tmp_path / "other.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(60))
    with pytest.raises(ValueError, match="cannot be read"):
        ev.load_blufr(tmp_path / "other.mat")
    with pytest.raises(FileNotFoundError):
        ev.load_blufr(tmp_path / "none.mat")


@pytest.mark.skipif("not __import__('os').environ.get('BLUFR_CONFIG')", reason="BLUFR_CONFIG names no blufr_lfw_config.mat")
def test_the_counts_of_blufr_itself() -> None:
    """For whoever has the file: those that its authors publish."""
    import os

    labels, trials = ev.load_blufr(os.environ["BLUFR_CONFIG"])
    assert len(labels) == 13_233 and len(np.unique(labels)) == 5_749 and len(trials) == 10
    assert len(trials[0].test) == 10_281
    sizes = np.unique(labels[trials[0].test], return_counts=True)[1]
    genuine = int((sizes * (sizes - 1) // 2).sum())
    assert (genuine, 10_281 * 10_280 // 2 - genuine) == (231_834, 52_612_506)
    assert round(np.mean([len(each.test) for each in trials])) == 9_708
    assert {len(each.gallery) for each in trials} == {1000}
    assert round(np.mean([len(each.genuine) for each in trials])) == 4_351
    assert round(np.mean([len(each.impostors) for each in trials])) == 4_358


def test_results_as_text_json_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    features, labels = planted(120, 20, 4)
    results: dict[str, ev.Result] = {
        "all pairs": ev.verification(features, labels, (0.1, 1e-9)),
        "megaface": ev.megaface(features, labels, features.flip(1), (10, 100)),
        "open set": ev.open_set(features, labels, features, labels, features.flip(1), far=0.1),
    }
    for result in results.values():
        text, data = str(result), json.loads(json.dumps(result.as_json(), allow_nan=False))
        assert data["protocol"] == type(result).__name__ and "%" in text and "Curve" not in repr(result)
    assert "VR at FAR 1e-09  no rate" in " ".join(str(results["all pairs"]).split("\n")[3].split()).replace(
        "no rate", " no rate"
    )
    assert results["all pairs"].as_json()["vr"]["1e-09"] is None
    ev.figure(results).savefig(tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="results must have a curve"):
        ev.figure(ev.verification(features[:2], [0, 1]))
