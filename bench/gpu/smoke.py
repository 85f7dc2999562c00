"""Before all else: does a backend run on this GPU at all? Each is asked in a process of its own.

A kernel that hangs, or reads where it may not, takes its process along, and with it every stage after. What fails here is
left out of the run; first the newest kernel alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from amsoftmax_kernels import backends
from amsoftmax_kernels.backends.cuda import build, library

from ..loss.peers import problem
from . import checks
from .checks import (
    DTYPES,
    clock,
    compared_backends,
    relative_error,
    run_child,
    serves,
    smoke_command,
    step_name,
    take_step,
)

Row = dict[str, Any]
SECONDS = 100  # for a child; its kernels are compiled already
# What a backend can do without; of the C++ one Hopper's own kernels, as AMSOFTMAX_KERNELS_WITHOUT names them.
PORTABLE = "cosine_sm90,gradient_sm90"
WITHOUT: dict[str, tuple[str, ...]] = {
    "triton": ("grad_centres",), "cuda": ("gradient_sm90", "cosine_sm90", PORTABLE),
}  # fmt: skip
# Tiles' edges; rows in part of a tile, in one and in several; several tiles a stream.
SHAPES = [
    (5, 16, 3),
    (129, 100, 257),
    (300, 128, 3_000),
    (65, 256, 9_000),
    (64, 480, 40_000),
    (256, 512, 10_516),
    (1024, 512, 30_000),
]
# For the sanitizer, under which a step takes a while: rows that fill part of a tile and rows too wide for one beside tiles'
# edges, with a few tiles for each stream of the largest GPU's.
FEW = [*SHAPES[:2], (70, 496, 1500), (64, 480, 40_000), (64, 528, 40_000)]
# A step with nothing said of a backend, as a user's first is: what is chosen proves itself, and a fallback is a warning.
_DEFAULT = """
import torch, warnings
import amsoftmax_kernels as ak
x, w = torch.randn(256, 512, device="{0}", requires_grad=True), torch.randn(1000, 512, device="{0}", requires_grad=True)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    ak.am_softmax_loss(x, w, torch.arange(256, device="{0}")).backward()
for each in warned:
    print(each.category.__name__ + ":", each.message)
assert x.grad.isfinite().all() and w.grad.isfinite().all()
"""


def smoke(device: torch.device, seconds: float = SECONDS) -> Iterator[Row]:
    """One row a backend, and more without what it can do without, as long as it fails; first those that are absent."""
    yield from absent(device)
    for name in compared_backends(device):
        known = checks.left_out.get(name)  # it did not compile
        row = _ask(device, name, known, seconds)
        yield row
        for kernel in WITHOUT.get(name, ()):
            if row["ok"] is not False or known is not None:
                break
            row = _ask(device, name, kernel, seconds)
            yield row
        if name == "cuda" and row["ok"] and row["without"] != PORTABLE and has_hopper(device):
            # Also the portable kernel, which is to serve wherever Hopper's own do not.
            yield _ask(device, name, PORTABLE, seconds) | {"backend": "cuda, portable"}
    if device.type == "cuda":
        yield default(device, seconds)


def absent(device: torch.device) -> Iterator[Row]:
    """A row for each backend that is not there, which is no fault, and for each that is and serves nothing, which is one."""
    for name in backends.NAMES:
        if name == "reference":
            continue
        row: Row = {"backend": name, "without": None}
        reason = backends.unavailable_reason(name)  # before it is asked to serve: a build may fail then
        if reason is not None:
            yield row | {"ok": None, "skipped": reason}
        elif not any(serves(name, device, dtype) for dtype in DTYPES.values()):
            yield row | {"ok": False, "error": backends.unavailable_reason(name) or f"it serves no dtype on {device}"}


def default(device: torch.device, seconds: float = SECONDS) -> Row:
    """The first step of a user who has said nothing, with no verdict kept from before; what it warns of is in the row."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {name: value for name, value in os.environ.items() if name != "AMSOFTMAX_KERNELS_PROOF"}
        result = run_child([sys.executable, "-c", _DEFAULT.format(device)], seconds, environment | {"XDG_CACHE_HOME": empty})
    return {"step": "default backend", "ok": result["ok"], "output": result["output"].strip()}


def leave_out(rows: list[Row]) -> list[str]:
    """Take what failed out of this process, and say what that is."""
    if not isinstance(rows, list):
        return []  # the stage itself broke
    # Not what says that the stage ended early, nor the portable kernel beside Hopper's own.
    rows = [row for row in rows if row.get("backend") in backends.NAMES]
    served = {row["backend"]: row["without"] for row in rows if row["ok"]}
    broken = {row["backend"] for row in rows if row["ok"] is False and row["backend"] not in served}
    lacking = {name: kernel for name, kernel in served.items() if kernel is not None}
    checks.left_out.update(lacking)
    backends.NAMES = tuple(name for name in backends.NAMES if name not in broken)
    for name, kernel in lacking.items():
        do_without(name, kernel)
    return [*sorted(broken), *(f"{name}'s {kernel}" for name, kernel in sorted(lacking.items()))]


def do_without(name: str, kernel: str) -> None:
    """Take a kernel from a backend in this process."""
    backend: Any = backends.load(name)
    if name == "cuda":
        os.environ[build.WITHOUT] = kernel
        load_anew()
    else:
        setattr(backend._Kernels, kernel, _refuses)


def load_anew() -> None:
    """The C++ library, which reads what it is to leave out when it is loaded."""
    backend: Any = backends.load("cuda")
    for cached in (library.library, backend._library, backend._tiling, backend._grad_clusters, backend._has_hopper):
        cached.cache_clear()


def has_hopper(device: torch.device) -> bool:
    """Whether the C++ library has Hopper's own kernels for this device."""
    backend: Any = backends.load("cuda")
    return device.type == "cuda" and bool(backend._library(device).has_hopper)


@contextlib.contextmanager
def without(name: str, kernel: str) -> Iterator[None]:
    """The same for a while."""
    if name == "cuda":
        with mock.patch.dict(os.environ, {build.WITHOUT: kernel}):
            load_anew()
            yield
        load_anew()
    else:
        with without_gradient(name):
            yield


@contextlib.contextmanager
def without_gradient(name: str) -> Iterator[None]:
    """A backend without its kernel for the centres' gradient, for a while: a product and a pass make it."""
    backend: Any = backends.load(name)
    with mock.patch.object(backend._Kernels, "grad_centres", _refuses):
        yield


def _refuses(*unused: Any) -> bool:
    return False


def _ask(device: torch.device, name: str, kernel: str | None, seconds: float) -> Row:
    result = run_child(smoke_command(device, name, kernel), seconds)
    # One that hangs is broken; but not one that the whole run has no time for.
    ok = None if result["ok"] is None and clock.left() <= 0 else result["ok"] is True
    row: Row = {"backend": name, "without": kernel, "ok": ok, "seconds": result.get("seconds", seconds)}
    return row if row["ok"] else row | {"error": " ".join((result.get("skipped", ""), result["output"])).strip()}


def main(arguments: list[str] | None = None) -> int:
    """A child: steps of one backend, against the chunked one; 1 if they differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smoke")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("backend")
    parser.add_argument("without", nargs="?")
    parser.add_argument("--not", dest="refused", nargs="+", default=[], help="steps that did not compile")
    parser.add_argument("--few", action="store_true", help="those for the sanitizer")
    args = parser.parse_args(arguments)
    if args.without:
        do_without(args.backend, args.without)
    wrong = 0
    shapes = SHAPES[:2] if args.device.type != "cuda" else FEW if args.few else SHAPES
    for (B, D, C), centres in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        features, weight, labels = problem(B, D, C, args.device)
        tensors = features, weight.detach().to(centres), labels
        exact = take_step(*tensors, "chunked", 0, {})
        for (kind, dtype), save_bytes in itertools.product(DTYPES.items(), (1 << 40, 0)):
            if not serves(args.backend, args.device, dtype) or centres not in (torch.float32, dtype):
                continue
            if step_name(args.backend, D, kind, {} if centres == torch.float32 else {"centres": kind}) in args.refused:
                continue
            with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
                results = take_step(*tensors, args.backend, save_bytes, {})
            error = max(relative_error(*pair) for pair in zip(results, exact, strict=True))
            of = f"B={B} D={D} C={C}, centres {centres}, save_bytes={save_bytes}"
            print(f"{args.backend} {dtype} {of}: {error:.1e}", flush=True)
            wrong += error > 2e-2
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
