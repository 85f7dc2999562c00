"""MXNet's .idx files: a line a record, its key and where it starts."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 24  # bytes at a time
_DIGITS = 18  # of the largest number: what an int64 holds, whatever they are


def read_index(path: str | os.PathLike[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys and offsets ``[n]``, in the order of the keys.

    Digits are summed up for all numbers of a chunk at once: 42 million lines take seconds.

    Raises:
        ValueError: a line is not ``key<TAB>offset``, or a key is there twice.
    """
    numbers: list[NDArray[np.int64]] = []
    with open(path, "rb") as file:
        rest = b""
        while data := file.read(_CHUNK):
            data = rest + data
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            numbers.append(_numbers(data[:end], path))
            if len(rest) > _CHUNK:
                break
    if rest:
        numbers.append(_numbers(rest + b"\n", path))
    pairs = np.concatenate(numbers) if numbers else np.empty((0, 2), np.int64)
    keys, offsets = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
    if (np.diff(keys) <= 0).any():
        order = np.argsort(keys, kind="stable")
        keys, offsets = keys[order], offsets[order]
        twice = np.flatnonzero(np.diff(keys) == 0)
        if len(twice):
            raise ValueError(f"{path} must have each key once, but {keys[twice[0]]} is there twice")
    return keys, offsets


def _numbers(data: bytes, path: Any) -> NDArray[np.int64]:
    """Key and offset of each line, ``[lines, 2]``."""
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    text = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero((text == ord("\t")) | (text == ord("\n")))
    digits = text - ord("0")  # others become 10 and more
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    wrong = len(ends) % 2 or (text[ends[::2]] != ord("\t")).any() or (text[ends[1::2]] != ord("\n")).any()
    if wrong or (len(ends) and not 1 <= lengths.min() <= lengths.max() <= _DIGITS) or int((digits > 9).sum()) != len(ends):
        line = next((each for each in data.split(b"\n") if not _is_line(each)), data[:40])
        raise ValueError(f"{path} must have lines of a key, a tab and an offset, but it has {line[:60]!r}")
    values = np.zeros(len(ends), np.int64)
    for place in range(int(lengths.max(initial=0))):  # from the last digit on
        there = lengths > place
        if there.all():
            values += digits[ends - 1 - place].astype(np.int64) * 10**place
        else:
            values[there] += digits[ends[there] - 1 - place].astype(np.int64) * 10**place
    return values.reshape(-1, 2)


def _is_line(line: bytes) -> bool:
    parts = line.split(b"\t")
    return not line or (len(parts) == 2 and all(part.isdigit() and len(part) <= _DIGITS for part in parts))
