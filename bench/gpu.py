"""`python -m bench gpu`: everything a GPU is needed for, in one run under ten minutes, each stage written as it ends.

Right before fast: whether each backend runs at all, in a process of its own, correctness, determinism, graph capture and the
sanitizer come first; then this card's ceilings, time and peak memory beside the peers, and a profile of our own kernels; the
sanitizer's slower tools and the repository's tests last, in what time is left.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import amsoftmax_kernels as ak

from . import gpu_checks, gpu_smoke, gpu_targets, gpu_times, machine

STAGES = ("smoke", "correctness", "determinism", "graph", "sanitizer", "ceilings", "times", "profile", "races", "tests")
OUT_OF_TIME = {"ok": None, "skipped": "out of time"}
QUICK = ("smoke", "correctness", "determinism", "graph", "ceilings", "times", "profile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench gpu`."""
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--stage", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats: two minutes")
    parser.add_argument(
        "--seconds",
        type=float,
        default=570,
        help="what is not done by then is named and left out; default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    """Run the stages and write DEVICE-DATE.json and a plot; 1 if a check failed."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "bench gpu: PyTorch finds no GPU here; without one, `python -m bench kernels` compiles and estimates"
        )
    stages = args.stage or (QUICK if args.quick else STAGES)
    return run_stages(args.out, stages, args.quick, torch.device("cuda"), seconds=args.seconds)


def run_stages(
    out: Path,
    stages: Iterable[str],
    quick: bool,
    device: torch.device,
    shapes: dict[str, Any] | None = None,
    seconds: float = float("inf"),
) -> int:
    """The stages on any device; ``shapes`` replaces what each stage would take (for the tests)."""
    shapes = shapes or {}
    gpu_checks.clock.ends = time.perf_counter() + seconds
    gpu_checks.left_out.clear()
    facts = machine.describe(device)
    name = facts.get("gpu", facts["cpu"]).lower().replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{facts['date']}.json"
    report: dict[str, Any] = {"machine": facts, "backends": ak.available_backends(), "quick": quick, "stages": {}}
    if path.exists():  # stages of an earlier run that are not run again stay
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["machine"] == facts and earlier["quick"] == quick:
            report["stages"] = earlier["stages"]
    print(
        f"{facts.get('gpu', facts['cpu'])}, torch {torch.__version__}, backends {', '.join(report['backends'])}", flush=True
    )

    def known_ceilings() -> dict[str, Any]:
        if "shapes" not in report["stages"].get("ceilings", {}):
            report["stages"]["ceilings"] = gpu_times.ceilings(device, shapes.get("times"), shapes.get("size", 8192))
        found: dict[str, Any] = report["stages"]["ceilings"]
        return found

    actions: dict[str, Callable[[], Any]] = {
        "smoke": lambda: _rows(gpu_smoke.smoke(device)),
        "correctness": lambda: _rows(gpu_checks.correctness(device, quick, **shapes.get("correctness", {}))),
        "determinism": lambda: _rows(
            gpu_checks.determinism(device, 10 if quick else 100, **shapes.get("determinism", {}))
        ),
        "graph": lambda: _rows(gpu_checks.graph_capture(device)),
        "sanitizer": lambda: _rows(gpu_checks.sanitizer(device, gpu_checks.MEMORY)),
        "ceilings": lambda: gpu_times.ceilings(device, shapes.get("times"), shapes.get("size", 8192)),
        "times": lambda: _rows(gpu_times.times(device, known_ceilings(), quick, shapes.get("times"))),
        "profile": lambda: gpu_times.profile(device, **shapes.get("profile", {})),
        "races": lambda: _rows(gpu_checks.sanitizer(device, gpu_checks.RACES)),
        "tests": lambda: _rows(gpu_checks.gpu_tests()),
    }  # fmt: skip
    failed: list[str] = []
    not_run: list[str] = []
    for stage in stages:
        print(f"\n== {stage}", flush=True)
        start = time.perf_counter()
        try:
            result: Any = actions[stage]() if gpu_checks.clock.left() > 0 else dict(OUT_OF_TIME)
        except Exception as error:  # a stage that breaks must not take the later ones with it
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        report["stages"][stage] = result
        report["stages"].setdefault("seconds", {})[stage] = time.perf_counter() - start
        if stage == "smoke":
            left_out = gpu_smoke.leave_out(result)
            print(f"left out from here on: {', '.join(left_out)}" if left_out else "all run", flush=True)
        _write(path, report)
        rows = result if isinstance(result, list) else [result]
        failed += [f"{stage}: {_short(row)}" for row in rows if row.get("ok") is False]
        not_run += [f"{stage}: {_short(row)}" for row in rows if row.get("ok", True) is None]
        if not isinstance(result, list):
            print(_short(result), flush=True)
        elif stage == "profile":
            print("\n".join(_profiled(row) for row in result), flush=True)
        print(f"-- {stage}: {time.perf_counter() - start:.0f} s", flush=True)
    report["targets"] = list(gpu_targets.targets(report["stages"]))
    _write(path, report)
    print("\n" + "\n".join(_reached(row) for row in report["targets"]))
    drawn = _plot(path.with_suffix(".png"), report)
    print("\n" + ("\n".join(["FAILED", *failed]) if failed else "every check that ran passed"))
    print("\n".join(["NOT RUN", *not_run]) if not_run else "every check ran")
    print(f"written: {path}" + (f", {path.with_suffix('.png').name}" if drawn else ""))
    return int(bool(failed))


def _rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    try:
        for row in rows:
            print(("FAIL " if row.get("ok") is False else "") + _short(row), flush=True)
            found.append(row)
            if gpu_checks.clock.left() <= 0:
                found.append({**OUT_OF_TIME, "skipped": "out of time: there may be more"})
                break
    except Exception as error:  # what there is already is kept
        found.append({"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]})
    return found


def _short(row: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{name}={text(value)}" for name, value in row.items() if name not in ("kernels", "shapes"))


def _reached(row: dict[str, Any]) -> str:
    wanted = f">= {row['at_least']:g}" if "at_least" in row else f"<= {row['at_most']:g}"
    verdict = "met" if row["met"] else "NOT MET"
    return f"{verdict:8} {row['found']:8.3g} {wanted:8}  {row['target']} (B={row['B']}, D={row['D']}, C={row['C']})"


def _profiled(row: dict[str, Any]) -> str:
    lines = [f"{row['peer']}, B={row['B']} D={row['D']} C={row['C']}"]
    lines += [f"  {1e3 * each['seconds']:9.4f} ms  {each['calls']:5.1f} x  {each['name']}" for each in row["kernels"]]
    return "\n".join(lines)


def _write(path: Path, report: dict[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _plot(path: Path, report: dict[str, Any]) -> bool:
    """Share of the floor by shape and peer; whether it could be drawn."""
    rows = [row for row in report["stages"].get("times", []) if isinstance(row, dict) and "median_s" in row]
    if not rows:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((row["B"], row["D"], row["C"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["peer"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
    for i, name in enumerate(names):
        mine = {(row["B"], row["D"], row["C"], row["dtype"]): row["of_floor"] for row in rows if row["peer"] == name}
        places = [j + (i - len(names) / 2) * 0.8 / len(names) for j, shape in enumerate(shapes) if shape in mine]
        axes.bar(places, [mine[shape] for shape in shapes if shape in mine], width=0.8 / len(names), label=name)
    axes.set_xticks(range(len(shapes)), [f"B {B}, D {D}\nC {C:,}\n{dtype}" for B, D, C, dtype in shapes])
    axes.axhline(1, color="black", linewidth=0.8)
    facts = report["machine"]
    axes.set(ylabel="share of the floor", title=f"{facts.get('gpu', facts['cpu'])}, torch {facts['torch']}, {facts['date']}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
