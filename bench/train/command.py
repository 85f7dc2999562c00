"""`torchrun --nproc-per-node N -m bench train`: a training from end to end, its classes sharded over N processes.

Synthetic identities, any number of them, or real faces, verified on identities that are in no batch; or InsightFace's
records, verified on its sets. Without torchrun it is one process. A run that goes on from a checkpoint (--resume) on as
many ranks has the same batches and losses, to the bit; on another number of ranks the same state, and other batches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .. import machine
from . import log as train_log
from . import synthetic
from .checkpoint import Checkpoints
from .data import Faces, Source, Synthetic
from .loop import AUTOCAST, DTYPES, Training
from .ranks import Ranks, joined

STEPS, CLASSES, EVAL_EVERY = 300, 10_000, 50
# A run that goes on must agree in these; its number of steps, and what it writes, may differ.
_FIXED = (
    "data", "classes", "dim", "batch", "optimizer", "momentum", "sample_rate", "sampling_correction", "dtype",
    "autocast", "seed", "frequent",
)  # fmt: skip
# Of the backbone and of the head.
_LR = {"fused-sgd": (5e-3, 5.0), "fused-adamw": (1e-3, 1e-2), "sgd": (5e-3, 5.0), "adamw": (1e-3, 1e-2)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench train`."""
    add, default = parser.add_argument, "default: %(default)s"
    add("--out", type=Path, default=Path("out/train"), metavar="DIR", help=f"log, checkpoints, result; {default}")
    add(
        "--data",
        default="synthetic",
        metavar="WHAT",
        help=f"synthetic, faces (ORL), a folder with one sub-folder a person, or InsightFace's train.rec; {default}",
    )
    add(
        "--verify",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="InsightFace's sets, lfw.bin say, with its records",
    )
    add("--classes", type=int, metavar="C", help=f"synthetic identities to train on; default: {CLASSES:,}")
    add(
        "--frequent",
        type=float,
        metavar="Q",
        help="of them make half the samples; default: a fiftieth of them, at most 1,000",
    )
    add("--dim", type=int, default=64, metavar="D", help=f"of the embedding; {default}")
    add("--batch", type=int, default=256, metavar="B", help=f"samples a rank and step; {default}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help=f"default: {STEPS}")
    length.add_argument("--epochs", type=int, metavar="N", help="of InsightFace's records")
    length.add_argument("--seconds", type=float, metavar="S", help="train for so long instead")
    add("--optimizer", choices=list(_LR), default="fused-sgd", help=f"fused: in the head's backward pass; {default}")
    add("--lr", type=float, help="of the backbone; default: 0.005 with sgd, 0.001 with adamw")
    add("--head-lr", type=float, help="of the class centres; default: 5 with sgd, 0.01 with adamw")
    add("--momentum", type=float, default=0.9, help=f"of sgd; {default}")
    add("--weight-decay", type=float, default=0.0, help=default)
    add("--scale", type=float, default=30.0, help=default)
    add("--margin", type=float, default=0.35, help=default)
    add("--sample-rate", type=float, default=1.0, help=f"share of the classes to compute with a step; {default}")
    add("--sampling-correction", action="store_true", help="the drawn negatives stand for all")
    add("--backend", help="of the head; default: the fastest that can run")
    add("--save-bytes", type=int, default=0, metavar="N", help=f"of the B×C terms kept on each rank; {default}")
    add("--dtype", choices=list(DTYPES), default="float32", help=f"of the class centres; {default}")
    add("--autocast", choices=list(AUTOCAST), default="none", help=default)
    add("--seed", type=int, default=0, help=default)
    add("--log", choices=["csv", "tensorboard"], default="csv", help=f"tensorboard: beside the CSV; {default}")
    add("--log-every", type=int, default=10, metavar="K", help=f"steps; {default}")
    add("--eval-every", type=int, metavar="K", help="steps; 0: at the end; default: 50, with records an epoch")
    add("--checkpoint-every", type=int, default=100, metavar="K", help=f"steps, and at the end; 0: none; {default}")
    add("--keep", type=int, default=2, metavar="N", help=f"checkpoints; {default}")
    add("--resume", action="store_true", help="go on from the latest checkpoint in --out, if there is one")
    add("--timeout", type=float, default=300.0, metavar="S", help=f"seconds to wait for another rank; {default}")


def run(args: argparse.Namespace) -> int:
    """Train; exit status 0, 1 if it fails or another rank does, 2 for bad arguments, 130 if interrupted."""
    rank = os.environ.get("RANK", "0")
    try:
        _complete(args)
        with joined(args.timeout) as ranks:
            _train(args, ranks)
    except ValueError as error:  # on every rank alike
        if rank == "0":
            print(f"train: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)  # with the other ranks gone, taking the process group down may abort
        return 2
    except FloatingPointError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not dist.is_initialized():
            raise
        print(f"train: rank {rank} ends, as it or another rank has failed: {type(error).__name__}: {error}", file=sys.stderr)
        sys.stderr.flush()
        # The other ranks may never answer again: threads that wait for them are not waited for.
        os._exit(1)
    return 0


def _complete(args: argparse.Namespace) -> None:
    """Fill in defaults that depend on other arguments, and refuse what cannot be.

    Raises:
        ValueError: a wrong argument.
    """
    synthetic_data, records = args.data == "synthetic", _is_records(args.data)
    for name in ("verify", "epochs"):
        if getattr(args, name) and not records:
            raise ValueError(f"--{name} is for InsightFace's records, and --data {args.data} is none")
    if args.classes is not None and not synthetic_data:
        raise ValueError(f"--classes is for synthetic data; --data {args.data} has the classes it has")
    if synthetic_data and args.classes is None:
        args.classes = CLASSES
    if args.steps is None and args.seconds is None and args.epochs is None:
        args.steps = STEPS
    if args.eval_every is None and not records:
        args.eval_every = EVAL_EVERY
    for name in ("classes", "dim", "batch", "steps", "epochs", "log_every", "keep"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, but it is {value}")
    for name in ("seconds", "timeout", "lr", "head_lr", "scale", "frequent"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, but it is {value}")
    for name in ("eval_every", "checkpoint_every", "momentum", "weight_decay", "save_bytes"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, but it is {value}")
    if args.classes is not None and args.classes > synthetic.MAX_IDENTITIES:
        raise ValueError(f"--classes must be at most {synthetic.MAX_IDENTITIES:,}, but it is {args.classes:,}")
    if args.frequent is None:
        args.frequent = min(synthetic.FREQUENT, max((args.classes or 0) / 50, 1.0))
    lr, head_lr = _LR[args.optimizer]
    args.lr, args.head_lr = args.lr or lr, args.head_lr or head_lr
    if args.log == "tensorboard":
        train_log.summary_writer()


def _is_records(data: str) -> bool:
    return data.endswith(".rec") or (Path(data) / "train.rec").exists()


def _in_epochs(args: argparse.Namespace, source: Source) -> None:
    """Turn epochs into steps, where a source has them."""
    if source.steps_an_epoch is None:
        return
    if args.epochs is not None:
        args.steps = args.epochs * source.steps_an_epoch
    if args.eval_every is None:
        args.eval_every = source.steps_an_epoch


def _source(args: argparse.Namespace, ranks: Ranks) -> Source:
    if args.data == "synthetic":
        return Synthetic(args.classes, args.seed, args.frequent, ranks.device)
    try:
        if _is_records(args.data):
            from .records import Records  # needs NumPy

            return Records(Path(args.data), args.verify, args.batch, args.seed, ranks.size, ranks.device)
        return Faces(None if args.data == "faces" else Path(args.data), args.seed, ranks.device)
    except (ImportError, OSError) as error:
        raise ValueError(str(error)) from error


def _train(args: argparse.Namespace, ranks: Ranks) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    source = _source(args, ranks)
    _in_epochs(args, source)
    fixed = {name: getattr(args, name) for name in _FIXED}
    checkpoints = Checkpoints(args.out / "checkpoints", args.keep, fixed, args.steps, ranks)
    if ranks.rank == 0:
        checkpoints.clean()
    steps = ranks.first(checkpoints.steps())
    if steps and not args.resume:
        raise ValueError(f"--out {args.out} has checkpoints of a run: give --resume to go on from it, or another --out")
    before = train_log.memory(ranks.device)
    training = Training(args, source, ranks)
    if steps:
        checkpoints.load(training, steps[-1])
    start, first = training.step, ranks.rank == 0
    if first:
        print(_title(args, source, ranks, start), flush=True)
        if start == 0:
            print(source.expected(), flush=True)
        planned = checkpoints.noted(steps[-1]) if steps else None
        if planned not in (None, args.steps):
            print(
                f"note: that run was of {planned} steps; the learning rates follow the new end",
                flush=True,
            )
    due = verification_due(args, start)
    log = train_log.Log(args.out, start, due, args.log == "tensorboard", source.measures) if first else None
    loop = _Loop(args, training, checkpoints, log)
    throughput = loop.run()
    memory = {"peak_bytes": train_log.peak_memory(ranks.device), "before_training_bytes": before}
    everyone = ranks.gather(memory)
    if first:
        report = {
            "machine": machine.describe(ranks.device), "ranks": ranks.size, "device": ranks.device.type,
            "arguments": {name: _plain(value) for name, value in vars(args).items()},
            "classes": source.num_classes, "resumed_from": start, "steps": training.step, **throughput,
            "memory": everyone, "verification": loop.verification,
        }  # fmt: skip
        text = json.dumps(report, indent=1) + "\n"
        temporary = args.out / ".train.json"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(args.out / "train.json")
        print(f"written to {args.out}: log.csv, train.json; {_named(checkpoints)}", flush=True)


def verification_due(args: argparse.Namespace, step: int) -> bool:
    """Whether held-out identities are to be verified after ``step`` steps; at the end they always are."""
    return step == 0 or (args.eval_every > 0 and step % args.eval_every == 0)


class _Loop:
    """Steps, and what is done between them."""

    def __init__(
        self, args: argparse.Namespace, training: Training, checkpoints: Checkpoints, log: train_log.Log | None
    ) -> None:
        self.args, self.training, self.checkpoints, self.log = args, training, checkpoints, log
        self.verification: dict[str, float] = {}
        self.verified_step = -1

    def run(self) -> dict[str, Any]:
        """Train to the end; steps and seconds of this run, and samples a second without verification and checkpoints."""
        args, training, ranks = self.args, self.training, self.training.ranks
        first = training.step
        spent, window, since = 0.0, 0.0, training.step  # seconds of steps: of all, of those since the last line
        if verification_due(args, training.step):
            self.verify()
        begin = time.perf_counter()
        while not self.ended(begin, first):
            started, step = time.perf_counter(), training.step + 1
            logged = step % args.log_every == 0 or step == args.steps
            loss, right = training.train_step(predict=logged)
            if right is not None:
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {step}")
                accuracy = ranks.sum(right.item())[0] / (args.batch * ranks.size)
            seconds = time.perf_counter() - started
            spent, window = spent + seconds, window + seconds
            if logged:
                peak = ranks.max(train_log.peak_memory(ranks.device))[0]
                rate = (step - since) * args.batch * ranks.size / window
                elapsed = time.perf_counter() - begin
                self.write(step, elapsed, window / (step - since), loss=value, accuracy=accuracy, samples_per_s=rate,
                           memory_bytes=int(peak))  # fmt: skip
                window, since = 0.0, step
            if args.checkpoint_every and step % args.checkpoint_every == 0:
                self.checkpoints.save(training)
            if verification_due(args, step):
                self.verify()
        done = training.step - first
        if done and args.checkpoint_every and training.step % args.checkpoint_every:
            self.checkpoints.save(training)
        if self.verified_step != training.step:
            self.verify()
        if self.log is not None:
            self.log.close()
        return {
            "steps_of_this_run": done, "seconds": time.perf_counter() - begin, "seconds_of_steps": spent,
            "samples_per_s": done * args.batch * ranks.size / spent if done else None,
        }  # fmt: skip

    def ended(self, begin: float, first: int) -> bool:
        steps: int | None = self.args.steps
        if steps is not None:
            return self.training.step >= steps
        if self.training.step == first:
            return False
        # The first rank's clock decides for all.
        return self.training.ranks.max(float(time.perf_counter() - begin >= self.args.seconds))[0] > 0

    def write(self, step: int, elapsed: float, seconds_a_step: float, **values: float) -> None:
        if self.log is None:
            return
        self.log.row(step, **values, seconds=round(self.log.seconds + elapsed, 3))
        steps = self.args.steps
        left = self.args.seconds - elapsed if steps is None else (steps - step) * seconds_a_step
        print(train_log.progress(step, steps, max(left, 0), **values), flush=True)

    def verify(self) -> None:
        self.verified_step = self.training.step
        if self.log is None:
            return
        self.verification = rates = self.training.verify()
        self.log.row(self.training.step, **rates)
        print(f"step {self.training.step}: verification of {self.training.source.told(rates)}", flush=True)


def _named(checkpoints: Checkpoints) -> str:
    """Where the checkpoints are, as the last line has it."""
    names = [checkpoints.path(step).name for step in checkpoints.steps()]
    return f"checkpoints in {checkpoints.folder}: {', '.join(names)}" if names else "no checkpoints, as none were asked for"


def _plain(value: Any) -> Any:
    """For JSON: paths as text."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _title(args: argparse.Namespace, source: Source, ranks: Ranks, start: int) -> str:
    facts = machine.describe(ranks.device)
    where = f"{facts.get('gpu', facts['cpu'])}, {ranks.size} rank{'s' if ranks.size > 1 else ''}"
    going_on = f"; going on after step {start}" if start else "; no checkpoint to resume from" if args.resume else ""
    return f"{where}: {source.num_classes:,} classes of {args.dim}, batch {args.batch} a rank{going_on}"
