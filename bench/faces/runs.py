"""The trainings of the face benchmark: each run uses one thread, in as many processes as there are runs at once."""

from __future__ import annotations

import concurrent.futures
import functools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from amsoftmax_kernels import evaluation

from . import data, rank1, reporting, training
from .arms import Arm

Report = Callable[[int, int], None]  # index of the run, steps done


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: Arm
    seed: int


def execute(run: Run, faces: data.FaceSet, settings: training.Settings, report: Callable[[int], None]) -> dict[str, Any]:
    """Train and evaluate one run; "roc" is the verification rate at each FAR of reporting.FAR_GRID.

    A rate is None where there are too few impostor pairs for its FAR.
    """
    train_people, test_people = data.split_people(len(faces.people), data.TRAIN_SHARE, run.seed)
    trained = training.train(faces.of_people(train_people), run.arm, run.seed, settings, report)
    held_out = faces.of_people(test_people)
    embeddings, labels = training.embed(trained.network, held_out.images), held_out.labels
    found = evaluation.verification(embeddings, labels, (1e-2, 1e-3, *reporting.FAR_GRID.tolist()))
    rates = {far: None if math.isnan(rate) else rate for far, rate in found.vr.items()}
    return {
        "arm": run.arm.name,
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
