"""Builds csrc into one shared library: on first use into a per-user cache, or ahead of time from the command line.

    python -m amsoftmax_kernels.backends.cuda.build --arch 80 90a --out libamsoftmax_kernels.so

Hopper's own kernels (sm_90a) take CUTLASS's headers, those of the package nvidia-cutlass or of the folder that the
environment variable CUTLASS_PATH names; without them the portable ones serve Hopper too.

The library's interface is plain C, so that it needs no PyTorch headers and no PyTorch version of its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

COMMAND = "python -m amsoftmax_kernels.backends.cuda.build"
# No fast-math: exponentials say where they are approximate.
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden")
# For development: a spill would be a slow kernel that nobody sees. A user's other compiler may warn of what ours does not.
STRICT = ("-Xptxas", "--warn-on-spills,-Werror", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra")
_SERIALIZED = "C7510"  # what ptxas remarks where it waits for each product of Hopper's: no warning to it, an error if strict
ARCHITECTURES = ("80", "86", "87", "89", "90a", "100", "103", "110", "120", "121")
# PTX beside each: what runs on a GPU that is newer than all of them.
_FALLBACK = "-gencode=arch=compute_80,code=compute_80"
_PREBUILT = "AMSOFTMAX_KERNELS_LIBRARY"  # names a library that was built ahead of time
WITHOUT = "AMSOFTMAX_KERNELS_WITHOUT"  # names kernels that are to be left out, with commas between them
HOPPER = "90a"
HOPPER_SOURCES = ("cosine_sm90.cu", "gradient_sm90.cu")  # what needs CUTLASS, compiled for Hopper alone
_ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")  # what nvcc reads beside its arguments
CUTLASS = "nvidia-cutlass==4.2.0.0"  # what it was written for
CCCL = "nvidia-cuda-cccl"  # headers of CUDA's toolkit that CUTLASS's include; some installations leave them out
_NO_CCCL = r'(cuda/std|cub|thrust)/[\w./]+: No such file|cannot open source file "(cuda/std|cub|thrust)/'


class BuildError(RuntimeError):
    """There is no library: the compiler is missing or refused, whose message is in the text, or the file is not one."""


def sources() -> Path:
    """The folder of the C++ sources: beside the package in a checkout, inside it where it is installed."""
    package = Path(__file__).parents[2]
    inside, beside = package / "csrc", package.parent / "csrc"
    return inside if inside.is_dir() else beside


def contract() -> int:
    """A number made of library.h, comments and spaces apart: the structures as they are to be laid out."""
    text = re.sub(r"//.*", "", (sources() / "library.h").read_text(encoding="utf-8"))
    return zlib.crc32(" ".join(text.split()).encode()) >> 1  # an int32_t


def architecture(capability: tuple[int, int]) -> str:
    """What nvcc calls the architecture to compile for: a GPU runs its own, or an older one of the same major version.

    9.0 is 90a, with instructions of its own; where none fits, 80, whose PTX every newer GPU can run.
    """
    number = capability[0] * 10 + capability[1]
    known = {int(each.rstrip("a")): each for each in ARCHITECTURES}
    older = [each for each in _same(number) if int(each.rstrip("a")) < number]
    return known[number] if number in known else older[-1] if older else "80"


def _same(number: int) -> list[str]:
    """Architectures of the same major version, in order, but for 87, which is Orin's alone."""
    return [each for each in ARCHITECTURES if int(each.rstrip("a")) // 10 == number // 10 and each != "87"]


def prebuilt_name() -> str:
    """What the environment variable AMSOFTMAX_KERNELS_LIBRARY says; empty if it is not set."""
    return os.environ.get(_PREBUILT, "")


def prebuilt() -> Path | None:
    """The library that it names, if it is set."""
    value = prebuilt_name()
    return Path(value).absolute() if value else None  # the loader looks for a bare name elsewhere


def find_nvcc() -> str | None:
    """nvcc on the path, under CUDA_HOME, or where CUDA is usually installed."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((each for each in candidates if each and os.access(each, os.X_OK)), None)


def find_cutlass() -> Path | None:
    """The folder of CUTLASS's headers: where CUTLASS_PATH says, else in the package nvidia-cutlass, not imported."""
    named = os.environ.get("CUTLASS_PATH")
    package = importlib.util.find_spec("cutlass_library")
    if named:
        candidates = [Path(named), Path(named) / "include"]
    else:
        candidates = [Path(each) / "source" / "include" for each in (package and package.submodule_search_locations) or ()]
    return next((each for each in candidates if (each / "cutlass" / "version.h").is_file()), None)


def cutlass_version(headers: Path) -> str:
    """As its header says: 4.2.0, for instance."""
    text = (headers / "cutlass" / "version.h").read_text(encoding="utf-8")
    return ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", text))


def missing(arch: str = "") -> str | None:
    """What has to be installed before a library can be had, for an architecture if one is given; None if nothing."""
    library = prebuilt()
    if library is not None:
        return None if library.is_file() else f"{_PREBUILT} names {library}, which is not there"
    if os.name != "posix":
        return "built on Linux only"
    if not (sources() / "library.h").is_file():
        return f"the C++ sources are not at {sources()}"
    if find_nvcc() is None and not (arch and path_of(arch).exists()):
        return "no nvcc on the path or under CUDA_HOME: install the CUDA toolkit"
    return None


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that this machine's driver runs; None where there is no driver."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def too_new() -> str | None:
    """Why what nvcc builds would not run on this machine; None if it would, or there is nothing to tell by.

    A driver runs what toolkits of its own major version build, and of older ones.
    """
    driver, toolkit = driver_version(), re.search(r"release (\d+)\.(\d+)", _nvcc_version())
    if driver is None or toolkit is None or int(toolkit[1]) <= driver[0]:
        return None
    return (
        f"{find_nvcc()} is of CUDA {toolkit[1]}.{toolkit[2]}, and this machine's driver runs CUDA {driver[0]}.{driver[1]}:"
        f" take a newer driver, or put a toolkit of CUDA {driver[0]} first on the path, or name it by CUDA_HOME"
    )


def cache() -> Path:
    """The folder of what has been built."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amsoftmax_kernels"


def path_of(arch: str, strict: bool = False) -> Path:
    """Where the library for one architecture is kept, whether or not it is there yet.

    Without nvcc the newest that any nvcc has built of these sources.
    """
    path = cache() / f"{key(arch, strict)}.so"
    if find_nvcc() is not None or path.exists():
        return path
    kept = [(written(each), each) for each in cache().glob(f"sm_{arch}-{_sources_key(arch, strict)}-*.so")]
    return max(kept)[1] if kept else path


def cached(arch: str, strict: bool = False, broken: int | None = None) -> Path:
    """The library for one architecture, built now if the sources, the flags or nvcc have changed. Safe in many processes.

    ``broken``: when the one was written that could not be loaded: built again, unless another process has done so.

    Raises:
        BuildError: nvcc is missing or refuses the sources, the driver is too old for what it builds, or the cache cannot be
            written.
    """
    import fcntl  # not on Windows

    path = path_of(arch, strict)
    if path.exists() and written(path) != broken:
        return path
    if (reason := too_new()) is not None:
        raise BuildError(reason)
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w", encoding="utf-8"))
        except OSError as error:
            raise BuildError(
                f"the library cannot be written to {path.parent} ({error.strerror}): set XDG_CACHE_HOME to a folder that can"
                f" be written, or {_PREBUILT} to a library that was built ahead of time"
            ) from error
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first to come builds, the others find it built
        if not path.exists() or written(path) == broken:
            for remark in build([arch], path, strict):
                warnings.warn(f"amsoftmax_kernels: {remark}", stacklevel=2)
    return path


def written(path: Path) -> int:
    """When, in nanoseconds."""
    return path.stat().st_mtime_ns


def key(arch: str, strict: bool = False) -> str:
    """A name that changes with whatever the library depends on: the sources first, then what compiles them."""
    cutlass = find_cutlass() if arch == HOPPER else None
    version = cutlass_version(cutlass) if cutlass else ""
    environment = [f"{name}={os.environ.get(name)}" for name in _ENVIRONMENT]
    digest = hashlib.sha256("\0".join((_nvcc_version(), version, *environment)).encode())
    return f"sm_{arch}-{_sources_key(arch, strict)}-{digest.hexdigest()[:12]}"


def _sources_key(arch: str, strict: bool) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())  # the commands and flags
    for part in (platform.machine(), arch, str(strict)):
        digest.update(part.encode() + b"\0")
    for path in sorted(sources().iterdir()):
        if path.suffix in (".cu", ".cuh", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def build(architectures: Sequence[str], out: Path, strict: bool = False) -> list[str]:
    """Compile for every architecture in ``architectures`` into one library, which appears at ``out`` whole or not at all.

    ``strict``: warnings and spilled registers are errors, and nothing is left out.

    Returns:
        What the library has to do without, in words: an architecture that nvcc is too old for, Hopper's own kernels.

    Raises:
        BuildError: as :func:`cached`.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(missing() or "no nvcc")
    remarks: list[str] = []
    targets = list(architectures)
    if not strict:
        listed = _listed(nvcc)
        targets = list(dict.fromkeys(known for each in architectures if (known := _known(each, listed))))
        for each in architectures:
            if (known := _known(each, listed)) != each:
                instead = f"code for sm_{known}" if known else "PTX for compute_80"
                remarks.append(f"{nvcc} does not know sm_{each}: {instead} in its place; a newer CUDA toolkit knows it")
    cutlass = find_cutlass() if HOPPER in targets else None
    if HOPPER in targets and cutlass is None:
        remarks.append(f"without Hopper's own kernels, which take CUTLASS's headers: pip install {CUTLASS}")
    try:
        _build(nvcc, targets, cutlass, out, strict)
    except BuildError as error:
        text = str(error)
        refused = "error" in text and "died due to signal" not in text and "No space left" not in text
        if cutlass is None or strict or not refused or not any(f"{name} -o" in text for name in HOPPER_SOURCES):
            raise  # what may not be so the next time must not leave a library without them
        _build(nvcc, targets, None, out, strict)
        said = summary(text)
        if re.search(_NO_CCCL, text):
            remarks.append(
                f"without Hopper's own kernels: CUTLASS's headers include CCCL's, which {nvcc} does not find:"
                f" pip install {CCCL}, or your system's package of it ({said})"
            )
        else:
            remarks.append(
                "without Hopper's own kernels, which do not compile with the headers of"
                f" CUTLASS {cutlass_version(cutlass)} at {cutlass}: pip install {CUTLASS} ({said})"
            )
    return remarks


def _listed(nvcc: str) -> str:
    """What it says that it compiles for, each as sm_90 in a line; empty where it does not say."""
    try:
        result = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    except OSError:
        return ""
    return "" if result.returncode else result.stdout


def _known(arch: str, listed: str) -> str | None:
    """This architecture if nvcc compiles for it, else the newest older one that its GPUs run; None: only PTX is left."""
    names = listed.split()

    def knows(each: str) -> bool:
        # 90a is not listed; it came with CUDA 12.0, a version after 90.
        return not names or (f"sm_{each.rstrip('a')}" in names and (each != HOPPER or _nvcc_major() >= 12))

    if knows(arch):
        return arch
    number = int(arch.rstrip("a"))
    older = [each for each in _same(number) if int(each.rstrip("a")) < number and knows(each)]
    return older[-1] if older else None


def _build(nvcc: str, architectures: Sequence[str], cutlass: Path | None, out: Path, strict: bool) -> None:
    """Compile and link."""
    out.parent.mkdir(parents=True, exist_ok=True)
    targets = [_FALLBACK, *(f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures)]
    flags = [*FLAGS, f"-DAK_CONTRACT={contract()}", *(STRICT if strict else ()), *(["-DAK_CUTLASS"] if cutlass else [])]
    out = out.absolute()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".build-") as name:
        folder = Path(name)
        commands = []
        for source in sorted(sources().glob("*.cu"), key=lambda each: each.name not in HOPPER_SOURCES):  # the longest first
            mine = targets
            if source.name in HOPPER_SOURCES:
                if cutlass is None:
                    continue
                mine = [f"-gencode=arch=compute_{HOPPER},code=sm_{HOPPER}", *hopper_flags(cutlass)]
            commands.append([nvcc, *flags, *mine, "-c", str(source), "-o", str(folder / f"{source.stem}.o")])
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            printed = list(pool.map(_run, commands))
        if strict and (serialized := [each for each in printed if _SERIALIZED in each]):
            raise BuildError(serialized[0])
        objects = [command[-1] for command in commands]
        # The CUDA runtime is linked in, so that the library does not depend on the one that PyTorch brings.
        _run([nvcc, "-shared", "-cudart", "static", *targets, *objects, "-o", str(folder / "library.so")])
        os.replace(folder / "library.so", out)


def summary(text: str) -> str:
    """What a compiler says is wrong, in one line: the first of its errors."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
    return "; ".join((errors or lines)[:2])[:400]


def hopper_flags(cutlass: Path) -> list[str]:
    """What a source with CUTLASS's headers is compiled with beside the rest."""
    return ["-isystem", str(cutlass), "--expt-relaxed-constexpr"]


def _run(command: list[str]) -> str:
    """Run it; the command itself and what it printed."""
    result = subprocess.run(command, capture_output=True, text=True)
    printed = f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    if result.returncode:
        raise BuildError(printed)
    return printed


def _nvcc_version() -> str:
    nvcc = find_nvcc()
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""


def _nvcc_major() -> int:
    found = re.search(r"release (\d+)", _nvcc_version())
    return int(found[1]) if found else 12


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 if the build fails, with the compiler's message."""
    parser = argparse.ArgumentParser(
        prog="python -m amsoftmax_kernels.backends.cuda.build", description="Build csrc ahead of time."
    )
    parser.add_argument(
        "--arch", nargs="+", choices=ARCHITECTURES, required=True, metavar="ARCH", help="80, 86, 89, 90a ..."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.so")
    args = parser.parse_args(arguments)
    try:
        remarks = build(args.arch, args.out)
    except BuildError as error:
        print(f"build failed: {error}")
        return 1
    print(f"built {args.out} for {', '.join(f'sm_{each}' for each in args.arch)}")
    for remark in remarks:
        print(f"but {remark}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
