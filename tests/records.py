"""Writes what InsightFace's tools write: .rec and .idx, with a header or without, records split as RecordIO splits them."""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAGIC = struct.pack("<I", 0xCED7230A)


def framed(payload: bytes) -> bytes:
    """A record, in parts where the magic is in it at a multiple of 4."""
    cuts = [at for at in range(0, len(payload) - 3, 4) if payload[at : at + 4] == MAGIC]
    edges = [-4, *cuts, len(payload)]
    parts = [payload[low + 4 : high] for low, high in itertools.pairwise(edges)]
    framed = b""
    for number, part in enumerate(parts):
        kind = 0 if len(parts) == 1 else 1 if number == 0 else 3 if number == len(parts) - 1 else 2
        framed += MAGIC + struct.pack("<I", kind << 29 | len(part)) + part + bytes(-len(part) % 4)
    return framed


def payload(label: float | Sequence[float], image: bytes, number: int = 0) -> bytes:
    if isinstance(label, (int, float)):
        return struct.pack("<IfQQ", 0, label, number, 0) + image
    return struct.pack("<IfQQ", len(label), 0.0, number, 0) + struct.pack(f"<{len(label)}f", *label) + image


def png(colour: int, size: tuple[int, int] = (6, 5)) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size, (colour % 256, colour // 256 % 256, 7)).save(file, "png")
    return file.getvalue()


def write(folder: Path, payloads: Sequence[bytes], name: str = "train", first_key: int = 0) -> Path:
    """The .rec and .idx of these records."""
    offset, lines = 0, []
    with open(folder / f"{name}.rec", "wb") as file:
        for key, each in enumerate(payloads, first_key):
            lines.append(f"{key}\t{offset}\n")
            offset += file.write(framed(each))
    (folder / f"{name}.idx").write_text("".join(lines))
    return folder / f"{name}.rec"


def with_header(images: Sequence[tuple[Any, bytes]], identities: int, first: float | None = None) -> list[bytes]:
    """A header, images with their labels, and a record an identity."""
    end = len(images) + 1 if first is None else first
    return [
        payload([end, end + identities], b""),
        *(payload(label, image, key) for key, (label, image) in enumerate(images, 1)),
        *(payload([1, 2], b"") for _ in range(identities)),
    ]
