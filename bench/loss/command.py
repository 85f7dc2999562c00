"""`python -m bench loss`: a step of the loss, forward and backward, beside other libraries', which take turns with it.

Ratios come from here, as a drift of the machine's speed falls on all alike. `pytest bench --benchmark-only` stores times.
The floor is 6·B·C·D flops, the three products no method can avoid, at the best rate that torch.mm reaches here; beside
it stands the floor at the best rate of any product PyTorch carries.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import machine, measure
from . import memory, picture
from .peers import PEERS, Peer, problem, step

CLASSES = [1_000, 10_000, 100_000, 1_000_000]
QUICK_CLASSES = [1_000, 10_000, 100_000]
SLOW_PEERS = ("CosFaceLoss", "linear_cross_entropy", "the same, not chunked")  # not with --quick
BATCH, DIM = 256, 512
# Beside the sweep: a small problem, and a large one that is to fit in little memory.
CASES = [(64, 128, 1_000), (512, 512, 1_000_000)]
# Seconds a step; a peer that would take longer is left out.
SLOWEST_STEP, QUICK_SLOWEST_STEP = 30.0, 1.0
# A median this much above the best says more about the machine's other work than about the loss.
DISTURBED = 2.0
# Relative, of losses that should agree; bfloat16 rounds each cosine to 3 digits.
TOLERANCE = {"fp32": 1e-4, "medium": 1e-2, "bf16": 1e-2}
DTYPES = {
    "fp32": "float32",
    "medium": "float32, torch.set_float32_matmul_precision('medium')",
    "bf16": "bfloat16 autocast",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench loss`."""
    parser.add_argument("--out", type=Path, default=Path("out/loss"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer classes, rounds and peers: about a minute")
    parser.add_argument("--batch", type=int, default=BATCH, metavar="B", help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=DIM, metavar="D", help="default: %(default)s")
    parser.add_argument("--classes", type=int, nargs="+", metavar="C", help="numbers of classes")
    parser.add_argument("--only", nargs="+", metavar="PEER", choices=[peer.name for peer in PEERS], help="peers to time")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="fp32",
        help="bf16: autocast; medium: float32 matrices multiplied in bfloat16, where PyTorch can; default: %(default)s",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: PyTorch's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; 1 if a peer that should give our loss gives another."""
    before = torch.get_float32_matmul_precision()
    if args.dtype == "medium":
        torch.set_float32_matmul_precision("medium")
    try:
        return _run(args)
    finally:
        torch.set_float32_matmul_precision(before)


def _run(args: argparse.Namespace) -> int:
    for name in ("batch", "dim", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, but it is {getattr(args, name)}")
    if args.classes and min(args.classes) < 1:
        raise SystemExit(f"--classes must be at least 1, but one is {min(args.classes)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    shapes = [(args.batch, args.dim, C) for C in sorted(args.classes or (QUICK_CLASSES if args.quick else CLASSES))]
    if not (args.quick or args.classes):
        shapes += CASES
    if args.only:
        peers = [peer for peer in PEERS if peer.name in args.only]
    else:
        peers = [peer for peer in PEERS if not (args.quick and peer.name in SLOW_PEERS)]

    rows: list[dict[str, Any]] = []
    dtype = DTYPES[args.dtype]
    report: dict[str, Any] = {"machine": machine.describe(device), "dtype": dtype, "results": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{report['machine']['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}\n")
    print(_row("B", "D", "C", "", "ms", "× eager", "of mm floor", "of floor", "peak MB"))
    for B, D, C in shapes:
        new = _shape_rows(B, D, C, peers, rows, device, args.quick, args.dtype)
        rows += new
        for row in new:
            print(_printed(row), flush=True)
        print(flush=True)
        _write(args.out / "loss.json", report)
    print(
        "× eager: times as fast as eager PyTorch. of mm floor: the step's time over the products' at the best rate of\n"
        "torch.mm; of floor: at the best rate of any product. peak MB: above inputs and gradients, in a fresh process."
    )
    drawn = picture.draw_report(args.out / "loss.png", report)
    print(f"\nwritten to {args.out}: loss.json" + (", loss.png" if drawn else " (no plot: matplotlib is not installed)"))
    wrong = [row for row in rows if row.get("disagrees")]
    return 1 if wrong else 0


def _shape_rows(
    B: int, D: int, C: int, peers: list[Peer], earlier: list[dict[str, Any]], device: torch.device, quick: bool, dtype: str
) -> list[dict[str, Any]]:
    """Every peer's result at one shape."""
    shape = {"B": B, "D": D, "C": C}
    _progress(f"timing {shape} ...")
    autocast = dtype == "bf16"
    rates = measure.product_rates(B, D, device, torch.bfloat16 if autocast else torch.float32)
    flops = 6 * B * D * C
    budget, slowest = (0.7, QUICK_SLOWEST_STEP) if quick else (10.0, SLOWEST_STEP)
    rows: list[dict[str, Any]] = [
        {**shape, "peer": peer.name, "skipped": skip_reason(peer, B, D, C, earlier, slowest, device)} for peer in peers
    ]
    times, losses = _time(rows, device, budget, autocast)
    eager = times.get("eager PyTorch")
    with_margin = [losses[peer.name] for peer in peers if peer.margin and peer.name in losses]
    expected = losses.get("eager PyTorch", with_margin[0] if with_margin else None)
    for peer, row in zip(peers, rows, strict=True):
        if peer.name not in times:
            continue
        taken = times[peer.name]
        row.update(taken.as_json())
        row["loss"] = losses[peer.name]
        row["times_as_fast_as_eager"] = eager.median / taken.median if eager else None
        row["of_mm_floor"] = taken.median / (flops / rates["torch.mm"])
        row["of_floor"] = taken.median / (flops / rates["any"])
        # Not "greater than": a NaN must not pass.
        if peer.margin and expected and not abs(losses[peer.name] - expected) <= TOLERANCE[dtype] * abs(expected):
            row["disagrees"] = f"loss {losses[peer.name]:.6g}, expected {expected:.6g}"
    _progress(f"memory at {shape} ...")
    measured = [row for row in rows if not row["skipped"]]
    # Small problems' processes at once: they spend their time on imports.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() if quick else 1) as pool:
        peaks = pool.map(lambda row: memory.peak_memory(row["peer"], B, D, C, device, autocast), measured)
        for row, peak in zip(measured, peaks, strict=True):
            row["peak_bytes"] = peak
    for row in rows:
        row["rates"] = rates
    _progress("")
    return rows


def _time(
    rows: list[dict[str, Any]], device: torch.device, budget: float, autocast: bool
) -> tuple[dict[str, measure.Times], dict[str, float]]:
    """Times and losses of the peers that are not left out; each row gets its first step's seconds, or why it failed."""
    B, D, C = (rows[0][name] for name in "BDC")
    problems = [problem(B, D, C, device, seed) for seed in range(measure.copies(B, D, C, device))]
    functions: dict[str, Callable[[], Any]] = {}
    losses: dict[str, float] = {}
    for row in rows:
        if row["skipped"]:
            continue
        function = _stepper(_peer(row["peer"]), problems, autocast)
        start = time.perf_counter()
        try:
            losses[row["peer"]] = function().item()
        except Exception as error:  # whatever a peer's library raises must not end the others' run
            row["skipped"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        row["first_s"] = time.perf_counter() - start
        functions[row["peer"]] = function
    return measure.interleaved(functions, device, budget), losses


def _stepper(
    peer: Peer, problems: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], autocast: bool
) -> Callable[[], torch.Tensor]:
    loss, turns = peer.make(), itertools.cycle(problems)

    def function() -> torch.Tensor:
        return step(loss, *next(turns), autocast=autocast)

    return function


def _peer(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == name)


def skip_reason(
    peer: Peer, B: int, D: int, C: int, earlier: list[dict[str, Any]], slowest: float, device: torch.device
) -> str | None:
    """Why a peer is not run at this shape: it is not here, or would need more memory or time than there is."""
    missing = peer.unavailable()
    if missing:
        return missing
    needed, available = 4 * (3 * C * D + 3 * B * D) + peer.memory(B, D, C), machine.available_bytes(device)
    if available is not None and needed > 0.85 * available:
        return f"needs about {needed / 1e9:.0f} GB of memory, more than 85% of the {available / 1e9:.0f} that are free"
    before = [row for row in earlier if row["peer"] == peer.name and "median_s" in row]
    if before:
        last = max(before, key=lambda row: row["B"] * row["C"] * row["D"])
        expected = last["min_s"] * B * D * C / (last["B"] * last["D"] * last["C"])
        if expected > slowest:
            return f"left out: would take about {expected:.1f} s a step, more than {slowest:.0f}"
    return None


def _printed(row: dict[str, Any]) -> str:
    first = (row["B"], row["D"], f"{row['C']:,}", row["peer"])
    if row["skipped"]:
        return _row(*first, "") + f"  {row['skipped']}"
    eager, peak = row["times_as_fast_as_eager"], row["peak_bytes"]
    numbers = (
        f"{row['median_s'] * 1e3:.2f}",
        f"{eager:.2f}" if eager else "",
        f"{row['of_mm_floor']:.2f}",
        f"{row['of_floor']:.2f}",
        f"{peak['above_inputs_and_gradients'] / 1e6:.0f}" if peak else "",
    )
    note = "  WRONG: " + row["disagrees"] if row.get("disagrees") else ""
    if row["median_s"] > DISTURBED * row["min_s"]:
        note += f"  (disturbed: {row['min_s'] * 1e3:.2f} ms at best)"
    return _row(*first, *numbers) + note + ("" if _peer(row["peer"]).margin else "  (no margin)")


def _row(B: Any, D: Any, C: Any, peer: str, *numbers: str) -> str:
    return f"{B!s:>5} {D!s:>4} {C!s:>10}  {peer:<21}" + "".join(f"{number:>12}" for number in numbers)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<90}", end="\r", file=sys.stderr, flush=True)


def _write(path: Path, report: dict[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
