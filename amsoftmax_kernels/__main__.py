"""What this machine has, which backends run here and why the others do not, and a self-test of each that does."""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from collections.abc import Sequence

import torch

from . import __version__, backends
from .backends import cuda, products
from .backends.comparison import compare
from .backends.cuda import build

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if a self-test fails."""
    argparse.ArgumentParser(prog="python -m amsoftmax_kernels", description=__doc__).parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"amsoftmax_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"CPU   {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"GPU   {_describe_gpu()}")
    print(f"C++   {_describe_compiler()}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        chosen = backends.choose(None, _traits(device, torch.float32))
    print(f"default backend for float32 on {device}: {chosen}")
    print("".join(f"  {each.message}\n" for each in told))
    failed = False
    for name in backends.NAMES:
        reason = backends.unavailable_reason(name)
        if reason is not None:
            print(f"{name:10} cannot run here: {reason}")
        elif name == "cuda" and not cuda.built(device):
            print(f"{name:10} not built yet: backend='cuda' builds it when it is first used, {build.COMMAND} ahead of time")
        else:
            result, wrong = _tested(name, device)
            failed |= wrong
            print(f"{name:10} {result}")
    return int(failed)


def _tested(name: str, device: torch.device) -> tuple[str, bool]:
    """What a self-test says, and whether it failed."""
    try:
        reason = self_test(name, device)
    except Exception as error:  # the report must go on
        reason = f"{type(error).__name__}: {error}"
    result = "runs, self-test passed" if reason is None else f"self-test FAILED: {reason}"
    remark = cuda.remark() if name == "cuda" else products.remark() if name == "chunked" else None
    return result + (f" ({remark})" if remark else ""), reason is not None


def self_test(backend: str, device: torch.device) -> str | None:
    """Compare loss and gradients with the reference in float64 on a small problem; what is wrong, None if nothing is."""
    served = [dtype for dtype in DTYPES if backends.serves(backend, device, dtype)]
    if not served:
        return backends.refusal(backend, device, torch.float32)
    results = (compare(backend, _traits(device, dtype), "reference") for dtype in served)
    return next((each for each in results if each is not None), None)


def _traits(device: torch.device, dtype: torch.dtype) -> backends.Traits:
    """Of a small problem, by which a scale past the bound is tried too."""
    return backends.Traits(device, dtype, dtype, dtype, 64, True, False, False, True)


def _describe_gpu() -> str:
    if not torch.cuda.is_available():
        return "none that this PyTorch can use"
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, {properties.total_memory >> 30} GiB"
    )


def _describe_compiler() -> str:
    """What the cuda backend would be built with, whether or not there is a GPU for it."""
    nvcc, cutlass = build.find_nvcc(), build.find_cutlass()
    if cutlass is None:
        headers = f"no CUTLASS headers: Hopper's own kernel is not built without them, pip install {build.CUTLASS}"
        if os.environ.get("CUTLASS_PATH"):
            headers += f" (CUTLASS_PATH, {os.environ['CUTLASS_PATH']}, has no cutlass/version.h)"
    else:
        headers = f"CUTLASS {build.cutlass_version(cutlass)}"
    return f"{nvcc or 'no nvcc'}, {headers}"


if __name__ == "__main__":
    raise SystemExit(main())
