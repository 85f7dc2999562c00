"""The Triton backend through Triton's own launchers, on a driver that checks every launch and runs none (strict_driver.c).

    python -m tests.strict_driver launches     # every option at many shapes; prints how many maps and launches there were
    python -m tests.strict_driver time         # what the host does in a step of 256 rows, 512 dimensions, 10,516 classes

Kernels are compiled for sm_90. Run it without TRITON_INTERPRET, in a process of its own: the driver is loaded under the name
of CUDA's.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import chunking, fused
from amsoftmax_kernels.backends import triton as backend
from amsoftmax_kernels.backends.triton import tiles
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD

CAPABILITY, MULTIPROCESSORS = (9, 0), 132
# Rows and classes around tiles' edges, from one row to the shapes that are trained.
SHAPES = [(1, 2), (70, 1000), (129, 257), (256, 10_516), (1024, 3000)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 100.0, "interclass_filter": 0.5, "return_predictions": True},
    {"normalize_features": False, "reduction": "none"},
    {"margin": lambda t, labels, norm: t - 0.01 * norm, "reduction": "sum"},
]
HALF = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]


@contextlib.contextmanager
def strict_driver() -> Iterator[ctypes.CDLL]:
    """Triton launches through the checking driver, and CPU tensors stand for those of an H200."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        library = _loaded(Path(folder) / "libcuda.so.1")
        triton.knobs.nvidia.libcuda_path = folder  # where launchers are linked
        cuda = nvidia.CudaUtils()

        class Driver:
            utils = cuda
            launcher_cls = nvidia.CudaLauncher
            get_current_device = staticmethod(lambda: 0)
            get_current_stream = staticmethod(lambda device: 0)
            get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

        triton.runtime.driver.set_active(Driver())
        for module, name, value in (
            (backend, "_config", lambda _, dtype: tiles.config(CAPABILITY, chunking.kind(dtype))),
            (backend, "_gradient_config", lambda _: tiles.GRADIENT[CAPABILITY[0]]),
            (backend, "_multiprocessors", lambda _: MULTIPROCESSORS),
            (backend, "refusal", lambda *_: None),
            (backend, "unavailable_reason", lambda: None),
            (fused, "_product", lambda a, b, out: out),  # a library's product is no launch of ours
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield library


def build(path: Path) -> None:
    """Compile the driver."""
    import triton

    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise SystemExit("no C compiler")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).with_suffix(".c")
    options = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", f"-I{headers}"]
    subprocess.run([compiler, *options, str(source), "-o", str(path)], check=True)


def _loaded(path: Path) -> ctypes.CDLL:
    build(path)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(path.name)
    for name in ("maps", "launches", "refused"):
        getattr(library, name).restype = ctypes.c_ulonglong
    return library


def step(
    B: int, D: int, C: int, compute: torch.dtype, weight_dtype: torch.dtype, backend: str = "triton", **options: Any
) -> Any:
    """Loss and gradients of the public function; with launches that do nothing, of no value."""
    features = torch.zeros(B, D, dtype=compute if weight_dtype == compute else torch.float32, requires_grad=True)
    weight = torch.zeros(C, D, dtype=weight_dtype, requires_grad=True)
    with torch.autocast("cpu", compute, enabled=compute != torch.float32):
        result = ak.am_softmax_loss(features, weight, torch.zeros(B, dtype=torch.int64), backend=backend, **options)
    loss = result[0] if isinstance(result, tuple) else result
    return torch.autograd.grad(loss.sum(), (features, weight))


def updated_steps(B: int, D: int, C: int, weight_dtype: torch.dtype, backend: str = "triton") -> None:
    """Two steps that update the centres in the backward pass, by each rule."""
    for make, options in ((FusedSGD, {"lr": 0.1, "momentum": 0.9}), (FusedAdamW, {"state_dtype": torch.float32})):
        head = ak.AMSoftmaxLoss(D, C, dtype=weight_dtype, backend=backend, save_bytes=0)
        optimizer = make(head, **options)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                head(torch.zeros(B, D, requires_grad=True), torch.zeros(B, dtype=torch.int64)).backward()
            optimizer.step()


def launch_everything(quick: bool) -> None:
    """All options at all shapes where they are cheap; each new D compiles its kernels anew."""
    for D, (B, C), options, save_bytes in itertools.product((512, 100, 3), SHAPES, OPTIONS, (1 << 40, 0)):
        for compute, weight_dtype in HALF[:1] if quick or D != 512 else HALF:
            with mock.patch.object(chunking, "CHUNK_ELEMENTS", 1 << 18 if B == 256 else 1 << 27):  # in 41 chunks, in one
                step(B, D, C, compute, weight_dtype, save_bytes=save_bytes, **options)
    for D, (B, C), dtype in itertools.product((512, 3), SHAPES, (torch.float32, torch.bfloat16)):
        updated_steps(B, D, C, dtype)
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        for options in OPTIONS[:2]:
            step(129, 512, 257, torch.float32, torch.float32, save_bytes=0, **options)
    with mock.patch.object(fused, "scale_of", lambda problem: torch.full((), 30.0)):
        step(70, 512, 1000, torch.bfloat16, torch.float32, scale=torch.tensor(30.0))  # as one on the device


def keep_freed_memory() -> None:
    """As PyTorch does on a GPU: the C library's large allocations would each be a call of the system."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the most there is


def host_seconds(B: int = 256, D: int = 512, C: int = 10_516, steps: int = 200) -> dict[str, float]:
    """Medians of what the host takes for the forward and the backward pass."""
    keep_freed_memory()
    features, weight = torch.zeros(B, D, requires_grad=True), torch.zeros(C, D, requires_grad=True)
    labels, times = torch.zeros(B, dtype=torch.int64), []
    upstream = torch.ones(())
    for _ in range(steps + 20):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = ak.am_softmax_loss(features, weight, labels, backend="triton")
        middle = time.perf_counter()
        torch.autograd.grad(loss, (features, weight), upstream)
        times.append((middle - start, time.perf_counter() - middle))
    forward, backward = (statistics.median(each) for each in zip(*times[20:], strict=True))
    return {"forward": forward, "backward": backward, "step": forward + backward}


def main(arguments: list[str]) -> int:
    with strict_driver() as driver, mock.patch.object(backends, "_proves", lambda device: False):
        result: dict[str, Any] = {}
        if arguments[:1] == ["time"]:
            result = host_seconds()
        elif arguments[:1] == ["wrong"]:  # a grid that no driver takes
            with mock.patch.object(backend._Kernels, "streams", lambda *_: 70_000), contextlib.suppress(RuntimeError):
                step(70, 512, 1000, torch.bfloat16, torch.float32)
        else:
            launch_everything(quick="--quick" in arguments)
        result |= {name: int(getattr(driver, name)()) for name in ("maps", "launches", "refused")}
    print(json.dumps({key: value for key, value in result.items() if not math.isnan(value)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
