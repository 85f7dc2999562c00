"""InsightFace's training sets: MXNet's RecordIO files, memory-mapped, read a record at a time."""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .index_files import read_index

_MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", _MAGIC)
_WHOLE, _START, _MIDDLE, _END = range(4)  # a record, or a part of one that was split where the magic occurred in it
_HEADER = struct.Struct("<IfQQ")  # flag, label, id, id2
_PARTS = 1 << 16  # more than any image is split into
_EXACT = 1 << 24  # from which on float32 has not every integer
_LABELS = 1 << 16  # records whose labels are read at a time
_CHECKED = 32  # records that are looked at when a file is opened
_FORMATS = ("JPEG", "PNG")


class Record(NamedTuple):
    """A record's labels ``[n]`` float32, one for a plain image, and its encoded image."""

    labels: tuple[float, ...]
    has_vector: bool
    image: bytes


class RecordDataset(Dataset[tuple[Any, int]]):
    """Images and labels of InsightFace's ``train.rec`` and ``train.idx``, as a ``torch.utils.data.Dataset``.

    Opening reads the .idx and a few records; the .rec is memory-mapped, so that workers of a DataLoader, forked or spawned,
    share it. A first record with a header says how many images there are, and that one record an identity follows them;
    without it all records are images. Images are in the order of their keys. Decoding is Pillow's, and its transforms are
    yours.

    Labels are float32 in these files: class ids from 2²⁴ on are refused, as two may have become one.

    Args:
        path: of the .rec, whose .idx is beside it, or of the folder with ``train.rec``.
        transform: called with the image, a ``PIL.Image`` in RGB; None hands over the image.

    Attributes:
        num_classes: from the ``property`` file beside the .rec, else from the header, else from the labels.
        labels: ``[N]`` int64, read when they are first asked for, without decoding an image.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short or no such file, the two do not belong together, or a number in them is not exact.

    Example:
        >>> import io, struct
        >>> from PIL import Image
        >>> from amsoftmax_kernels.insightface import RecordDataset
        >>> png = io.BytesIO()
        >>> Image.new("RGB", (4, 4), "red").save(png, "png")
        >>> payload = struct.pack("<IfQQ", 0, 3.0, 0, 0) + png.getvalue()
        >>> padding = bytes(-len(payload) % 4)
        >>> with open("train.rec", "wb") as file:
        ...     _ = file.write(struct.pack("<II", 0xCED7230A, len(payload)) + payload + padding)
        >>> with open("train.idx", "w") as file:
        ...     _ = file.write("0\\t0\\n")
        >>> data = RecordDataset("train.rec", transform=lambda image: image.size)
        >>> data[0], data.num_classes
        (((4, 4), 3), 4)
    """

    def __init__(self, path: str | os.PathLike[str], transform: Callable[[Any], Any] | None = None) -> None:
        path = Path(path)
        self.path = path / "train.rec" if path.is_dir() else path
        self.transform = transform
        self._map: mmap.mmap | None = None
        self._starts: np.ndarray[Any, Any] | None = None  # the offsets, as NumPy reads one in a tenth of PyTorch's time
        keys, offsets = read_index(self.path.with_suffix(".idx"))
        self._size = self.path.stat().st_size
        self._check_offsets(offsets)
        # Tensors, as they travel to spawned workers in shared memory.
        self._offsets = torch.from_numpy(offsets)
        self._keys = None if keys[-1] == len(keys) - 1 else torch.from_numpy(keys)  # None: from 0 on without gaps
        self._first, self._count, identities = self._images()
        stated = _property(self.path.with_name("property"))
        if None not in (stated, identities) and stated != identities:
            raise ValueError(
                f"{self.path.with_name('property')} says {stated} classes, but the header of {self.path} {identities}"
            )
        self._classes = stated if stated is not None else identities
        if self._classes is not None and self._classes > _EXACT:
            raise ValueError(
                f"{self.path} has {self._classes:,} classes: labels are float32 there, which tells apart 16,777,216 at most"
            )
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def num_classes(self) -> int:
        if self._classes is None:
            self._classes = int(self.labels.max()) + 1 if len(self) else 0
        return self._classes

    @property
    def labels(self) -> Tensor:
        if self._labels is None:
            self._labels = self._read_labels()
        return self._labels

    def encoded(self, index: int) -> tuple[bytes, int]:
        """The image as it is in the file, a JPEG's bytes say, and its label.

        Raises:
            IndexError: there is no such image.
            ValueError: the record is broken.
        """
        place = range(self._count)[index] + self._first
        record = self._record(place)
        if not record.image:
            raise ValueError(f"{self._named(place)} has no image")
        return record.image, self._label(record.labels[0], place)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        encoded, label = self.encoded(index)
        try:
            with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
                decoded = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for broken files
            place = range(self._count)[index] + self._first
            raise ValueError(f"{self._named(place)} is no image that Pillow can decode: {error}") from error
        return (decoded if self.transform is None else self.transform(decoded)), label

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped file, which a worker opens anew."""
        return vars(self) | {"_map": None, "_starts": None}

    def _bytes(self) -> mmap.mmap:
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def _named(self, place: int) -> str:
        key = place if self._keys is None else int(self._keys[place])
        return f"{self.path}: record {key}, at byte {int(self._offsets[place])},"

    def _check_offsets(self, offsets: np.ndarray[Any, Any]) -> None:
        index = self.path.with_suffix(".idx")
        if not len(offsets):
            raise ValueError(f"{index} must have a line a record, but it is empty")
        if (offsets % 4).any() or offsets.max() + 8 > self._size:
            raise ValueError(f"{index} does not belong to {self.path}, or that is cut short: it has {self._size} bytes")
        if (np.diff(offsets) <= 0).any() and len(np.unique(offsets)) != len(offsets):
            raise ValueError(f"{index} must have each offset once")

    def _images(self) -> tuple[int, int, int | None]:
        """The place of the first image, how many there are, and the number of identities if the header says it."""
        total = len(self._offsets)
        places = {*np.linspace(0, total - 1, min(total, _CHECKED)).astype(int).tolist(), int(self._offsets.argmax())}
        checked = {place: self._record(place) for place in sorted(places)}
        header = checked[0]
        if not (header.has_vector and len(header.labels) >= 2 and not header.image):
            self._check_kinds(checked, 0, total)
            return 0, total, None
        ends = header.labels[:2]
        if not (1 <= ends[0] <= ends[1] < math.inf) or ends[0] % 1 or ends[1] % 1:
            raise ValueError(f"{self._named(0)} must say where images and identities end, but it has {ends}")
        if self._keys is not None:
            raise ValueError(
                f"{self.path.with_suffix('.idx')} must have keys from 0 on without gaps, as its header counts them"
            )
        end = self._first_identity(round(ends[0]))
        # The header's numbers are float32 too: the .idx and the records are exact, and must round to them.
        if (float(np.float32(end)), float(np.float32(total))) != ends:
            raise ValueError(
                f"{self._named(0)} says that images end before key {ends[0]:.0f} and identities before {ends[1]:.0f}, but "
                f"there are {total} keys, and images end before {end}"
            )
        self._check_kinds(checked, 1, end)
        return 1, end - 1, total - end

    def _check_kinds(self, records: dict[int, Record], first: int, end: int) -> None:
        """That records are images where there should be images, and there alone."""
        for place, record in records.items():
            if place >= first and bool(record.image) != (place < end):
                raise ValueError(
                    f"{self._named(place)} has {'an' if record.image else 'no'} image, where there should be "
                    f"{'one' if place < end else 'an identity'}: is the .idx another's, or out of order?"
                )

    def _first_identity(self, stated: int) -> int:
        """The key of the first record of an identity, which has no image: near where the header says, if that is exact."""
        low, high = 1, len(self._offsets)  # images before low, identities from high on
        for probe in (stated, stated - 1):
            if low <= probe < high:
                low, high = (low, probe) if self._is_identity(probe) else (probe + 1, high)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_identity(middle) else (middle + 1, high)
        return low

    def _is_identity(self, place: int) -> bool:
        record = self._record(place)
        return record.has_vector and not record.image

    def _record(self, place: int) -> Record:
        payload = self._payload(place)
        if len(payload) < _HEADER.size:
            raise ValueError(f"{self._named(place)} must have a header of 24 bytes, but it has {len(payload)} in all")
        flag, label, _, _ = _HEADER.unpack_from(payload)
        image = _HEADER.size + 4 * flag
        if image > len(payload):
            raise ValueError(f"{self._named(place)} must have {flag} labels, but it has {len(payload)} bytes in all")
        labels = struct.unpack_from(f"<{flag}f", payload, _HEADER.size) if flag else (label,)
        return Record(labels, flag > 0, payload[image:])

    def _payload(self, place: int) -> bytes:
        """A record's bytes; of a split one the parts, with the magic between them that split it."""
        if self._starts is None:
            self._starts = self._offsets.numpy()
        data, offset = self._bytes(), int(self._starts[place])
        parts: list[bytes] = []
        for _ in range(_PARTS):
            if offset + 8 > self._size:
                raise ValueError(f"{self._named(place)} is cut short: the file has {self._size} bytes")
            magic, length = struct.unpack_from("<II", data, offset)
            kind, length = length >> 29, length & ((1 << 29) - 1)
            if magic != _MAGIC:
                raise ValueError(
                    f"{self._named(place)} does not start with RecordIO's magic number: do .idx and .rec belong together?"
                )
            if (kind in (_WHOLE, _START)) == bool(parts) or kind > _END:
                raise ValueError(f"{self._named(place)} starts or goes on with a part of another record")
            if offset + 8 + length > self._size:
                raise ValueError(f"{self._named(place)} is cut short: the file has {self._size} bytes")
            parts.append(data[offset + 8 : offset + 8 + length])
            if kind in (_WHOLE, _END):
                return parts[0] if len(parts) == 1 else _MAGIC_BYTES.join(parts)
            offset += 8 + length + -length % 4
        raise ValueError(f"{self._named(place)} is in more than {_PARTS} parts")

    def _label(self, value: float, place: int) -> int:
        if not 0 <= value < _EXACT or value != int(value):
            raise ValueError(
                f"{self._named(place)} must have a class id from 0 to 16,777,215, where float32 is exact, but it is {value}"
            )
        if self._classes is not None and value >= self._classes:
            raise ValueError(f"{self._named(place)} must have a label under {self._classes}, but it is {int(value)}")
        return int(value)

    def _read_labels(self) -> Tensor:
        """All labels: of each record the first 36 bytes alone, many records at a time."""
        data = np.frombuffer(self._bytes(), np.uint8)
        offsets = self._offsets.numpy()[self._first : self._first + self._count]
        labels = np.empty(len(offsets), np.float32)
        for start in range(0, len(offsets), _LABELS):
            part = offsets[start : start + _LABELS]
            if part.max() + 36 > self._size:  # a plain record at the end may be shorter
                heads = np.stack([np.frombuffer(bytes(data[at : at + 36]).ljust(36, b"\0"), np.uint8) for at in part])
            else:
                heads = data[part[:, None] + np.arange(36)]
            magic, size, flag = (heads[:, at : at + 4].copy().view("<u4")[:, 0] for at in (0, 4, 8))
            plain, vector = (heads[:, at : at + 4].copy().view("<f4")[:, 0] for at in (12, 32))
            labels[start : start + _LABELS] = np.where(flag > 0, vector, plain)
            # What these bytes do not tell is read in full: records split within them, and broken ones, for the error.
            for odd in np.flatnonzero((magic != _MAGIC) | (size >> 29 != _WHOLE) | (size < 28)):
                labels[start + odd] = self._record(start + int(odd) + self._first).labels[0]
        limit = _EXACT if self._classes is None else self._classes
        wrong = ~((labels >= 0) & (labels < limit) & (labels == np.floor(labels)))
        if wrong.any():
            place = int(np.flatnonzero(wrong)[0])
            self._label(float(labels[place]), place + self._first)
        return torch.from_numpy(labels.astype(np.int64))


def _property(path: Path) -> int | None:
    """The number of classes in a property file, ``classes,height,width``; None if there is none.

    Raises:
        ValueError: the file is another.
    """
    try:
        text = path.read_text(encoding="ascii")[:200].strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must have classes, height and width, with commas between them, but it is no text"
        ) from error
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{path} must have classes, height and width, with commas between them, but it has {text!r}")
    return int(parts[0])
