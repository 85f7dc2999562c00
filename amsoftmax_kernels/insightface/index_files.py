"""MXNet's .idx files: a line a record, its key and where it starts."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 22  # bytes at a time, which a core's cache can hold
_DIGITS = 18  # of the largest number: what an int64 holds, whatever they are


def read_index(path: str | os.PathLike[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys and offsets ``[n]``, in the order of the keys.

    Digits are summed up for all numbers of a chunk at once: 42 million lines take seconds.

    Raises:
        ValueError: a line is not ``key<TAB>offset``, or a key is there twice.
    """
    numbers: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
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
    keys, offsets = (np.concatenate([part[column] for part in numbers] or [np.empty(0, np.int64)]) for column in (0, 1))
    if (np.diff(keys) <= 0).any():
        order = np.argsort(keys, kind="stable")
        keys, offsets = keys[order], offsets[order]
        twice = np.flatnonzero(np.diff(keys) == 0)
        if len(twice):
            raise ValueError(f"{path} must have each key once, but {keys[twice[0]]} is there twice")
    return keys, offsets


def _numbers(data: bytes, path: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Key and offset of each line."""
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    text = np.frombuffer(data, np.uint8)
    digits = text - ord("0")  # others become 10 and more
    ends = np.flatnonzero(digits > 9)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    wrong = len(ends) % 2 or (text[ends[::2]] != ord("\t")).any() or (text[ends[1::2]] != ord("\n")).any()
    if wrong or (len(ends) and not 1 <= lengths.min() <= lengths.max() <= _DIGITS):
        line = next((each for each in data.split(b"\n") if not _is_line(each)), data[:40])
        raise ValueError(f"{path} must have lines of a key, a tab and an offset, but it has {line[:60]!r}")
    return _column(digits, ends[::2], lengths[::2]), _column(digits, ends[1::2], lengths[1::2])


def _column(digits: NDArray[np.uint8], ends: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers that end at these places, by Horner's rule for all at once; shorter ones join in later."""
    values = np.zeros(len(ends), np.int64)
    alike = int(lengths.min(initial=_DIGITS))
    for place in range(int(lengths.max(initial=0)), 0, -1):
        values *= 10
        if place <= alike:
            values += digits[ends - place]
        else:
            there = lengths >= place
            values[there] += digits[ends[there] - place]
    return values


def _is_line(line: bytes) -> bool:
    parts = line.split(b"\t")
    return not line or (len(parts) == 2 and all(part.isdigit() and len(part) <= _DIGITS for part in parts))
