"""Ranks for tests of the sharded head: processes that live as long as the tests, over gloo on the CPU or NCCL on GPUs."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=120)
_device = torch.device("cpu")


def device() -> torch.device:
    """Where a rank's tensors live; the CPU for one process beside them."""
    return _device


class Ranks:
    """Up to ``size`` ranks that functions can be run on; over NCCL each has a GPU."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.backend = backend
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor"])
        self.folder = tempfile.TemporaryDirectory()
        self.calls = 0
        self.ranks: list[tuple[Any, Connection]] = []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, backend), daemon=True)
            process.start()
            there.close()
            self.ranks.append((process, here))

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` of a module returns on each rank of a new group; an error is raised here."""
        if world_size > len(self.ranks):
            pytest.skip(f"{world_size} ranks over {self.backend}: there are {len(self.ranks)} GPUs")
        self.calls += 1
        store = os.path.join(self.folder.name, str(self.calls))
        ranks = self.ranks[:world_size]
        for rank, (_, pipe) in enumerate(ranks):
            pipe.send((rank, world_size, store, function, arguments))
        for rank, (process, pipe) in enumerate(ranks):
            while not pipe.poll(1):
                assert process.is_alive(), f"rank {rank} has died: {process.exitcode}"
        results = [torch.load(io.BytesIO(pipe.recv_bytes()), map_location="cpu", weights_only=False) for _, pipe in ranks]
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error is not None]
        if errors:
            raise AssertionError("\n".join(errors))
        return [result for result, _ in results]

    def close(self) -> None:
        for process, pipe in self.ranks:
            pipe.close()
            process.join(10)
            process.kill()
        self.folder.cleanup()


def _serve(pipe: Connection, backend: str) -> None:
    global _device
    torch.set_num_threads(1)
    while True:
        try:
            rank, world_size, store, function, arguments = pipe.recv()
        except EOFError:
            return
        result, error = None, None
        try:
            if backend == "nccl":
                torch.cuda.set_device(rank)
                _device = torch.device("cuda", rank)
            dist.init_process_group(
                backend, store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=TIMEOUT
            )
            result = function(*arguments)
        except BaseException:
            error = traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        buffer = io.BytesIO()
        torch.save((result, error), buffer)
        pipe.send_bytes(buffer.getvalue())
