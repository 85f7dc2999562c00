"""`python -m bench train` on InsightFace's records, verified on its sets, and that it goes on where it stopped."""

from __future__ import annotations

import csv
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.train import log as train_log
from bench.train.records import Records

from .records import with_header, write

pytest.importorskip("PIL")
PEOPLE, EACH = 12, 8


def face(pattern: Any, rng: np.random.Generator) -> bytes:
    from PIL import Image

    pixels = np.clip(pattern + rng.normal(0, 12, pattern.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set, and a verification set of other people."""
    folder = tmp_path_factory.mktemp("records")
    rng = np.random.default_rng(0)
    patterns = [np.kron(rng.integers(40, 216, (4, 4)), np.ones((6, 6))) for _ in range(PEOPLE + 20)]
    images = [(person, face(patterns[person], rng)) for person in range(PEOPLE) for _ in range(EACH)]
    write(folder, with_header(images, PEOPLE))
    pairs, same = [], []
    for number in range(60):
        one, other = PEOPLE + number % 20, PEOPLE + (number % 20 if number % 2 else (number + 7) % 20)
        pairs += [face(patterns[one], rng), face(patterns[other], rng)]
        same.append(one == other)
    (folder / "lfw.bin").write_bytes(pickle.dumps((pairs, same)))
    return folder


def trained(folder: Path, out: Path, *arguments: str) -> list[dict[str, str]]:
    common = ["--data", str(folder), "--verify", str(folder / "lfw.bin"), "--batch", "16", "--dim", "16", "--log-every", "1"]
    rates = ["--lr", "0.01", "--head-lr", "0.1", "--checkpoint-every", "3"]
    assert main(["train", *common, *rates, "--out", str(out), *arguments]) == 0
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_verifies_between_epochs_and_goes_on(
    folder: Path, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = trained(folder, tmp_path / "whole", "--epochs", "3")
    printed = capsys.readouterr().out
    assert "96 images, 6 steps an epoch; verified on lfw (60 pairs)" in printed and "left" in printed
    accuracies = [(int(row["step"]), float(row["accuracy/lfw"])) for row in rows if row["accuracy/lfw"]]
    assert [step for step, _ in accuracies] == [0, 6, 12, 18] and all(0.4 <= each <= 1 for _, each in accuracies)
    assert "verification of accuracy/lfw" in printed
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert len(losses) == 18 and losses[-1] < losses[0] - 1
    report = json.loads((tmp_path / "whole" / "train.json").read_text())
    assert report["verification"]["accuracy/lfw"] == accuracies[-1][1] and report["classes"] == PEOPLE

    def losses_of(found: list[dict[str, str]]) -> list[str]:
        return [row["loss"] for row in found if row["loss"]]

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-000000018")  # as a run that died after step 15
    again = trained(folder, stopped, "--epochs", "3", "--resume")
    assert "going on after step 15" in capsys.readouterr().out
    assert losses_of(again) == losses_of(rows)


def test_batches_are_epochs_in_an_order_of_the_seed(folder: Path, one_thread: None) -> None:
    sources = [Records(folder, [], 16, seed, 2, torch.device("cpu")) for seed in (0, 0, 1)]
    assert sources[0].steps_an_epoch == 3
    chosen = [sources[0]._chosen(16, rank, step) for step in range(3) for rank in range(2)]
    assert sorted(torch.cat(chosen).tolist()) == list(range(96))
    one, again, other = (source.batch(16, 1, 4) for source in sources)
    sources[1].batch(16, 1, 2)
    for inputs, labels in (again, sources[1].batch(16, 1, 4)):
        assert torch.equal(one[0], inputs) and torch.equal(one[1], labels)
    assert not torch.equal(one[1], other[1])
    assert one[0].shape == (16, 1, 24, 24) and torch.equal(one[1], sources[0].data.labels[sources[0]._chosen(16, 1, 4)])


@pytest.mark.parametrize("arguments, message", [
    (("--data", "synthetic", "--epochs", "2"), "--epochs is for InsightFace's records"),
    (("--data", "synthetic", "--verify", "lfw.bin"), "--verify is for InsightFace's records"),
    (("--batch", "16", "--verify", "none.bin"), "none.bin"),
    (("--batch", "97"), "takes more than the 96 images"),
    (("--classes", "5"), "--classes is for synthetic data"),
])  # fmt: skip
def test_wrong_arguments(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", str(folder), "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_log_keeps_the_columns_of_another_run(tmp_path: Path) -> None:
    log = train_log.Log(tmp_path, 0, True, False, ("accuracy/lfw",))
    log.row(1, loss=0.5)
    log.row(1, **{"accuracy/lfw": 0.75})
    log.close()
    log = train_log.Log(tmp_path, 2, False, False, ("accuracy/cfp",))
    log.row(2, **{"accuracy/cfp": 0.25})
    log.close()
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["accuracy/lfw"], row["accuracy/cfp"]) for row in rows] == [("", ""), ("0.75", ""), ("", "0.25")]
