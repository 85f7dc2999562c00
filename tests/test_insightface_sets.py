"""InsightFace's verification sets: what they hold, whichever Python and NumPy wrote them, and that nothing else is read."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amsoftmax_kernels.insightface import load_bin

IMAGES = [b"\xff\xd8 one", b"two" * 40, b"", b"\x89PNG\r\n four"]
SAME = [True, False]


def pickled(value: Any, protocol: int = 4) -> bytes:
    return pickle.dumps(value, protocol)


def of_python_2(images: list[bytes], same: list[bool]) -> bytes:
    """A list of str and a list of bool in a tuple, protocol 2, as Python 2's cPickle writes them."""
    text = b"".join(b"U" + bytes([len(each)]) + each for each in images)
    return b"\x80\x02](" + text + b"e](" + b"".join(b"\x88" if each else b"\x89" for each in same) + b"e\x86."


@pytest.mark.parametrize("written", [
    lambda: pickled((IMAGES, SAME)), lambda: pickled([tuple(IMAGES), tuple(SAME)], 5), lambda: pickled((IMAGES, [1, 0]), 3),
    lambda: of_python_2(IMAGES, SAME),
    lambda: pickled(([np.frombuffer(each, np.uint8) for each in IMAGES], np.array(SAME)), 4),
    lambda: pickled(([np.frombuffer(each, np.uint8) for each in IMAGES], SAME), 3).replace(b"numpy._core", b"numpy.core"),
], ids=["bytes", "tuples", "integers", "Python 2", "NumPy 2", "NumPy 1"])  # fmt: skip
def test_sets_of_all_writers(tmp_path: Path, written: Callable[[], bytes]) -> None:
    (tmp_path / "set.bin").write_bytes(written())
    images, same = load_bin(tmp_path / "set.bin")
    assert images == IMAGES and same.tolist() == SAME and all(type(each) is bytes for each in images)


class Runs:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


class Calls:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def test_no_code_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for hostile in (
        Runs(ran),
        Calls(eval, f"open({str(ran)!r}, 'w')"),
        Calls(getattr, "text", "upper"),
        Calls(np.memmap, str(ran)),
    ):
        for value in (hostile, ([hostile], []), (IMAGES, [True, hostile])):
            for protocol in range(6):
                (tmp_path / "set.bin").write_bytes(pickled(value, protocol))
                with pytest.raises(ValueError, match="must hold images and bools alone, but it asks for"):
                    load_bin(tmp_path / "set.bin")
    assert not ran.exists()


def test_arrays_allocate_nothing_that_the_file_has_not(tmp_path: Path) -> None:
    """A shape of 2⁶⁰ bytes with none of them there; NumPy itself would try."""
    good = pickled(([np.zeros(4, np.uint8)] * 2, [True]), 2)
    huge = io.BytesIO()
    writer = pickle._Pickler(huge, 4)  # type: ignore[attr-defined]
    array = Calls(np._core.multiarray._reconstruct, np.ndarray, (1 << 60,), b"b")  # type: ignore[attr-defined]
    writer.dump(([array, array], [True]))
    for data in (huge.getvalue(), good.replace(b"u1", b"O8"), good.replace(b"u1", b"f4")):
        (tmp_path / "set.bin").write_bytes(data)
        with pytest.raises(ValueError, match=r"set\.bin must hold images"):
            load_bin(tmp_path / "set.bin")


@pytest.mark.parametrize("value", [
    None, (), ([], [], []), (IMAGES, SAME, 1), (IMAGES[:3], SAME), (IMAGES, [True]), (["text"] * 4, SAME), (IMAGES, [2, 0]),
    (IMAGES, ["a", "b"]), (IMAGES, 3), ({}, []), ([IMAGES], [True]), {"images": IMAGES}, (IMAGES, [1.0, 0.0]),
], ids=str)  # fmt: skip
def test_pickles_of_something_else(tmp_path: Path, value: Any) -> None:
    (tmp_path / "set.bin").write_bytes(pickled(value))
    with pytest.raises(ValueError, match=r"set\.bin must hold"):
        load_bin(tmp_path / "set.bin")


def test_broken_files(tmp_path: Path) -> None:
    whole = pickled((IMAGES, SAME))
    broken = [whole[:end] for end in range(0, len(whole), 7)] + [b"\x00" * 50, b"PK\x03\x04", b"\x80\x04\x8e" + b"\xff" * 8]
    for data in [*broken, b"(" * 5000 + b".", b"\x80\x04\x95" + b"\xff" * 8 + b"."]:
        (tmp_path / "set.bin").write_bytes(data)
        with pytest.raises(ValueError, match=r"set\.bin must be a verification set"):
            load_bin(tmp_path / "set.bin")
    with pytest.raises(FileNotFoundError):
        load_bin(tmp_path / "none.bin")
