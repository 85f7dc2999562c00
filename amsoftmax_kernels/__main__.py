"""What this machine has, which backends run here and why the others do not, and a self-test of each that does."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence

import torch

from . import __version__, am_softmax_loss, backends, reference
from .backends import cuda, products
from .backends.cuda import build

# Relative error of the loss and of each gradient that a self-test allows, by dtype.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if a self-test fails."""
    argparse.ArgumentParser(prog="python -m amsoftmax_kernels", description=__doc__).parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"amsoftmax_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"CPU   {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"GPU   {_describe_gpu()}")
    print(f"C++   {_describe_compiler()}")
    missing = {name: backends.unavailable_reason(name) for name in backends.NAMES}
    for name in backends.NAMES:  # what has to be built for that is built now: the rest tells how it went
        if missing[name] is None:
            _served(name, device)
    print(f"default backend for float32 on {device}: {backends.choose(None, device, torch.float32)}\n")
    failed = False
    for name, reason in missing.items():
        if reason is None:
            try:
                reason = self_test(name, device)
            except Exception as error:  # the report must go on
                reason = f"{type(error).__name__}: {error}"
            failed |= reason is not None
            result = "runs, self-test passed" if reason is None else f"self-test FAILED: {reason}"
            remark = cuda.remark() if name == "cuda" else products.remark() if name == "chunked" else None
            result += f" ({remark})" if remark else ""
        else:
            result = f"cannot run here: {reason}"
        print(f"{name:10} {result}")
    return int(failed)


def self_test(backend: str, device: torch.device) -> str | None:
    """Compare loss and gradients with the reference in float64 on a small problem; what is wrong, None if nothing is."""
    served = _served(backend, device)
    if not served:
        return backends.unavailable_reason(backend) or f"it serves no dtype on {device}"
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(32, 64, generator=generator, dtype=torch.float64).to(device)
    weight = torch.randn(500, 64, generator=generator, dtype=torch.float64).to(device)
    labels = torch.randint(500, (32,), generator=generator).to(device)
    for dtype in served:
        tolerance = _TOLERANCE[dtype]
        inputs = [each.to(dtype).requires_grad_() for each in (features, weight)]
        exact = [each.detach().double().requires_grad_() for each in inputs]
        for scale in (30.0, 100.0):
            loss = am_softmax_loss(inputs[0], inputs[1], labels, scale=scale, backend=backend)
            expected: torch.Tensor = reference.am_softmax_loss(exact[0], exact[1], labels, scale=scale)
            results = (loss, *torch.autograd.grad(loss, inputs))
            for name, ours, theirs in zip(
                ("loss", "gradient of features", "gradient of weight"),
                results,
                (expected, *torch.autograd.grad(expected, exact)),
                strict=True,
            ):
                error = ((ours.double() - theirs).norm() / theirs.norm()).item()
                if not error < tolerance:
                    return f"{name} in {dtype} at scale {scale:g} is off by {error:.1e}, {tolerance:.0e} allowed"
    return None


def _served(backend: str, device: torch.device) -> list[torch.dtype]:
    return [dtype for dtype in _TOLERANCE if backend == "reference" or backends.load(backend).serves(device, dtype)]


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
