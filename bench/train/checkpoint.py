"""Checkpoints of a training: each rank writes what it holds, and a checkpoint is there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from .ranks import Ranks

_METADATA = ".metadata"  # written by PyTorch when all ranks' files are
_ARGUMENTS = "arguments.json"


class Checkpoints:
    """The checkpoints in one folder: ``step-N`` holds the state after N steps.

    Args:
        folder: on a file system that all ranks share.
        keep: how many of the latest to leave.
        arguments: what must be the same in a run that goes on from one.
        planned: the run's number of steps, to be noted; None where it has none.
    """

    def __init__(self, folder: Path, keep: int, arguments: dict[str, Any], planned: int | None, ranks: Ranks) -> None:
        self.folder, self.keep, self.arguments, self.planned, self.ranks = folder, keep, arguments, planned, ranks

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        folders = [each for each in self.folder.glob("step-*") if (each / _METADATA).exists()]
        return sorted(int(each.name.removeprefix("step-")) for each in folders)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09}"

    def save(self, training: Any) -> None:
        """Write the state of a training; every rank must call it."""
        final = self.path(training.step)
        temporary = final.with_name(f".{final.name}")
        # Of what all ranks hold alike the first rank's is written: a batch norm's statistics are not quite alike.
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        with _alone() as no_dist:
            save_state(_state(training), checkpoint_id=temporary, planner=planner, no_dist=no_dist)
        if self.ranks.rank == 0:
            written = self.arguments | {"steps": self.planned}
            (temporary / _ARGUMENTS).write_text(json.dumps(written, indent=1), encoding="utf-8")
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            for step in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(step))

    def noted(self, step: int) -> int | None:
        """The number of steps that the run of a checkpoint was to have."""
        steps: int | None = self._arguments(step).get("steps")
        return steps

    def _arguments(self, step: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path(step) / _ARGUMENTS).read_text(encoding="utf-8"))
        return found

    def clean(self) -> None:
        """Remove what an interrupted save left behind. For the first rank, before the others go on."""
        for each in self.folder.glob(".step-*"):
            shutil.rmtree(each)

    def load(self, training: Any, step: int) -> None:
        """Put the state after ``step`` steps into a training, whatever the number of ranks that wrote it.

        Raises:
            ValueError: the checkpoint is of a run with other arguments.
        """
        theirs = self._arguments(step)
        for name, value in self.arguments.items():
            if theirs.get(name) != value:
                raise ValueError(f"--{name}: the checkpoint {self.path(step)} has {theirs.get(name)}, not {value}")
        state = _state(training)
        with _alone() as no_dist:
            load_state(state, checkpoint_id=self.path(step), no_dist=no_dist)
        for name in ("backbone", "head"):
            set_state_dict(
                getattr(training, name), getattr(training, f"{name}_optimizer"),
                model_state_dict=state[name], optim_state_dict=state[f"{name}_optimizer"],
            )  # fmt: skip
        training.step = state["progress"]["step"]
        if training.scaler.is_enabled():
            training.scaler.load_state_dict(state["progress"]["scaler"])


@contextlib.contextmanager
def _alone() -> Iterator[bool]:
    """Whether there is no process group, which PyTorch need not warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield not dist.is_initialized()


def _state(training: Any) -> dict[str, Any]:
    """References to everything a step reads, by name: nothing is copied or gathered."""
    state: dict[str, Any] = {"progress": {"step": training.step, "scaler": training.scaler.state_dict()}}
    for name in ("backbone", "head"):
        model, optimizer = get_state_dict(getattr(training, name), getattr(training, f"{name}_optimizer"))
        state[name], state[f"{name}_optimizer"] = model, optimizer
    return state
