"""`python -m bench gpu`: everything a GPU is needed for, in one run under nine minutes, each row written as it comes.

Everything is compiled first, in parallel, outside every later limit. Then right before fast: whether each backend runs at
all, in a process of its own, correctness, determinism, the kernel of z and E by itself, CUDA graphs. Then what only a GPU
can decide, this card's ceilings, time and peak memory beside the peers, of the loss and of a whole step with the centres'
update, and a profile of our own kernels; the sanitizer and the repository's tests last, in what time is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import amsoftmax_kernels as ak

from .. import machine
from . import checks, compilation, graphs, smoke, terms, times, undecided, whole_steps

QUICK = ("compile", "smoke", "correctness", "determinism", "graph", "ceilings", "times", "steps", "profile")
STAGES = (*QUICK[:4], "terms", "graph", "undecided", *QUICK[5:], "sanitizer", "races", "tests")
_LONG = ("kernels", "shapes", "compiled", "failed")  # of a row, in the file and not on the screen
OUT_OF_TIME = {"ok": None, "skipped": "out of time"}
_LAST_SECONDS = 15.0  # for the row that is under way at the end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench gpu`."""
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--stage", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats: two minutes")
    parser.add_argument(
        "--seconds",
        type=float,
        default=540,
        help="what is not done by then is named and left out; default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    """Run the stages and write DEVICE-DATE.json and a plot; 1 if a check failed."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "bench gpu: PyTorch finds no GPU here; without one, `python -m bench kernels` compiles and estimates"
        )
    # Every step here names its backend, and the stages compare it: no proof of its own is wanted, but in the smoke stage.
    os.environ.setdefault("AMSOFTMAX_KERNELS_PROOF", "0")
    stages = args.stage or (QUICK if args.quick else STAGES)
    last = min(_LAST_SECONDS, args.seconds / 10)
    with _ended_after(args.seconds):
        return run_stages(args.out, stages, args.quick, torch.device("cuda"), seconds=args.seconds - last)


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
    checks.clock.ends = time.perf_counter() + seconds
    checks.left_out.clear()
    checks.not_compiled.clear()
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
    actions = _actions(device, quick, shapes, report)
    failed: list[str] = []
    not_run: list[str] = []
    for stage in stages:
        print(f"\n== {stage}", flush=True)
        start = time.perf_counter()
        try:
            result: Any = actions[stage]() if checks.clock.left() > 0 else dict(OUT_OF_TIME)
            if isinstance(result, Iterator):
                found: list[dict[str, Any]] = []
                report["stages"][stage] = found
                _take(result, found, lambda: _write(path, report))
                result = found
        except Exception as error:  # a stage that breaks must not take the later ones with it
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        report["stages"][stage] = result
        report["stages"].setdefault("seconds", {})[stage] = time.perf_counter() - start
        if stage in ("compile", "smoke"):
            left_out = (compilation if stage == "compile" else smoke).leave_out(result)
            print(f"left out from here on: {', '.join(left_out) or 'nothing'}", flush=True)
        _write(path, report)
        rows = result if isinstance(result, list) else [result]
        failed += [f"{stage}: {_short(row)}" for row in rows if row.get("ok") is False]
        not_run += [f"{stage}: {_short(row)}" for row in rows if row.get("ok", True) is None]
        if not isinstance(result, list):
            print(_short(result), flush=True)
        elif stage == "profile":
            print("\n".join(_profiled(row) for row in result), flush=True)
        print(f"-- {stage}: {time.perf_counter() - start:.0f} s", flush=True)
    drawn = _plot(path.with_suffix(".png"), report)
    print("\n" + ("\n".join(["FAILED", *failed]) if failed else "every check that ran passed"))
    print("\n".join(["NOT RUN", *not_run]) if not_run else "every check ran")
    print(f"written: {path}" + (f", {path.with_suffix('.png').name}" if drawn else ""))
    return int(bool(failed))


def _actions(
    device: torch.device, quick: bool, shapes: dict[str, Any], report: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """What each stage does."""

    def known_ceilings() -> dict[str, Any]:
        if "shapes" not in report["stages"].get("ceilings", {}):
            report["stages"]["ceilings"] = times.ceilings(device, shapes.get("times"), shapes.get("size", 8192))
        found: dict[str, Any] = report["stages"]["ceilings"]
        return found

    return {
        "compile": lambda: compilation.compiled(device),
        "smoke": lambda: smoke.smoke(device),
        "correctness": lambda: checks.correctness(device, quick, **shapes.get("correctness", {})),
        "determinism": lambda: checks.determinism(device, 10 if quick else 100, **shapes.get("determinism", {})),
        "terms": lambda: terms.terms(device, **shapes.get("terms", {})),
        "graph": lambda: graphs.graphs(device, **shapes.get("graph", {})),
        "undecided": lambda: undecided.undecided(device, **shapes.get("undecided", {})),
        "sanitizer": lambda: checks.sanitizer(device, checks.MEMORY),
        "ceilings": lambda: times.ceilings(device, shapes.get("times"), shapes.get("size", 8192)),
        "times": lambda: times.times(device, known_ceilings(), quick, shapes.get("times")),
        "steps": lambda: whole_steps.whole_steps(device, known_ceilings(), quick, **shapes.get("steps", {})),
        "profile": lambda: times.profile(device, **shapes.get("profile", {})),
        "races": lambda: checks.sanitizer(device, checks.RACES),
        "tests": lambda: checks.gpu_tests(),
    }  # fmt: skip


def _take(rows: Iterable[dict[str, Any]], found: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Append each row to ``found``, printed and saved as it comes."""
    try:
        for row in rows:
            print(("FAIL " if row.get("ok") is False else "") + _short(row), flush=True)
            found.append(row)
            save()
            if checks.clock.left() <= 0:
                found.append({**OUT_OF_TIME, "skipped": "out of time: there may be more"})
                break
    except Exception as error:  # what there is already is kept
        found.append({"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]})


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """The process and its children end by then, whatever they wait for; rows are written as they come."""

    def end() -> None:
        print("NOT RUN\nthe time is up: what was under way did not end, and nothing after it was run", flush=True)
        checks.end_children()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _short(row: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {text(each)}" for name, each in value.items())
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{name}={text(value)}" for name, value in row.items() if name not in _LONG)


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
