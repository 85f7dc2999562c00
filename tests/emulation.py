"""The CUDA backend without a GPU: its sources compiled for the CPU, where every thread of every kernel is emulated."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from amsoftmax_kernels.backends import cuda
from amsoftmax_kernels.backends.cuda import build
from amsoftmax_kernels.backends.cuda import library as cuda_library


def build_emulated(folder: Path, *more: str) -> cuda_library.Library:
    """csrc compiled by the host's compiler, its GPU threads run one after the other; ``more``: options and objects."""
    options = _compiler() + [each for each in more if each.startswith("-D")]
    sources = [each for each in sorted(build.sources().glob("*.cu")) if each.name not in build.HOPPER_SOURCES]
    objects = [str(folder / f"{each.stem}.o") for each in sources]
    commands = [[*options, "-c", str(each), "-o", out] for each, out in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    path = folder / "library.so"
    _run(["g++", "-shared", *objects, *(each for each in more if not each.startswith("-D")), "-o", str(path)])
    return cuda_library.Library(path)


def build_changed(built: cuda_library.Library, folder: Path, name: str, old: str, new: str) -> cuda_library.Library:
    """An emulated library again, with ``new`` in the place of ``old`` in one source."""
    text = (build.sources() / name).read_text(encoding="utf-8")
    assert text.count(old) == 1
    source = folder / name
    source.write_text(text.replace(old, new), encoding="utf-8")
    _run([*_compiler(), "-I", str(build.sources()), "-c", str(source), "-o", str(source.with_suffix(".o"))])
    others = [str(each) for each in sorted(built.path.parent.glob("*.o")) if each.stem != source.stem]
    _run(["g++", "-shared", str(source.with_suffix(".o")), *others, "-o", str(folder / "library.so")])
    return cuda_library.Library(folder / "library.so")


def _compiler() -> list[str]:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulation")
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-DAK_EMULATE"]
    return ["g++", *options, f"-DAK_CONTRACT={build.contract()}", "-x", "c++"]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def serve(library: cuda_library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA backend by this library, on CPU tensors."""
    monkeypatch.setattr(cuda, "_library", lambda device: library)
    monkeypatch.setattr(cuda, "_tiling", library.tiling)
    monkeypatch.setattr(cuda, "_grad_clusters", library.grad_clusters)
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    served = (torch.float16, torch.bfloat16, torch.float32)
    monkeypatch.setattr(cuda, "refusal", lambda device, dtype: None if dtype in served else f"it does not serve {dtype}")


def hopper_on_cpu() -> Path:
    """hopper_on_cpu.cu, which only nvcc can compile; from the cache where nothing has changed."""
    nvcc, headers = build.find_nvcc(), build.find_cutlass()
    if nvcc is None or headers is None:
        pytest.skip("no nvcc on this machine" if nvcc is None else f"no CUTLASS headers: pip install {build.CUTLASS}")
    source = Path(__file__).with_name("hopper_on_cpu.cu")
    digest = hashlib.sha256(build.key("90a", strict=True).encode() + source.read_bytes()).hexdigest()[:24]
    library = build.cache() / f"libhopper_on_cpu-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        flags = [*build.FLAGS, *build.STRICT, *build.hopper_flags(headers), "-gencode=arch=compute_90a,code=sm_90a"]
        folders = ["-I", str(build.sources())]
        result = subprocess.run(
            [nvcc, *flags, *folders, "-shared", str(source), "-o", str(unfinished)], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        os.replace(unfinished, library)
    return library
