"""The ranks of a training: the process group that torchrun asks for, or one process."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks; every rank must call it."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """Each value's largest over the ranks; every rank must call it."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def joined(timeout: float) -> Iterator[Ranks]:
    """The ranks that torchrun started, over NCCL where each has a GPU and gloo elsewhere; without torchrun, one process.

    Args:
        timeout: seconds after which an operation that waits for another rank fails.
    """
    if "WORLD_SIZE" not in os.environ:
        yield Ranks(0, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
        return
    local = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Both where there are GPUs: numbers that the host wants travel without waiting for the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout))
    # Not in a finally: where a rank has died the group cannot be taken down in order.
    yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
