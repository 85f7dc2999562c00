"""Arrays, features and lists of features in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from amsoftmax_kernels.evaluation.feature_files import read_feature


def array(name: str) -> Any:
    """An array of a .npy, .npz or .txt file; nothing in it is unpickled.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none of these, or its .npz has several arrays of which none is named.
    """
    path, _, member = name.partition(".npz:")
    if member or path.endswith(".npz"):
        with np.load(path if path.endswith(".npz") else f"{path}.npz", allow_pickle=False) as found:
            names = list(found)
            if not member and len(names) != 1:
                raise ValueError(f"{name} has {', '.join(names) or 'nothing'}: name one, as in {name}:NAME")
            if member and member not in names:
                raise ValueError(f"{path}.npz has {', '.join(names)}, not {member}")
            return found[member or names[0]]
    if path.endswith(".npy"):
        return np.load(path, mmap_mode="c", allow_pickle=False)
    if path.endswith(".txt"):
        return np.loadtxt(path, dtype=np.int64, ndmin=1)
    raise ValueError(f"{name} must be .npy, .npz or .txt")


def streamed(name: str) -> Any:
    """Features ``[N, D]`` that are read when they are needed: a mapped array, or a list of MegaFace's files.

    Raises:
        OSError: the file or folder cannot be read.
        ValueError: there are no such files.
    """
    path = Path(name)
    if path.is_dir():
        paths = sorted(path.rglob("*.bin"))
    elif path.suffix == ".bin":
        paths = [path]
    elif path.suffix == ".txt":
        paths = [path.parent / line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        return array(name)
    if not paths:
        raise ValueError(f"{name} has no .bin files")
    return paths


def features(name: str) -> Any:
    """Features ``[N, D]``, in memory or mapped.

    Raises:
        OSError: the file or folder cannot be read.
        ValueError: there are no such files, or their dimensions differ.
    """
    found = streamed(name)
    if not isinstance(found, list):
        return found
    rows = [read_feature(path) for path in found]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{name} must have features of one dimension, but it has {sorted({len(row) for row in rows})}")
    return np.stack(rows)
