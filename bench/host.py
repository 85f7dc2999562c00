"""`python -m bench host`: what the host does in a step before a GPU is asked, timed without one.

The package's own Python, Triton's dispatch and launchers and the C++ library's ctypes calls run as they would, on tensors in
the CPU's memory; kernels are compiled for the GPU named and not launched (no_driver.py), library products are left out. What
a GPU's driver takes for each launch, and to wake the thread that PyTorch's backward pass runs in there, is counted on top.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from amsoftmax_kernels import am_softmax_loss
from amsoftmax_kernels.backends import cuda, fused
from amsoftmax_kernels.backends import triton as backend
from amsoftmax_kernels.backends.cuda import build
from amsoftmax_kernels.backends.cuda import library as cuda_library
from amsoftmax_kernels.backends.triton import tiles as triton_configs

from . import machine, no_driver
from .estimate import CARDS
from .peers import problem

# Seconds that a driver takes for a launch of 19 arguments (a GB200's; https://github.com/meta-pytorch/tritonbench/pull/1017).
_DRIVER = 3.3e-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench host`."""
    parser.add_argument("--arch", choices=list(CARDS), default="sm_90", help="default: %(default)s")
    parser.add_argument("--classes", type=int, default=10_516, metavar="C", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=256, metavar="B", help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=512, metavar="D", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Time and print."""
    card = CARDS[args.arch]
    if backend._import_error is not None:
        raise SystemExit(f"bench host: {backend._import_error}")
    if backend._interpreted():
        raise SystemExit("bench host: unset TRITON_INTERPRET, in whose interpreter there is no dispatch to time")
    _keep_freed_memory()
    cpu = machine.describe(torch.device("cpu"))["cpu"]
    print(f"{cpu}, torch {torch.__version__}; host time, with the kernels of a GPU like: {card.name}\n")
    hand_over = _hand_over()
    titles = "forward", "backward", "step, µs", "anew, µs", "on a GPU"
    print("backend   " + "".join(f" {each:>10}" for each in titles) + "   launches of ours")
    for name in ("triton", "cuda"):
        with contextlib.ExitStack() as stack:
            stack.enter_context(_without_products())
            launched = stack.enter_context(_of_triton(card) if name == "triton" else _of_cpp(card))
            with mock.patch.object(fused, "replayed_on", lambda device: False):
                anew = sum(_times(name, args.batch, args.dim, args.classes, args.steps))
            forward, backward = _times(name, args.batch, args.dim, args.classes, args.steps)
            before = launched()
            _step(name, *problem(args.batch, args.dim, args.classes, torch.device("cpu")))
            count = launched() - before
        step = forward + backward
        with_driver = step + hand_over + (count + 1) * _DRIVER  # and PyTorch's own, of the gradient of the loss
        times = "".join(f" {each * 1e6:10.0f}" for each in (forward, backward, step, anew, with_driver))
        print(f"{name:10}{times} {count:18}")
    print(
        "\nMedians of steps replayed, as those of one layout are from the third on (backends/replay.py), and of others.\n"
        f"On a GPU: replayed, with {_DRIVER * 1e6:.1f} µs of the driver for each launch and one of PyTorch's, and with\n"
        f"{hand_over * 1e6:.0f} µs to another thread and back. Library products (two; one beside a kernel for the centres'\n"
        "gradient, none where that makes both) are not counted."
    )
    return 0


def _hand_over(times: int = 3000) -> float:
    """Seconds to another of Python's threads and back."""
    there, back = threading.Lock(), threading.Lock()
    there.acquire(), back.acquire()

    def answer() -> None:
        for _ in range(times):
            there.acquire()
            back.release()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        there.release()
        back.acquire()
        taken.append(time.perf_counter() - start)
    thread.join()
    return statistics.median(taken)


def _keep_freed_memory() -> None:
    """As PyTorch's allocator on a GPU does, where the C library would give it back to the system and ask for it anew."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc's
        for option, value in ((-1, 1 << 30), (-3, 1 << 25)):  # M_TRIM_THRESHOLD; M_MMAP_THRESHOLD, the most there is
            library.mallopt(option, value)


def _step(name: str, features: Tensor, weight: Tensor, labels: Tensor) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    features.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        start = time.perf_counter()
        loss = am_softmax_loss(features, weight, labels, backend=name)
        forward = time.perf_counter() - start
    start = time.perf_counter()
    loss.backward()
    return forward, time.perf_counter() - start


def _times(name: str, B: int, D: int, C: int, steps: int) -> tuple[float, float]:
    tensors = problem(B, D, C, torch.device("cpu"))
    for _ in range(20):
        _step(name, *tensors)
    taken = [_step(name, *tensors) for _ in range(steps)]
    return statistics.median(each[0] for each in taken), statistics.median(each[1] for each in taken)


@contextlib.contextmanager
def _without_products() -> Iterator[None]:
    def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return out

    with (
        mock.patch.object(fused, "_product", product),
        mock.patch.object(fused, "replayed_on", lambda device: True),
    ):
        yield


@contextlib.contextmanager
def _of_triton(card: Any, launch: Callable[..., None] | None = None) -> Iterator[Callable[[], int]]:
    """How often a kernel has been launched. ``launch`` is given what would be the C part of Triton's own launcher."""
    with contextlib.ExitStack() as stack:
        count = stack.enter_context(no_driver.entered(card.capability, launch))
        for name, value in (
            ("_config", lambda _, dtype: triton_configs.config(card.capability, "half")),
            ("_gradient_config", lambda _: triton_configs.GRADIENT.get(card.capability[0])),
            ("_multiprocessors", lambda _: card.multiprocessors),
            ("serves", lambda *_: True),
            ("unavailable_reason", lambda: None),
        ):
            stack.enter_context(mock.patch.object(backend, name, value))
        yield count


@contextlib.contextmanager
def _of_cpp(card: Any) -> Iterator[Callable[[], int]]:
    """The library with launches that do nothing, by the host's compiler; the portable kernel's way to divide a problem."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise SystemExit("no g++ to compile the C++ library's host side with")
    launches: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        sources = [str(each) for each in sorted(build.sources().glob("*.cu")) if each.name not in build.HOPPER_SOURCES]
        options = ["-std=c++17", "-O2", "-w", "-DAK_EMULATE", "-DAK_NO_LAUNCH", "-fPIC", "-shared", "-x", "c++"]
        options.append(f"-DAK_CONTRACT={build.contract()}")
        subprocess.run([compiler, *options, *sources, "-o", str(path)], check=True)
        library = cuda_library.Library(path)
        tiling = library.tiling(torch.device("cpu"), 256, 512, torch.bfloat16)
        tiling.blocks = card.multiprocessors
        launch = library._launch

        def counted(name: str, *rest: Any) -> None:
            launches.append(name)
            launch(name, *rest)

        with (
            mock.patch.object(library, "_launch", counted),
            mock.patch.object(cuda, "_library", lambda device: library),
            mock.patch.object(cuda, "_tiling", lambda *_: tiling),
            mock.patch.object(cuda, "serves", lambda *_: True),
            mock.patch.object(cuda, "unavailable_reason", lambda: None),
        ):
            yield lambda: len(launches)
