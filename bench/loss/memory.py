"""Peak memory of a step: on a CPU in a process of its own, on a GPU by its allocator."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .peers import PEERS, problem, step


def peak_memory(peer: str, B: int, D: int, C: int, device: torch.device, autocast: bool = False) -> dict[str, int] | None:
    """Bytes a step needs above its inputs, and above inputs and gradients: the peak of a fresh process.

    None where the system does not tell a process its own peak.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    arguments = (there, peer, B, D, C, device.type, torch.get_num_threads(), autocast)
    process = context.Process(target=_measure_peak, args=arguments)
    process.start()
    there.close()
    try:
        result: int | None = here.recv()
    except EOFError:
        result = None
    process.join()
    if result is None:
        return None
    return {"above_inputs": result, "above_inputs_and_gradients": result - 4 * D * (B + C)}


def _measure_peak(
    pipe: multiprocessing.connection.Connection,
    name: str,
    B: int,
    D: int,
    C: int,
    device_type: str,
    threads: int,
    autocast: bool,
) -> None:
    torch.set_num_threads(threads)
    device = torch.device(device_type)
    loss = next(peer for peer in PEERS if peer.name == name).make()
    step(loss, *problem(8, D, 64, device), autocast=autocast)  # whatever libraries set up once
    tensors = problem(B, D, C, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, *tensors, autocast=autocast)
        pipe.send(torch.cuda.max_memory_allocated() - before)
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as clear:
            clear.write("5")  # the peak counts from here
        before = _status("VmRSS")
        step(loss, *tensors, autocast=autocast)
        pipe.send(_status("VmHWM") - before)
    except OSError:
        pipe.send(None)


def peak_on_gpu(one: Callable[[], Any], problems: Sequence[tuple[Tensor, Tensor, Tensor]]) -> int:
    """Bytes that a step needs above inputs and gradients; the first of ``problems`` is the one it takes next."""
    for x, w, _ in problems:
        x.grad = w.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one()
    x, w, _ = problems[0]
    gradients = sum(each.numel() * each.element_size() for each in (x, w))
    return int(torch.cuda.max_memory_allocated() - before - gradients)


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
