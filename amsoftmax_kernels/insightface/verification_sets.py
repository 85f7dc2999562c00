"""InsightFace's verification sets, such as ``lfw.bin``: pickles, read without running what a pickle may run."""

from __future__ import annotations

import io
import os
import pickle
from typing import Any

import torch
from torch import Tensor


def load_bin(path: str | os.PathLike[str]) -> tuple[list[bytes], Tensor]:
    """Encoded images of pairs, and which pairs are of one person.

    The file is a pickle of a list of images and a list of bools. It is read by an unpickler that builds those alone, bytes
    and arrays of bytes: a file with anything else in it is refused, and nothing of it runs.

    Args:
        path: of the .bin.

    Returns:
        2P images as bytes, JPEG or PNG, of which 2i and 2i + 1 are a pair; and ``[P]`` bool.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or cut short.

    Example:
        >>> import pickle
        >>> from amsoftmax_kernels.insightface import load_bin
        >>> with open("small.bin", "wb") as file:
        ...     pickle.dump(([b"one", b"two", b"three", b"four"], [True, False]), file)
        >>> images, same = load_bin("small.bin")
        >>> images[2], same
        (b'three', tensor([ True, False]))
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except _Refused as error:
        raise ValueError(f"{path} must hold images and bools alone, but it asks for {error}") from error
    except Exception as error:  # of many kinds, as a file can be cut anywhere
        raise ValueError(f"{path} must be a verification set of InsightFace's, but it cannot be read: {error}") from error
    if not isinstance(found, (tuple, list)) or len(found) != 2 or not isinstance(found[0], (list, tuple)):
        raise ValueError(f"{path} must hold a list of images and a list of bools, but it holds something else")
    images = [_image(each, path) for each in found[0]]
    same = _bools(found[1], path)
    if len(images) != 2 * len(same):
        raise ValueError(f"{path} must hold two images a pair, but it has {len(images)} images and {len(same)} pairs")
    return images, torch.tensor(same, dtype=torch.bool)


class _Refused(Exception):
    """A name that a verification set has no need of."""


class _Dtype:
    """Stands for ``numpy.dtype``: the dtype's text, such as u1."""

    def __init__(self, text: Any = None, *_: Any) -> None:
        self.text = text.decode("ascii", "replace") if isinstance(text, bytes) else text

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes have not."""


class _Array:
    """Stands for ``numpy.ndarray``: NumPy would allocate what the file tells it to."""

    dtype: Any = None
    data: Any = None

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, _, self.dtype, _, self.data = state


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,  # NumPy 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def _image(value: Any, path: Any) -> bytes:
    content = _content(value, "u1")
    if content is None:
        raise ValueError(f"{path} must hold images as bytes, but one is something else")
    return content


def _bools(value: Any, path: Any) -> list[bool]:
    content = _content(value, "b1")
    flags = list(content) if content is not None else value
    if not isinstance(flags, (list, tuple)) or not all(isinstance(each, (bool, int)) and each in (0, 1) for each in flags):
        raise ValueError(f"{path} must hold a list of bools, but it holds something else")
    return [bool(each) for each in flags]


def _content(value: Any, text: str) -> bytes | None:
    """What bytes or an array of this dtype hold; None for anything else."""
    if isinstance(value, _Array):
        known = isinstance(value.dtype, _Dtype) and value.dtype.text == text
        value = value.data if known else None
    return value if type(value) is bytes else None
