"""The face benchmark from end to end on a small made-up folder, and that its comparison is fair."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.faces import arms as face_arms
from bench.faces import command as faces
from bench.faces import data as face_data
from bench.faces import reporting as face_report
from bench.faces import runs as face_runs
from bench.faces import training as face_training

TINY = replace(face_training.SMALL, channels=(4, 8), embedding_dim=8, steps=3, batch_size=8)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight people; each is a pattern of their own, with noise on every image."""
    folder = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(0)
    for person in range(8):
        pattern = np.kron(rng.integers(40, 216, (7, 6)), np.ones((8, 8)))
        (folder / f"p{person}").mkdir()
        for image in range(4):
            pixels = np.clip(pattern + rng.normal(0, 10, pattern.shape), 0, 255).astype(np.uint8)
            header = b"P5 %d %d 255\n" % pixels.shape[::-1]
            (folder / f"p{person}" / f"{image}.pgm").write_bytes(header + pixels.tobytes())
    return folder


@pytest.fixture(scope="module")
def face_set(people: Path) -> Iterator[face_data.FaceSet]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield face_data.load_faces(people, TINY.height, TINY.width)
    torch.set_num_threads(threads)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    faces.add_arguments(parser)
    return parser.parse_args(arguments)


def arm(name: str) -> face_arms.Arm:
    return face_arms.by_name([name])[0]


def without_time(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key != "seconds"} for result in results]


def test_whole_run_and_that_workers_do_not_change_the_numbers(people: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    common = ("--quick", "--data", str(people), "--steps", "2")
    assert faces.run(parse(*common, "--out", str(tmp_path / "a"), "--threads", "1", "--seeds", "2")) == 0
    assert faces.run(parse(*common, "--out", str(tmp_path / "b"), "--threads", "2", "--seeds", "1")) == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["faces.json", "faces.png"]
    assert (tmp_path / "a" / "faces.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "a" / "faces.json").read_text()
    assert str(tmp_path) not in text and str(people) not in text
    report = json.loads(text)
    assert report["complete"] is True
    assert [(r["arm"], r["seed"]) for r in report["results"]] == [(arm, seed) for seed in (0, 1) for arm in face_arms.QUICK]
    assert [arm["name"] for arm in report["settings"]["arms"]] == list(face_arms.QUICK)
    for result in report["results"]:
        assert {"train_loss", "seconds"} <= result.keys()
        for metric in ("eer", "rank1"):
            assert 0 <= result[metric] <= 1
        # 48 impostor pairs: half of one is not enough for a rate.
        assert result["vr@far=1e-2"] is None and result["vr@far=1e-3"] is None
        assert (result["genuine_pairs"], result["impostor_pairs"]) == (
            3 * 6,
            3 * 16,
        )  # 3 people, 4 images each
    assert [row["num_seeds"] for row in report["summary"]] == [2, 2]
    assert report["settings"]["train_people"] + report["settings"]["test_people"] == 8
    other = json.loads((tmp_path / "b" / "faces.json").read_text())
    assert without_time(other["results"]) == without_time(report["results"][:2])


def test_tuning_names_the_best_of_each_loss(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [each for each in face_arms.candidates() if each.loss == "softmax"][:2]
    monkeypatch.setattr(faces, "candidates", lambda: two)
    results = {two[0].name: 0.25, two[1].name: 0.75}
    measured = {"genuine_pairs": 18, "impostor_pairs": 48, "roc": [0.5], **dict.fromkeys(face_report.METRICS, 0.5)}
    monkeypatch.setattr(
        face_runs,
        "execute",
        lambda run, *rest: measured | {"arm": run.arm.name, "seed": run.seed, "vr@far=1e-2": results[run.arm.name]},
    )
    assert faces.run(parse("--tune", "--data", str(people), "--seeds", "2", "--threads", "1", "--out", str(tmp_path))) == 0
    report = json.loads((tmp_path / "faces.json").read_text())
    assert [result["seed"] for result in report["results"]] == [100, 100, 101, 101]
    assert capsys.readouterr().out.splitlines()[-2] == two[1].name


def test_runs_are_reproducible_and_seeds_differ(face_set: face_data.FaceSet) -> None:
    runs = [face_runs.Run(arm("am-softmax-0.35"), seed) for seed in (0, 0, 1)]
    first, again, other = without_time([face_runs.execute(r, face_set, TINY, lambda step: None) for r in runs])
    assert first == again
    assert first["train_loss"] != other["train_loss"]


def test_only_people_to_train_on_reach_training(face_set: face_data.FaceSet, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, embedded = [], []
    train, embed = face_training.train, face_training.embed

    def spy_train(part: face_data.FaceSet, *rest: Any) -> face_training.Trained:
        trained.append(part)
        return train(part, *rest)

    def spy_embed(network: torch.nn.Sequential, images: torch.Tensor) -> torch.Tensor:
        embedded.append(images)
        return embed(network, images)

    monkeypatch.setattr(face_training, "train", spy_train)
    monkeypatch.setattr(face_training, "embed", spy_embed)
    for name in ("softmax", "am-softmax-0.50"):
        face_runs.execute(face_runs.Run(arm(name), 5), face_set, TINY, lambda step: None)
    assert trained[0].people == trained[1].people  # the losses of a seed share the split
    seen = {image.numpy().tobytes() for image in trained[0].images}
    assert seen.isdisjoint(image.numpy().tobytes() for image in embedded[0])
    assert len(trained[0].images) + len(embedded[0]) == len(face_set.images)


def test_losses_see_the_same_inputs(face_set: face_data.FaceSet, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[torch.Tensor] = []
    augment = face_training.augment

    def spy(*arguments: Any) -> torch.Tensor:
        batches.append(augment(*arguments))
        return batches[-1]

    monkeypatch.setattr(face_training, "augment", spy)
    for each in face_arms.arms():
        face_training.train(face_set, each, 0, TINY)
    for step in range(TINY.steps):
        for run in range(1, len(face_arms.arms())):
            assert torch.equal(batches[step], batches[run * TINY.steps + step])


def test_training_learns_and_leaves_the_global_generator_alone(face_set: face_data.FaceSet) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    settings = replace(TINY, channels=(8, 16), embedding_dim=16, steps=80, dropout=0.0)
    first = face_training.train(face_set, arm("am-softmax-0.35"), 0, replace(settings, steps=1))
    trained = face_training.train(face_set, arm("am-softmax-0.35"), 0, settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert trained.train_loss < first.train_loss / 2


def test_augmentation_without_any_change_only_mirrors() -> None:
    settings = replace(
        TINY,
        max_shift=0.0,
        max_rotation_degrees=0.0,
        max_zoom=0.0,
        max_contrast=0.0,
        max_brightness=0.0,
    )
    images = torch.rand(32, 1, TINY.height, TINY.width)
    moved = face_training.augment(images, settings, torch.Generator().manual_seed(0))
    same = (moved - images).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (moved - images.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert bool((same ^ mirrored).all())
    assert 4 < int(mirrored.sum()) < 28


def results_of(arm: str, values: list[float], metric: str | None = None) -> list[dict[str, Any]]:
    """A result a seed, with this value in one metric, or in all, and 0.5 in the others."""
    metrics = [
        dict.fromkeys(face_report.METRICS, value)
        if metric is None
        else dict.fromkeys(face_report.METRICS, 0.5) | {metric: value}
        for value in values
    ]
    return [{"arm": arm, "seed": seed, "roc": [0.5], **each} for seed, each in enumerate(metrics)]


def test_summary_pairs_the_seeds() -> None:
    results = results_of("softmax", [0.5, 0.7]) + results_of("am-softmax-0.35", [0.6, 0.9])[::-1]
    plain, margin = face_report.summarize(results)
    assert (plain["rank1"]["mean"], plain["rank1"]["std"]) == (pytest.approx(0.6), pytest.approx(0.02**0.5))
    difference = margin["rank1"]["minus"]["softmax"]  # 0.1 and 0.2
    assert difference == {"mean": pytest.approx(0.15), "stderr": pytest.approx(0.05)}
    assert plain["rank1"]["minus"] == {}  # each pair is shown once
    text = face_report.table_text([plain, margin])
    assert "+15.0 (se 5.0)" in text and "so few seeds cannot rank losses" in text


def test_losses_are_ranked_by_clear_differences_alone() -> None:
    noise = [0.1, -0.1] * 4  # a standard error of 0.0378 over 8 seeds
    results = results_of("softmax", [0.5] * 8)
    for name, shift in (("a-softmax", 0.05), ("l-softmax", -0.2), ("arcface", 0.12)):
        results += results_of(name, [0.5 + shift + each for each in noise])
    lines = face_report.verdicts(face_report.summarize(results))
    told = "better than softmax: arcface; worse than softmax: l-softmax; not told apart from softmax: a-softmax"
    assert told in lines[1] and lines[1].startswith("VR@FAR=1%")
    # An equal error rate is the better the smaller it is.
    told = "better than softmax: l-softmax; worse than softmax: arcface; not told apart from softmax: a-softmax"
    assert told in lines[2] and lines[2].startswith("EER")
    few = [result for result in results if result["seed"] < 7]
    text = face_report.table_text(face_report.summarize(few))
    assert "better" not in text and "cannot rank" in text


def test_tuning_takes_the_best_of_each_loss() -> None:
    results = results_of("a lr=1", [0.4]) + results_of("a lr=2", [0.6]) + results_of("b lr=1", [0.1])
    losses = {"a lr=1": "a", "a lr=2": "a", "b lr=1": "b"}
    assert face_report.best_by_loss(face_report.summarize(results), losses) == ["a lr=2", "b lr=1"]


def test_each_loss_is_tuned_alike_and_what_was_chosen_was_tried() -> None:
    tried: dict[str, list[face_arms.Arm]] = {}
    for each in face_arms.candidates():
        tried.setdefault(each.loss, []).append(replace(each, name=""))
    assert set(tried) == set(face_arms.HEADS)
    assert {len(each) for each in tried.values()} == {9}
    for each in face_arms.arms():
        shared = {"margin": 0.35} if each.loss == "am-softmax" else {}
        options = {key: value for key, value in (each.options | shared).items() if key != "subcentres"}
        assert replace(each, name="", options=options, centres="float32") in tried[each.loss]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "no/such/folder"), "no/such/folder"),
        (("--seeds", "0"), "--seeds must be at least 1, got 0"),
        (("--threads", "-1"), "--threads must be at least 1"),
        (("--steps", "0"), "--steps must be at least 1"),
        (("--arms", "softmax", "magic"), "there is no 'magic', but softmax, l-softmax"),
    ],
)
def test_unusable_arguments(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert faces.run(parse("--out", str(tmp_path / "out"), *arguments)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interruption_keeps_the_runs_done(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    execute = face_runs.execute

    def interrupted(run: face_runs.Run, *rest: Any) -> dict[str, Any]:
        if run.arm.name != "softmax":
            raise KeyboardInterrupt
        return execute(run, *rest)

    monkeypatch.setattr(face_runs, "execute", interrupted)
    arguments = parse("--quick", "--data", str(people), "--steps", "1", "--threads", "1", "--out", str(tmp_path))
    assert faces.run(arguments) == 130
    report = json.loads((tmp_path / "faces.json").read_text())
    assert report["complete"] is False
    assert [result["arm"] for result in report["results"]] == ["softmax"]
