"""Before all else: does a backend run on this GPU at all? Each is asked in a process of its own.

A kernel that hangs, or reads where it may not, takes its process along, and with it every stage after. What fails here is
left out of the run; first the newest kernels alone.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch

from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import triton_launch

from . import gpu_checks
from .gpu_checks import DTYPES, _relative, _serves, _step, clock, compared_backends, run_child
from .peers import problem

Row = dict[str, Any]
SECONDS = 200  # for a child: a first build and each kernel's compilation among them
DIRECTLY = "direct launches"  # of repeated steps, past the Python part of Triton's launcher
# What a backend can do without, one after the other.
WITHOUT: dict[str, tuple[str, ...]] = {"triton": (DIRECTLY, "grad_both", "grad_centres"), "cuda": ("grad_centres",)}
# Tiles' edges; rows in halves, in one and in a narrow one; several tiles a stream.
SHAPES = [
    (5, 16, 3),
    (129, 100, 257),
    (300, 128, 3_000),
    (65, 256, 9_000),
    (64, 480, 40_000),
    (256, 512, 10_516),
    (1024, 512, 30_000),
]


# For the sanitizer, under which a step takes a while: rows in halves and too wide for the shared memory beside tiles' edges,
# with a few tiles for each stream of the largest GPU's; and classes so few that E·ŵ is made beside the centres' gradient.
FEW = [*SHAPES[:2], (70, 496, 1500), (64, 480, 40_000), (64, 528, 40_000)]


def smoke(device: torch.device, seconds: float = SECONDS) -> Iterator[Row]:
    """One row a backend, and more without what it can do without, as long as it fails; first those that are absent."""
    yield from absent(device)
    for name in compared_backends(device):
        row = _ask(device, name, None, seconds)
        yield row
        for without in WITHOUT.get(name, ()):
            if row["ok"] is not False:
                break
            row = _ask(device, name, without, seconds)
            yield row


def absent(device: torch.device) -> Iterator[Row]:
    """A row for each backend that is not there, which is no fault, and for each that is and serves nothing, which is one."""
    for name in backends.NAMES:
        if name == "reference":
            continue
        row: Row = {"backend": name, "without": None}
        reason = backends.unavailable_reason(name)  # before it is asked to serve: a build may fail then
        if reason is not None:
            yield row | {"ok": None, "skipped": reason}
        elif not any(_serves(name, device, dtype) for dtype in DTYPES.values()):
            yield row | {"ok": False, "error": backends.unavailable_reason(name) or f"it serves no dtype on {device}"}


def leave_out(rows: list[Row]) -> list[str]:
    """Take what failed out of this process, and say what that is."""
    if not isinstance(rows, list):
        return []  # the stage itself broke
    rows = [row for row in rows if "backend" in row]  # not what says that the stage ended early
    served = {row["backend"]: row["without"] for row in rows if row["ok"]}
    broken = {row["backend"] for row in rows if row["ok"] is False and row["backend"] not in served}
    lacking = {name: without for name, without in served.items() if without is not None}
    gpu_checks.left_out.update(lacking)
    backends.NAMES = tuple(name for name in backends.NAMES if name not in broken)
    for name, without in lacking.items():
        do_without(name, without)
    return [*sorted(broken), *(f"{name}'s {without}" for name, without in sorted(lacking.items()))]


def do_without(name: str, without: str) -> None:
    """Take one kernel from a backend, or a way to launch them, in this process."""
    if without == DIRECTLY:
        triton_launch.launch_directly = False
        return
    kernels: Any = backends.load(name)
    for each in dict.fromkeys((without, "grad_both")):  # which has the code of the other in it
        setattr(kernels._Kernels, each, lambda *unused: False)


def _ask(device: torch.device, name: str, without: str | None, seconds: float) -> Row:
    command = [sys.executable, "-m", "bench.gpu_smoke", str(device), name, *([without] if without else [])]
    result = run_child(command, seconds)
    # One that hangs is broken; but not one that the whole run has no time for.
    ok = None if result["ok"] is None and clock.left() <= 0 else result["ok"] is True
    row: Row = {"backend": name, "without": without, "ok": ok, "seconds": result.get("seconds", seconds)}
    return row if row["ok"] else row | {"error": " ".join((result.get("skipped", ""), result["output"])).strip()}


def main(arguments: list[str] | None = None) -> int:
    """A child: steps of one backend, against the chunked one; 1 if they differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_smoke")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("backend")
    parser.add_argument("without", nargs="?")
    parser.add_argument("--few", action="store_true", help="those for the sanitizer")
    args = parser.parse_args(arguments)
    if args.without:
        do_without(args.backend, args.without)
    wrong = 0
    shapes = SHAPES[:2] if args.device.type != "cuda" else FEW if args.few else SHAPES
    for (B, D, C), centres in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        features, weight, labels = problem(B, D, C, args.device)
        tensors = features, weight.detach().to(centres), labels
        exact = _step(*tensors, "chunked", 0, {})
        for dtype, save_bytes in itertools.product(DTYPES.values(), (1 << 40, 0)):
            if not _serves(args.backend, args.device, dtype) or centres not in (torch.float32, dtype):
                continue
            for _ in range(3):  # the third is a repeated one
                with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
                    results = _step(*tensors, args.backend, save_bytes, {})
            error = max(_relative(*pair) for pair in zip(results, exact, strict=True))
            of = f"B={B} D={D} C={C}, centres {centres}, save_bytes={save_bytes}"
            print(f"{args.backend} {dtype} {of}: {error:.1e}", flush=True)
            wrong += error > 2e-2
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
