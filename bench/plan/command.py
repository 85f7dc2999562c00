"""`python -m bench plan`: what a run of the sharded head needs before it is paid for.

Memory a rank, counted from what a step allocates; bytes on the wire; time of a step, from the floor of the work and an
efficiency that was measured (this CPU) or estimated (a GPU), as is said. The backbone is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from amsoftmax_kernels.autograd import DEFAULT_SAVE_BYTES

from .. import machine
from . import times
from .memory import OPTIMIZERS, Memory, Run, memory, smallest_ranks

LINK_GB = 400.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench plan`."""
    add, default = parser.add_argument, "default: %(default)s"
    classes = [10_000, 1_000_000, 100_000_000, 1_000_000_000]
    add("--classes", type=int, nargs="+", default=classes, metavar="C", help="default: 10 thousand to 1 billion")
    add("--ranks", type=int, nargs="+", default=[8], metavar="W", help=default)
    add("--dim", type=int, default=512, metavar="D", help=default)
    add("--batch", type=int, default=128, metavar="B", help=f"samples a rank; {default}")
    add(
        "--optimizer",
        choices=list(OPTIMIZERS),
        default="momentum",
        help=f"sgd: without momentum; fused-sgd: with it; {default}",
    )
    add("--weight-decay", action="store_true", help="SGD then needs a temporary tensor")
    add("--subcentres", type=int, default=1, metavar="K", help=f"centres a class; {default}")
    add("--sample-rate", type=float, default=1.0, help=default)
    add("--sampling-correction", action="store_true")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help=f"of the class centres; {default}")
    add("--compute", choices=list(_DTYPES), help="dtype of products; default: bfloat16 on cuda, float32 on cpu")
    add("--save-bytes", type=int, default=DEFAULT_SAVE_BYTES, metavar="N", help=f"of the B×C terms kept; {default}")
    add("--gpu", choices=list(times.GPUS), help="default: h200")
    add("--device", choices=["cuda", "cpu"], default="cuda", help=f"cpu: this machine; {default}")
    add(
        "--memory-gb",
        type=float,
        help="of a rank, for the head; default: the GPU's; on cpu what is free, shared by the ranks",
    )
    add("--tflops", type=float, help="of products, of a card that --gpu does not name; with the next and --memory-gb")
    add("--copy-gb-per-s", type=float, help="of its memory")
    add("--link-gb-per-s", type=float, default=LINK_GB, help=f"that a rank receives, an assumption; {default}")
    add("--json", type=Path, metavar="FILE", help="write everything there too")


def run(args: argparse.Namespace) -> int:
    """Print the tables; exit status 0, 1 if a run does not fit, 2 for bad arguments."""
    try:
        _check(args)
        rates = _rates(args)
        plans = [_planned(args, C, W, rates) for C, W in itertools.product(sorted(args.classes), sorted(args.ranks))]
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    shared = ", shared by the ranks" if args.device == "cpu" else ""
    link = f"; the link's {args.link_gb_per_s:g} GB/s are assumed" if max(args.ranks) > 1 else ""
    print(
        f"ESTIMATE, head only: the backbone is not counted\n{rates.source}\n"
        f"{rates.products / 1e12:.3g} TFLOP/s, {rates.copy / 1e9:,.0f} GB/s{shared}{link}\n"
    )
    if len(plans) == 1:
        print(_parts(plans[0]))
    print(_table(plans))
    if args.json is not None:
        report = {"machine": machine.describe(), "source": rates.source, "plans": plans}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(plan["fits"] for plan in plans) else 1


def _check(args: argparse.Namespace) -> None:
    for name in ("classes", "ranks"):
        if min(getattr(args, name)) < 1:
            raise ValueError(f"--{name} must be at least 1, but one is {min(getattr(args, name))}")
    for name in ("dim", "batch", "subcentres"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, but it is {getattr(args, name)}")
    for name in ("memory_gb", "tflops", "copy_gb_per_s", "link_gb_per_s"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, but it is {value}")
    if not 0 < args.sample_rate <= 1:
        raise ValueError(f"--sample-rate must lie in (0, 1], but it is {args.sample_rate}")
    if args.save_bytes < 0:
        raise ValueError(f"--save-bytes must be at least 0, but it is {args.save_bytes}")
    if args.device == "cpu" and (args.gpu or args.tflops or args.copy_gb_per_s):
        raise ValueError("--gpu, --tflops and --copy-gb-per-s are for --device cuda: a CPU's rates are measured")
    rates = (args.tflops, args.copy_gb_per_s)
    if args.gpu and any(rates):
        raise ValueError("--tflops and --copy-gb-per-s are for a card that --gpu does not name")
    if args.device == "cuda" and not args.gpu and any((*rates, args.memory_gb)) and not all((*rates, args.memory_gb)):
        raise ValueError("another card is --memory-gb, --tflops and --copy-gb-per-s together; or name one with --gpu")


def _rates(args: argparse.Namespace) -> times.Rates:
    if args.device == "cpu":
        return times.of_this_cpu(args.batch * max(args.ranks), args.dim)
    if args.tflops:
        return times.of_another_card(args.tflops * 1e12, args.copy_gb_per_s * 1e9)
    return times.of_gpu(args.gpu or "h200", args.compute or "bfloat16")


def _planned(args: argparse.Namespace, num_classes: int, ranks: int, rates: times.Rates) -> dict[str, Any]:
    compute = args.compute or ("float32" if args.device == "cpu" else "bfloat16")
    planned = Run(
        num_classes, args.dim, args.batch, ranks, args.optimizer, args.weight_decay, args.sample_rate,
        args.sampling_correction, _DTYPES[args.dtype], _DTYPES[compute], args.save_bytes, args.device,
        rates.card.capability[0] if rates.card else 9, args.subcentres,
    )  # fmt: skip
    if args.device == "cpu":  # ranks on this machine share it
        rates = replace(rates, products=rates.products / ranks, copy=rates.copy / ranks)
    needed = memory(planned)
    limit = _limit(args, ranks)
    smallest = smallest_ranks(planned, limit)
    return {
        "classes": num_classes, "ranks": ranks, "dim": args.dim, "batch_a_rank": args.batch,
        "classes_a_rank": planned.classes, "drawn_a_rank": planned.drawn, "kept_classes": planned.kept,
        "memory": _as_json(needed), "memory_limit": limit, "fits": needed.total <= limit, "smallest_ranks": smallest,
        "wire_bytes": times.wire_bytes(planned),
        "time": times.step(planned, rates, args.link_gb_per_s * 1e9),
    }  # fmt: skip


def _limit(args: argparse.Namespace, ranks: int) -> int:
    if args.memory_gb is not None:
        return int(args.memory_gb * 1e9)
    if args.device == "cuda":
        return int(times.GPUS[args.gpu or "h200"][1])
    free = machine.available_bytes(torch.device("cpu"))
    if free is None:
        raise ValueError("--memory-gb is needed: this system does not say what is free")
    return free // ranks


def _as_json(needed: Memory) -> dict[str, Any]:
    return {"held": needed.held, "backward": needed.backward, "update": needed.update, "total": needed.total}


def _parts(plan: dict[str, Any]) -> str:
    """Memory and wire of one plan, part by part."""
    lines = ["memory of a rank, MB"]
    phases = {"held": "between steps", "backward": "at the end of the backward pass", "update": "in the optimizer's step"}
    for phase, text in phases.items():
        lines.append(f"  {text}")
        lines += [f"    {name:42}{size / 1e6:14,.1f}" for name, size in plan["memory"][phase].items() if size]
    lines.append(f"  {'peak: the first and the larger of the others':44}{plan['memory']['total'] / 1e6:14,.1f}")
    if plan["ranks"] > 1:
        lines.append("received by a rank in a step, MB")
        lines += [f"    {name:42}{size / 1e6:14,.3f}" for name, size in plan["wire_bytes"].items()]
    return "\n".join(lines) + "\n"


def _table(plans: list[dict[str, Any]]) -> str:
    limits = sorted({plan["memory_limit"] for plan in plans})
    fits = f"fits {limits[0] / 1e9:,.3g} GB" if len(limits) == 1 else "fits"
    wired = any(plan["ranks"] > 1 for plan in plans)
    lines = [
        f"{'classes':>13} {'ranks':>6} {'GB a rank':>10} {fits:>12} {'needs ranks':>11} {'head ms':>9} {'update ms':>10}"
        + (f" {'wire MB':>8} {'wire ms':>8}" if wired else "")
        + f" {'step ms':>9} {'floor ms':>9} {'head samples/s':>15}"
    ]
    for plan in plans:
        ms = {name: 1e3 * value for name, value in plan["time"].items()}
        least = f"{plan['smallest_ranks']:,}" if plan["smallest_ranks"] else "too many"
        megabytes = sum(plan["wire_bytes"].values()) / 1e6
        wire = "" if not wired else f" {megabytes:8,.2f} {ms['wire_s']:8,.3f}" if megabytes else f" {'-':>8} {'-':>8}"
        lines.append(
            f"{plan['classes']:13,} {plan['ranks']:6,} {plan['memory']['total'] / 1e9:10,.2f}"
            f" {'yes' if plan['fits'] else 'NO':>12} {least:>11} {ms['head_s']:9,.2f} {ms['update_s']:10,.2f}{wire}"
            f" {ms['step_s']:9,.2f} {ms['floor_s']:9,.2f} {_three_digits(plan['time']['samples_per_s']):15,}"
        )
    parts = "head, update and wire" if wired else "head and update"
    lines.append(
        f"\nneeds ranks: the fewest that fit; head: the loss, forward and backward; step: {parts} one after\n"
        "the other; floor: the head's products and the bytes that must move; head samples/s: of all ranks, were there no\n"
        "backbone, whose time and memory come on top" + ("; wire: what a rank receives" if wired else "")
    )
    return "\n".join(lines)


def _three_digits(value: float) -> int:
    """As many as an estimate has, at most."""
    return int(float(f"{value:.3g}"))
