"""InsightFace's training records: what they hold, in workers too, and that broken ones are refused with the reason."""

from __future__ import annotations

import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from amsoftmax_kernels.insightface import RecordDataset
from amsoftmax_kernels.insightface.index_files import read_index

from .records import MAGIC, framed, payload, png, with_header, write

pytest.importorskip("PIL")
IMAGES = [(label, png(label + 10 * number)) for number, label in enumerate((0, 2, 2, 1, 0, 2, 1))]


def first_pixel(image: Any) -> int:
    """In the place of a user's transforms; a function that spawned workers can import."""
    red, green, _ = image.getpixel((0, 0))
    return int(red + 256 * green)


def test_images_and_labels(tmp_path: Path) -> None:
    for folder, payloads in (
        ("header", with_header(IMAGES, 3)),
        ("none", [payload(float(each), image) for each, image in IMAGES]),
    ):
        (tmp_path / folder).mkdir()
        path = write(tmp_path / folder, payloads)
        for data in (RecordDataset(path), RecordDataset(tmp_path / folder)):
            assert len(data) == 7 and data.num_classes == 3
            assert data.labels.tolist() == [label for label, _ in IMAGES] and data.labels.dtype == torch.int64
            assert [data.encoded(index) for index in range(7)] == [(image, label) for label, image in IMAGES]
            image, label = data[-1]
            assert (image.size, image.mode, label, first_pixel(image)) == ((6, 5), "RGB", 1, 61)
            with pytest.raises(IndexError):
                data[7]


def test_label_vectors_and_split_records(tmp_path: Path) -> None:
    """Labels with landmarks after them; images with the magic in them, at multiples of 4 and elsewhere, twice in a row."""
    images = [IMAGES[0][1] + 3 * MAGIC + b"x", MAGIC + IMAGES[1][1], IMAGES[2][1] + b"y" + MAGIC, MAGIC]
    labels = [[2.0, 0.5, -7.25], [0.0], 1.0, [1.0, 3.5]]
    records = [payload(label, image) for label, image in zip(labels, images, strict=True)]
    assert any(framed(each).count(MAGIC) > each.count(MAGIC) for each in records)
    data = RecordDataset(write(tmp_path, records))
    assert [data.encoded(index) for index in range(4)] == list(zip(images, [2, 0, 1, 1], strict=True))
    assert data.labels.tolist() == [2, 0, 1, 1]
    # The label itself is where a record was split.
    magic = struct.unpack("<f", MAGIC)[0]
    odd = RecordDataset(write(tmp_path, [payload([1.0, magic], b"i"), payload([magic, 1.0], b"i")], "odd"))
    assert odd.encoded(0) == (b"i", 1)
    with pytest.raises(ValueError, match="class id from 0 to"):
        _ = odd.labels


def test_keys_that_do_not_start_at_zero_or_come_in_another_order(tmp_path: Path) -> None:
    path = write(tmp_path, [payload(float(label), image) for label, image in IMAGES], first_key=100)
    lines = path.with_suffix(".idx").read_text().splitlines()
    path.with_suffix(".idx").write_bytes("\r\n".join(lines[::-1]).encode())
    data = RecordDataset(path)
    assert data.labels.tolist() == [label for label, _ in IMAGES] and data.encoded(3)[0] == IMAGES[3][1]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(tmp_path: Path, method: str) -> None:
    data = RecordDataset(write(tmp_path, with_header(IMAGES, 3)), first_pixel)
    expected = [
        [first_pixel_of, label] for first_pixel_of, label in (data[index] for index in range(7))
    ]  # maps the file before
    loader = DataLoader(data, batch_size=3, num_workers=1 + (method == "fork"), multiprocessing_context=method)
    found = [torch.stack(batch, 1).tolist() for batch in loader]
    assert [pair for batch in found for pair in batch] == expected


def test_it_pickles(tmp_path: Path) -> None:
    data = RecordDataset(write(tmp_path, with_header(IMAGES, 3)))
    labels = data.labels
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.labels, labels) and again.encoded(5) == data.encoded(5) and len(again) == 7


def test_the_property_file_says_how_many_classes(tmp_path: Path) -> None:
    (tmp_path / "property").write_text("5,112,112\n")
    path = write(tmp_path, [payload(float(label), image) for label, image in IMAGES])
    assert RecordDataset(path).num_classes == 5
    write(tmp_path, with_header(IMAGES, 3))
    with pytest.raises(ValueError, match=r"property says 5 classes, but the header of .*train.rec 3"):
        RecordDataset(path)
    for text in (b"5,112", b"", b"a,b,c", b"\xff\xfe5,1,1"):
        (tmp_path / "property").write_bytes(text)
        with pytest.raises(ValueError, match="property must have classes, height and width"):
            RecordDataset(path)
    (tmp_path / "property").write_text("16777217,112,112")
    write(tmp_path, [payload(float(label), image) for label, image in IMAGES])
    with pytest.raises(ValueError, match="float32 there, which tells apart 16,777,216 at most"):
        RecordDataset(path)


@pytest.mark.parametrize("label", [2.0**24, -1.0, 0.5, float("nan"), float("inf"), 2.0**24 + 2])
def test_labels_that_are_no_exact_class(tmp_path: Path, label: float) -> None:
    data = RecordDataset(write(tmp_path, [payload(0.0, b"i"), payload(label, b"i")]))
    for use in (lambda: data.encoded(1), lambda: data.labels, lambda: data.num_classes):
        with pytest.raises(ValueError, match=r"record 1, at byte .* class id from 0 to 16,777,215, where float32"):
            use()
    assert data.encoded(0) == (b"i", 0)


def test_a_label_past_the_classes(tmp_path: Path) -> None:
    data = RecordDataset(write(tmp_path, with_header([*IMAGES, (3, IMAGES[0][1])], 3)))
    for use in (lambda: data.encoded(7), lambda: data.labels):
        with pytest.raises(ValueError, match=r"record 8, .* must have a label under 3, but it is 3"):
            use()


def test_a_header_that_float32_has_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at 42 million images, here with float32 as coarse as bfloat16: the records say where images end."""
    from amsoftmax_kernels.insightface import records

    def coarse(value: float) -> float:
        return float(torch.tensor(float(value)).bfloat16())

    class Numpy:
        float32 = staticmethod(coarse)

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

    images = [(0, b"i")] * 1001
    exact = with_header(images, 30)
    rounded = [payload([coarse(1002), coarse(1032)], b""), *exact[1:]]
    path = write(tmp_path, rounded)
    with pytest.raises(ValueError, match="there are 1032 keys, and images end before 1002"):
        RecordDataset(path)
    monkeypatch.setattr(records, "np", Numpy())
    data = RecordDataset(path)
    assert (len(data), data.num_classes) == (1001, 30)


@pytest.mark.parametrize(
    "ends", [(5.0, 11.0), (8.5, 11.0), (8.0, 12.0), (-1.0, 3.0), (9.0, 8.0), (float("nan"), 1.0), (1e30, 1e30)]
)
def test_headers_that_are_wrong(tmp_path: Path, ends: tuple[float, float]) -> None:
    records = [payload(ends, b""), *with_header(IMAGES, 3)[1:]]
    with pytest.raises(ValueError, match=r"record 0, at byte 0, (says that images end|must say where images)"):
        RecordDataset(write(tmp_path, records))


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    path = write(tmp_path, with_header(IMAGES, 3))
    other = write(tmp_path, [payload(1.0, bytes(400))] * 12, "other")
    index, whole = path.with_suffix(".idx"), path.read_bytes()
    good = index.read_text()
    index.write_bytes(other.with_suffix(".idx").read_bytes())
    with pytest.raises(ValueError, match=r"does not belong to .*train\.rec|belong together"):
        RecordDataset(path)
    lines = good.splitlines()
    offsets = [line.split("\t")[1] for line in lines]
    for shuffled in (offsets[::-1], [offsets[0], *offsets[1:][::-1]], [*offsets[3:], *offsets[:3]]):
        index.write_text("".join(f"{key}\t{offset}\n" for key, offset in enumerate(shuffled)))
        with pytest.raises(ValueError, match=r"out of order|says that images end"):
            RecordDataset(path)
    index.write_text(good)
    for size in (0, 3, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut short"):
            RecordDataset(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        RecordDataset(path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.idx"):
        RecordDataset(path)


@pytest.mark.parametrize("text", [
    "", "\n", "0 0\n", "0\t-4\n", "0\t1e3\n", "a\t0\n", "0\t\n", "\t0\n", "0\t0\t0\n", "0\t0\n1\n", "0\t0\n\n1\t8\n",
    "0\t2\n", "0\t0\n0\t0\n", "0\t0\n1\t0\n", "0\t99999999999999999999\n", "0\t900000000000000000\n", "x" * 100,
    "\x00" * 64, "0\t0\n" * 9,
])  # fmt: skip
def test_indices_that_are_none(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, [payload(1.0, b"image")])
    path.with_suffix(".idx").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path.with_suffix(".idx")))):
        RecordDataset(path)


def hostile() -> dict[str, bytes]:
    """Records that are no records."""
    good = framed(payload(1.0, b"image"))
    return {
        "magic": b"\0" + good[1:],
        "a length past the end": MAGIC + struct.pack("<I", (1 << 29) - 1) + bytes(40),
        "a middle at the start": MAGIC + struct.pack("<I", 2 << 29 | 8) + bytes(8),
        "an end at the start": MAGIC + struct.pack("<I", 3 << 29 | 8) + bytes(8),
        "an unknown kind": MAGIC + struct.pack("<I", 7 << 29 | 8) + bytes(8),
        "a start alone": MAGIC + struct.pack("<I", 1 << 29 | 8) + bytes(8),
        "a start in a start": (MAGIC + struct.pack("<I", 1 << 29 | 8) + bytes(8)) * 2,
        "no header": MAGIC + struct.pack("<I", 8) + bytes(8),
        "labels past the end": framed(struct.pack("<IfQQ", 1 << 31, 0.0, 0, 0)),
        "parts without end": MAGIC + struct.pack("<I", 1 << 29) + (MAGIC + struct.pack("<I", 2 << 29)) * 70_000 + good,
    }


@pytest.mark.parametrize("kind", list(hostile()))
def test_hostile_records(tmp_path: Path, kind: str) -> None:
    bad = hostile()[kind]
    (tmp_path / "train.rec").write_bytes(bad + bytes(-len(bad) % 4))
    (tmp_path / "train.idx").write_text("0\t0\n")
    with pytest.raises(ValueError, match="record 0, at byte 0,"):
        RecordDataset(tmp_path)


def test_images_that_do_not_decode(tmp_path: Path) -> None:
    picture = IMAGES[0][1]
    gif = b"GIF89a" + picture[6:]
    data = RecordDataset(write(tmp_path, [payload(0.0, each) for each in (picture, picture[:30], b"no image", gif)]))
    assert data[0][1] == 0
    for index in (1, 2, 3):
        with pytest.raises(ValueError, match=f"record {index}, .* is no image that Pillow can decode"):
            data[index]


def test_an_index_is_read_at_once(tmp_path: Path) -> None:
    """Numbers of all lengths, over the edges of chunks, against Python's own reading."""
    rng = np.random.default_rng(0)
    keys = rng.permutation(50_000)
    offsets = [int(10 ** rng.uniform(0, 17)) for _ in keys]
    path = tmp_path / "train.idx"
    path.write_text("".join(f"{key}\t{offset}\n" for key, offset in zip(keys, offsets, strict=True))[:-1])
    from amsoftmax_kernels.insightface import index_files

    for chunk in (1 << 24, 1000, 37):
        if chunk < 1000:
            path.write_text("\n".join(path.read_text().splitlines()[:300]))
            keys, offsets = keys[:300], offsets[:300]
        before, index_files._CHUNK = index_files._CHUNK, chunk
        try:
            found = read_index(path)
        finally:
            index_files._CHUNK = before
        order = np.argsort(keys)
        assert found[0].tolist() == keys[order].tolist() and found[1].tolist() == [offsets[each] for each in order]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_no_code_of_the_file_runs_and_no_handle_stays(tmp_path: Path) -> None:
    data = RecordDataset(write(tmp_path, with_header(IMAGES, 3)))
    data.encoded(0)
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        RecordDataset(data.path).encoded(1)
    assert not opened or len(os.listdir("/proc/self/fd")) <= opened + 1
