"""`python -m bench verify`: each protocol from files gives what the package gives on the same arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amsoftmax_kernels import evaluation as ev
from bench.__main__ import main

from .test_evaluation import planted
from .test_evaluation_lists import configuration

FEATURES, LABELS = (each.numpy() for each in planted(240, 30, 20))
FEATURES = FEATURES.astype(np.float32)


def feature_files(folder: Path, rows: Any) -> Path:
    (folder / "a").mkdir(parents=True)
    for number, row in enumerate(rows):
        content = np.array([len(row), 1, 4, 5], "<i4").tobytes() + row.astype("<f4").tobytes()
        (folder / "a" / f"{number:04}.bin").write_bytes(content)
    return folder


def verified(folder: Path, *arguments: str) -> dict[str, Any]:
    assert main(["verify", *arguments, "--json", str(folder / "result.json")]) == 0
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert found.pop("machine")["torch"] == torch.__version__
    return found


def saved(folder: Path, **arrays: Any) -> dict[str, str]:
    for name, each in arrays.items():
        np.save(folder / f"{name}.npy", each)
    return {name: str(folder / f"{name}.npy") for name in arrays}


def test_all_pairs_of_any_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = ev.verification(FEATURES, LABELS, (0.1, 1e-2))
    paths = saved(tmp_path, features=FEATURES, labels=LABELS)
    np.savez(tmp_path / "all.npz", features=FEATURES, labels=LABELS)
    np.savez(tmp_path / "one.npz", FEATURES)
    np.savetxt(tmp_path / "labels.txt", LABELS, "%d")
    folder = feature_files(tmp_path / "files", FEATURES)
    listed = "\n".join(str(path.relative_to(tmp_path)) for path in sorted(folder.rglob("*.bin")))
    (tmp_path / "list.txt").write_text(listed)
    labels = paths["labels"]
    for features, people in (
        (paths["features"], labels), (str(folder), labels), (str(tmp_path / "list.txt"), labels),
        (str(tmp_path / "one.npz"), str(tmp_path / "labels.txt")),
        (f"{tmp_path / 'all.npz'}:features", f"{tmp_path / 'all.npz'}:labels"),
    ):  # fmt: skip
        found = verified(tmp_path, "--features", features, "--labels", people, "--far", "0.1", "1e-2")
        assert found == expected.as_json()
    printed = capsys.readouterr().out
    assert str(expected) in printed and "VR at FAR 0.1" in printed


def test_every_protocol(tmp_path: Path) -> None:
    known, rest = LABELS < 90, LABELS >= 90
    gallery, probes = np.flatnonzero(known)[::2], np.flatnonzero(known)[1::2]
    probes = probes[np.isin(LABELS[probes], LABELS[gallery])]
    first, second = (np.asarray(each) for each in np.tril_indices(240, -1))
    same = LABELS[first] == LABELS[second]
    files = saved(
        tmp_path, features=FEATURES, labels=LABELS, gallery=FEATURES[gallery], known=LABELS[gallery],
        probes=FEATURES[probes], probe_labels=LABELS[probes], others=FEATURES[rest], first=first, second=second, same=same,
        pairs_same=LABELS[::2] == LABELS[1::2],
    )  # fmt: skip
    plot = tmp_path / "plot.png"
    runs: dict[str, tuple[list[str], ev.Result]] = {
        "pairs": (["--same", files["pairs_same"], "--far", "0.1", "--folds", "5"],
                  ev.pairs(FEATURES[::2], FEATURES[1::2], LABELS[::2] == LABELS[1::2], 5, 0.1)),
        "templates": (["--first", files["first"], "--second", files["second"], "--same", files["same"]],
                      ev.template_pairs(FEATURES, first, second, same)),
        "open-set": (["--features", files["gallery"], "--labels", files["known"], "--probes", files["probes"],
                      "--probe-labels", files["probe_labels"], "--impostors", files["others"], "--far", "0.1",
                      "--ranks", "2"],
                     ev.open_set(FEATURES[gallery], LABELS[gallery], FEATURES[probes], LABELS[probes], FEATURES[rest],
                                 0.1, 2)),
        "megaface": (["--features", files["features"], "--labels", files["labels"], "--distractors", files["others"],
                      "--sizes", "10", "50", "--far", "1e-3"],
                     ev.megaface(FEATURES, LABELS, FEATURES[rest], (10, 50), 1e-3)),
    }  # fmt: skip
    for protocol, (arguments, expected) in runs.items():
        features = [] if "--features" in arguments else ["--features", files["features"]]
        assert verified(tmp_path, "--protocol", protocol, *features, *arguments, "--plot", str(plot)) == expected.as_json()
    assert plot.read_bytes()[:4] == b"\x89PNG"
    pytest.importorskip("scipy")
    config = configuration(tmp_path, (LABELS + 3) // 7, 2)
    labels, trials = ev.load_blufr(config)
    found = verified(
        tmp_path, "--protocol", "blufr", "--features", files["features"], "--config", str(config), "--dir-far", "0.1"
    )
    assert found == ev.blufr(FEATURES, labels, trials, dir_far=0.1).as_json()


@pytest.mark.parametrize("arguments, message", [
    (("--features", "features.npy"), "--protocol verification needs --labels"),
    (("--features", "features.npy", "--labels", "labels.npy", "--sizes", "3"), "--sizes is not for --protocol verification"),
    (("--features", "none.npy", "--labels", "labels.npy"), "none.npy"),
    (("--features", "features.csv", "--labels", "labels.npy"), "must be .npy, .npz or .txt"),
    (("--features", "empty", "--labels", "labels.npy"), "empty has no .bin files"),
    (("--features", "all.npz", "--labels", "labels.npy"), "name one"),
    (("--features", "all.npz:x", "--labels", "labels.npy"), "not x"),
    (("--features", "objects.npy", "--labels", "labels.npy"), "Python objects"),
    (("--features", "features.npy", "--labels", "features.npy"), "labels must be integers"),
    (("--features", "features.npy", "--labels", "labels.npy", "--far", "2"), "far must lie in"),
])  # fmt: skip
def test_wrong_arguments(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, features=FEATURES, labels=LABELS)
    np.savez("all.npz", a=FEATURES, b=LABELS)
    np.save("objects.npy", np.array([print], object), allow_pickle=True)
    Path("empty").mkdir()
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err
