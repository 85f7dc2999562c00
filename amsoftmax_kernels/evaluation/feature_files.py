"""Features that are streamed: rows of an array that need not be in memory, or MegaFace's files, one a feature."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..values import type_name
from . import inputs
from .counting import Array

_HEADER = 16  # bytes: four int32, of which the first is the dimension, then 1, 4 and 5
_REST = (1, 4, 5)


def read_feature(path: str | os.PathLike[str]) -> Array:
    """A feature ``[D]`` float32 from a file as MegaFace's development kit reads and InsightFace writes them.

    Raises:
        ValueError: the header is another, or the file is longer or shorter than it says.
    """
    data = Path(path).read_bytes()
    header = np.frombuffer(data, "<i4", 4).tolist() if len(data) >= _HEADER else []
    if not header or tuple(header[1:]) != _REST or header[0] < 1:
        raise ValueError(f"{path} must start with four int32 (dimension, 1, 4, 5), but it starts with {header}")
    if len(data) != _HEADER + 4 * header[0]:
        raise ValueError(f"{path} must have {header[0]} float32 after its header, but it has {len(data) - _HEADER} bytes")
    return np.frombuffer(data, "<f4", offset=_HEADER).astype(np.float32)


class Stream:
    """Rows ``[N, D]`` that are read when they are needed, by several threads.

    Args:
        name: of the argument.
        source: a tensor, an array such as a memory-mapped one, or a sequence of paths of MegaFace's files.
        dim: D.

    Raises:
        TypeError: it is something else.
        ValueError: its dimension is not D.
    """

    def __init__(self, name: str, source: Any, dim: int) -> None:
        self.name, self.dim = name, dim
        if isinstance(source, Tensor) or hasattr(source, "__array__"):
            self.paths: Sequence[Any] | None = None
            self.matrix = inputs.matrix(name, source, dim)
        elif isinstance(source, Sequence) and not isinstance(source, (str, bytes)) and all(map(_is_path, source[:1])):
            self.paths = source
        else:
            raise TypeError(f"{name} must be a tensor, an array or a sequence of paths, but it is {type_name(source)}")

    def __len__(self) -> int:
        return len(self.matrix if self.paths is None else self.paths)

    def unit(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Rows ``start`` to ``stop``, normalized, of the dtype and on the device of ``like``.

        Raises:
            OSError: a file cannot be read.
            ValueError: a row is not finite, or a file is no feature of D dimensions.
        """
        if self.paths is None:
            rows = self.matrix[start:stop]
        else:
            rows = torch.from_numpy(np.stack([self._read(path) for path in self.paths[start:stop]]))
        return inputs.unit_rows(self.name, rows.to(like.device), start, like.dtype)

    def _read(self, path: Any) -> Array:
        feature = read_feature(path)
        if len(feature) != self.dim:
            raise ValueError(f"{self.name} must have {self.dim} dimensions, but {path} has {len(feature)}")
        return feature


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))
