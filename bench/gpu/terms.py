"""The kernel that makes z and E, by itself: past 2³¹ elements, against float64, and the same bits time after time.

Each backend's, and of the C++ one the portable kernel besides, where Hopper's own serves: in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from amsoftmax_kernels.backends import Problem, load
from amsoftmax_kernels.backends.chunking import padded, panel_dtype
from amsoftmax_kernels.backends.cuda import build
from amsoftmax_kernels.backends.kernels import Cosines, Rows

from ..loss.peers import problem
from ..measure import first_line
from . import checks, smoke
from .checks import compared_backends, relative_error, run_child

Row = dict[str, Any]
SHAPES = ((1024, 512, 93_431), (4096, 512, 20_000), (4096, 64, 600_000))  # (B, D, C)
REPEATS = 50
SECONDS = 100  # for a child
SCALE = 30.0
# Relative: E is rounded to bfloat16, and exponents are s times a cosine of rounded operands.
TERMS, SUMS = 8e-3, 1e-4
_BLOCK = 1 << 15  # classes that are compared at once


def terms(device: torch.device, shapes: Any = SHAPES, repeats: int = REPEATS) -> Iterator[Row]:
    """One row a kernel and shape."""
    for name in compared_backends(device):
        if name == "chunked":
            continue
        known = checks.left_out.get(name, "")
        both = name == "cuda" and smoke.has_hopper(device)
        for without in dict.fromkeys((known, smoke.PORTABLE)) if both else (known,):
            for shape in shapes:
                row: Row = {"backend": name, "without": without or None, **dict(zip("BDC", shape, strict=True))}
                yield row | _ask(device, name, without, shape, repeats)


def _ask(device: torch.device, name: str, without: str, shape: tuple[int, int, int], repeats: int) -> Row:
    command = [sys.executable, "-m", "bench.gpu.terms", str(device), name, *map(str, shape), str(repeats)]
    result = run_child(command, SECONDS, os.environ | ({build.WITHOUT: without} if name == "cuda" else {}))
    lines = [line for line in result["output"].splitlines() if line.startswith("{")]
    if lines:
        return dict(json.loads(lines[-1]))
    if result["ok"] is None:
        return {"ok": None, "skipped": result["skipped"]}
    return {"ok": False, "error": result["output"][-500:]}


def check(name: str, device: torch.device, B: int, D: int, C: int, repeats: int) -> Row:
    """E and the parts of z of all classes in one launch, several times; E compared with float64."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    backend: Any = load(name)
    kernels = backend.fused.kernels
    features, weight, labels = (each.detach() for each in problem(B, D, C, device))
    given = Problem(features, weight, labels, None, SCALE, True, half, float("inf"))
    rows = Rows(torch.empty(B, padded(D), device=device, dtype=half), *torch.empty(4, B, device=device).unbind())
    w_hat, inverse = torch.empty(C, padded(D), device=device, dtype=half), torch.empty(C, device=device)
    kernels.prepare_rows(given, SCALE, rows)
    kernels.prepare_centres(weight, w_hat, inverse)
    rows, streams = rows._replace(shift=None), kernels.streams(given, C)

    def launch() -> tuple[torch.Tensor, torch.Tensor]:
        E = torch.full((B, padded(C)), float("nan"), device=device, dtype=panel_dtype(half))
        z = torch.full((streams, B), float("nan"), device=device, dtype=torch.float64)
        kernels.cosine_exp(given, 0, rows, w_hat, Cosines(E, z))
        return E, z

    E, z = launch()
    error, sums = 0.0, torch.zeros(B, device=device, dtype=torch.float64)
    for start in range(0, C, _BLOCK):
        block = w_hat[start : start + _BLOCK, :D]
        exact = (SCALE * (rows.x_hat[:, :D].double() @ block.double().T)).exp()
        mine = (labels >= start) & (labels < start + len(block))
        exact[mine, labels[mine] - start] = 0
        sums += exact.sum(1)
        error = max(error, relative_error(E[:, start : start + len(block)], exact))
    found = {"E_error": error, "z_error": relative_error(z.sum(0), sums), "padding": bool((E[:, C:] == 0).all())}
    same = True
    for _ in range(repeats - 1):
        again = launch()
        # As bits: a NaN is not equal to itself.
        same &= all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(again, (E, z), strict=True))
    right = error < TERMS and found["z_error"] < SUMS and found["padding"]
    return {"ok": bool(right and same), **found, "same_bits": same, "repeats": repeats}


def main(arguments: list[str] | None = None) -> int:
    """A child: one kernel and shape, a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.terms")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("backend")
    for name in ("B", "D", "C", "repeats"):
        parser.add_argument(name, type=int)
    args = parser.parse_args(arguments)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    try:
        row = check(args.backend, args.device, args.B, args.D, args.C, args.repeats)
    except torch.OutOfMemoryError as error:
        row = {"ok": None, "skipped": first_line(error)}
    except Exception as error:
        row = {"ok": False, "error": first_line(error)}
    print(json.dumps(row), flush=True)
    return int(row["ok"] is False)


if __name__ == "__main__":
    raise SystemExit(main())
