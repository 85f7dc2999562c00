"""What a training writes while it runs: a line on the terminal, a row of a CSV file, TensorBoard's events if asked."""

from __future__ import annotations

import csv
import math
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

COLUMNS = ("step", "loss", "accuracy", "samples_per_s", "memory_bytes", "seconds")
MEASURES = ("eer", "vr@far=1e-2", "vr@far=1e-3")  # of held-out identities


class Log:
    """``log.csv`` in a folder, one row a step that is logged and one an evaluation; floats are written in full.

    ``seconds`` is what the runs before took, up to the last row that is kept.

    Args:
        folder: where to write.
        start: the step a run goes on from: rows past it, of a run that was cut off, are dropped. 0 starts anew.
        verify_again: drop an evaluation at ``start`` too: it may or may not have been reached, and is made again.
        tensorboard: also write TensorBoard's event files into ``folder/tensorboard``.
        measures: columns of an evaluation; those of a run before that had others stay.
    """

    def __init__(
        self, folder: Path, start: int, verify_again: bool, tensorboard: bool, measures: Sequence[str] = MEASURES
    ) -> None:
        path, kept = folder / "log.csv", []
        self._columns = [*COLUMNS, *measures]
        if start and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                header, *lines = [*csv.reader(file)] or [[]]
            # A row that was being written when the process died has no last column.
            rows = [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]
            self._columns += [name for name in header if name not in self._columns]
            kept = [row for row in rows if _stays(row, start, verify_again)]
        times = [float(row["seconds"]) for row in kept if row["seconds"]]
        self.seconds = times[-1] if times else 0.0  # of the runs before
        temporary = path.with_name(f".{path.name}")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(self._columns)
            csv.writer(file).writerows([[row.get(name, "") for name in self._columns] for row in kept])
        os.replace(temporary, path)
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self._writer = csv.writer(self._file)
        self._tensorboard: Any = summary_writer()(folder / "tensorboard", purge_step=start + 1) if tensorboard else None

    def row(self, step: int, **values: float) -> None:
        """Write one row; columns that are not given stay empty."""
        self._writer.writerow([step, *(values.get(name, "") for name in self._columns[1:])])
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _stays(row: dict[str, str], start: int, verify_again: bool) -> bool:
    if not row["step"].isdecimal():
        return False
    step = int(row["step"])
    return step < start or (step == start and (bool(row["loss"]) or not verify_again))


def summary_writer() -> Any:
    """TensorBoard's writer.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--log tensorboard needs the tensorboard package: pip install tensorboard ({error})") from error
    return SummaryWriter


def progress(step: int, steps: int | None, left: float, **values: float) -> str:
    """One line: where the training is, how fast, and how long it will take."""
    of = "" if steps is None else f"/{steps}"
    minutes, seconds = divmod(math.ceil(left), 60)
    return (
        f"step {step}{of}  loss {values['loss']:.3f}  accuracy {values['accuracy']:.3f}"
        f"  {values['samples_per_s']:,.0f} samples/s  {values['memory_bytes'] / 1e6:,.0f} MB a rank"
        f"  {minutes}:{seconds:02d} left"
    )


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process has had of the GPU's memory, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def memory(device: torch.device) -> int:
    """Bytes that this process has now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _status(field: str) -> int:
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        # Where Linux does not say: the peak stands for both; macOS counts bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
