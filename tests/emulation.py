"""The CUDA backend without a GPU: csrc compiled by the host's compiler, for the GPU that tests/emulator is."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from amsoftmax_kernels.backends import cuda
from amsoftmax_kernels.backends.cuda import build
from amsoftmax_kernels.backends.cuda import library as cuda_library

EMULATOR = Path(__file__).with_name("emulator")


class Change(NamedTuple):
    """``new`` in the place of ``old``, which a file of csrc has once."""

    file: str
    old: str
    new: str


def emulated(hopper: bool = False, changes: Sequence[Change] = ()) -> cuda_library.Library:
    """csrc as it stands, or with changes; ``hopper``: with Hopper's own kernels, which take CUTLASS's and CUDA's headers.

    From the cache, as far as what it depends on is there.
    """
    if (reason := _missing(hopper)) is not None:
        pytest.skip(reason)
    texts = {path.name: path.read_text(encoding="utf-8") for path in build.sources().iterdir() if path.is_file()}
    for file, old, new in changes:
        assert texts[file].count(old) == 1, f"{file} must have this once: {old}"
        texts[file] = texts[file].replace(old, new)
    for path in EMULATOR.iterdir():
        texts[path.name] = path.read_text(encoding="utf-8")
    sources = [name for name in texts if name.endswith((".cu", ".cpp")) and (hopper or name not in build.HOPPER_SOURCES)]
    sources.sort(key=lambda name: (name not in build.HOPPER_SOURCES, name))  # the longest to compile first
    folder = build.cache() / "emulated"
    objects = [folder / f"{name}-{_key(_command(name, hopper), texts, name)}.o" for name in sources]
    library = folder / f"{hashlib.sha256(str(objects).encode()).hexdigest()[:24]}.so"
    with _alone(library), tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        for file, text in texts.items():
            (Path(name) / file).write_text(text, encoding="utf-8")
        for path in (*objects, library):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
        missing = [pair for pair in zip(sources, objects, strict=True) if not pair[1].exists()]
        list(pool.map(lambda pair: _make([*_command(pair[0], hopper), "-c", f"{name}/{pair[0]}"], pair[1]), missing))
        if not library.exists():
            _make(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects)], library)
    found = cuda_library.Library(library)
    found.check(torch.device("cpu"))  # which lets kernels have their shared memory, as on a GPU
    return found


def seed(library: cuda_library.Library, number: int) -> None:
    """What decides the order of events from now on."""
    ctypes.c_uint.in_dll(library._library, "emulator_seed").value = number


def last_block(library: cuda_library.Library) -> tuple[int, int]:
    """Threads of a block of the last launch, and its bytes of dynamic shared memory."""
    threads, shared = (ctypes.c_uint.in_dll(library._library, f"emulator_{name}").value for name in ("threads", "shared"))
    return threads, shared


@contextlib.contextmanager
def only_checked(library: cuda_library.Library) -> Iterator[ctypes.c_ulonglong]:
    """Launches are checked, counted and not run; their number."""
    checks = ctypes.c_uint.in_dll(library._library, "emulator_only_checks")
    launches = ctypes.c_ulonglong.in_dll(library._library, "emulator_launches")
    checks.value, launches.value = 1, 0
    try:
        yield launches
    finally:
        checks.value = 0


def serve(library: cuda_library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA backend by this library, on CPU tensors."""
    monkeypatch.setattr(cuda, "_library", lambda device: library)
    monkeypatch.setattr(cuda, "_tiling", library.tiling)
    monkeypatch.setattr(cuda, "_grad_clusters", library.grad_clusters)
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    served = (torch.float16, torch.bfloat16, torch.float32)
    monkeypatch.setattr(cuda, "refusal", lambda device, dtype: None if dtype in served else f"it does not serve {dtype}")


def _missing(hopper: bool) -> str | None:
    """What this machine lacks for it; None if nothing."""
    if shutil.which("g++") is None:
        return "no g++ to compile the emulation"
    if hopper and build.find_cutlass() is None:
        return f"no CUTLASS headers: pip install {build.CUTLASS}"
    return "no CUDA headers beside nvcc" if hopper and _cuda_headers() is None else None


def _cuda_headers() -> Path | None:
    nvcc = build.find_nvcc()
    folders = [Path(nvcc).resolve().parents[1] / "include", Path("/usr/local/cuda/include")] if nvcc else []
    return next((each for each in folders if (each / "cuda_runtime.h").is_file()), None)


@functools.cache
def _version() -> str:
    cutlass = build.find_cutlass()
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    return f"{compiler} CUTLASS {cutlass and build.cutlass_version(cutlass)}"


def _key(command: Sequence[str], texts: dict[str, str], source: str) -> str:
    """A name that changes with whatever an object depends on."""
    wanted, found = [source, *(["cutlass.h"] if "cutlass.h" in command else [])], set[str]()
    while wanted:
        if (name := wanted.pop()) in texts and name not in found:
            found.add(name)
            wanted += re.findall(r'^#include "(.+)"', texts[name], re.MULTILINE)
    parts = [_version(), *command, *(name + texts[name] for name in sorted(found))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _command(source: str, hopper: bool) -> list[str]:
    flags = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-x", "c++"]
    if source in ("library.cu", *build.HOPPER_SOURCES):
        flags += [f"-DAK_CONTRACT={build.contract()}", *(["-DAK_CUTLASS"] if hopper else [])]
    if source not in build.HOPPER_SOURCES:
        return [*flags, "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    cutlass, headers = build.find_cutlass(), _cuda_headers()
    assert cutlass is not None and headers is not None
    folders = [part for each in (cutlass, headers, headers / "cccl") for part in ("-isystem", str(each))]
    return [*flags, "-O1", "-w", *folders, "-include", "cutlass.h"]  # more optimized, it takes twice as long


def _make(command: list[str], out: Path) -> None:
    unfinished = out.with_suffix(f".{os.getpid()}")
    folders = ["-I", str(Path(command[-1]).parent)] if "-c" in command else []
    result = subprocess.run([*command, *folders, "-o", str(unfinished)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    os.replace(unfinished, out)


@contextlib.contextmanager
def _alone(library: Path) -> Iterator[None]:
    """The first process to come builds, the others find it built. What has not been asked for in a week goes."""
    library.parent.mkdir(parents=True, exist_ok=True)
    for path in library.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 7 * 24 * 3600:
                path.unlink()
    with open(library.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
