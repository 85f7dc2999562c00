"""Every launch that the public options make, on drivers that check each as CUDA's does and run none."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
from ctypes import POINTER, c_int, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch

from amsoftmax_kernels.backends import chunking, cuda, fused

from . import strict_driver
from .emulation import only_checked, serve

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
ROOT = Path(__file__).parents[1]
BFLOAT16, SWIZZLE_128B = 9, 3


def run(*arguments: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.strict_driver", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found | {"errors": result.stderr}


def test_no_triton_launch_is_refused() -> None:
    found = run("launches", "--quick")
    assert found["refused"] == 0 and found["maps"] > 2000 and found["launches"] > 2000


def test_a_wrong_launch_is_refused() -> None:
    found = run("wrong")
    assert found["refused"] == 1 and "the driver refuses a grid's second side: 70000" in found["errors"]


RIGHT: dict[str, Any] = {
    "address": 1 << 20, "extent": (512, 1000), "stride": 1024, "box": (64, 128), "step": (1, 1), "interleave": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, ""), ({"address": 8}, "an address"), ({"extent": (0, 1000)}, "an extent"), ({"extent": (512, 0)}, "an extent"),
        ({"stride": 1032}, "a stride in bytes"), ({"stride": 512}, "less than a row"), ({"box": (64, 257)}, "a box's side"),
        ({"box": (4, 128)}, "no multiple of 16 bytes"), ({"box": (128, 128)}, "wider than its swizzle"),
        ({"step": (0, 1)}, "an element stride"), ({"interleave": 1}, "an interleaved layout"),
    ],
)  # fmt: skip
def test_what_the_driver_says_of_a_tensor_map(
    wrong: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "driver.so"
    strict_driver.build(path)
    encode = ctypes.CDLL(str(path)).cuTensorMapEncodeTiled
    encode.argtypes = [
        c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32), POINTER(c_uint32),
        c_int, c_int, c_int, c_int,
    ]  # fmt: skip
    how = RIGHT | wrong
    error = encode(
        ctypes.create_string_buffer(128), BFLOAT16, 2, how["address"], (c_uint64 * 2)(*how["extent"]),
        (c_uint64 * 1)(how["stride"]), (c_uint32 * 2)(*how["box"]), (c_uint32 * 2)(*how["step"]),
        how["interleave"], SWIZZLE_128B, 0, 0,
    )  # fmt: skip
    assert (error != 0) == bool(message) and message in capfd.readouterr().err


@pytest.mark.parametrize("kernels", ["emulated_library", "hopper_library"])
def test_no_cpp_launch_is_refused(kernels: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the portable kernels, and of Hopper's own, whose matrices are described to bulk copies besides."""
    library = request.getfixturevalue(kernels)
    serve(library, monkeypatch)
    monkeypatch.setattr(fused, "_product", lambda a, b, out: out)
    with only_checked(library) as launches:
        _launch_everything(monkeypatch)
        assert launches.value > 2000
        monkeypatch.setattr(cuda._Kernels, "streams", lambda *_: 140_000)
        with pytest.raises(RuntimeError, match="ak_cosine_exp: invalid configuration argument"):
            strict_driver.step(70, 512, 1000, torch.bfloat16, torch.float32, backend="cuda")


def _launch_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for D, (B, C), options, save_bytes in itertools.product(
        (512, 100, 3), strict_driver.SHAPES, strict_driver.OPTIONS, (1 << 40, 0)
    ):
        monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", 1 << 18 if B == 256 else 1 << 27)
        strict_driver.step(B, D, C, torch.bfloat16, torch.float32, backend="cuda", save_bytes=save_bytes, **options)
    for dtype in (torch.float32, torch.bfloat16):
        strict_driver.updated_steps(70, 512, 1000, dtype, backend="cuda")
