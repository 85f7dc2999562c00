"""A whole training step of the head: loss, gradients and the centres' update with momentum, by each way to make it.

First that centres updated in the backward pass end where ``torch.optim.SGD`` leads them, then time and peak memory.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.optim import FusedSGD

from .. import machine, measure
from ..loss.peers import MARGIN, SCALE, problem
from .checks import compared_backends, release
from .peers import partial_fc

Row = dict[str, Any]
SHAPES = ((256, 512, 10_516), (1024, 512, 93_431), (1024, 512, 1_000_000), (1024, 512, 10_000_000))
CHECKED = ((64, 128, 5_000), (256, 512, 93_431))
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
APART = 2e-2  # of what three steps change, in bfloat16: both have the same rounded products
SECONDS = 1.5  # of timing a way
_Step = Callable[[Tensor, Tensor], Tensor]


def whole_steps(
    device: torch.device, known: dict[str, Any], quick: bool, shapes: Any = SHAPES, checked: Any = CHECKED
) -> Iterator[Row]:
    """A row for each check, then one for each shape and way."""
    for name, (B, D, C) in itertools.product(compared_backends(device), checked):
        row = {"backend": name, "B": B, "D": D, "C": C}
        try:
            row |= _check(name, B, D, C, device)
        except Exception as error:  # the others' rows are wanted all the same
            row |= {"ok": False, "error": measure.first_line(error)}
        yield row
        release(device)
    for B, D, C in shapes[:2] if quick else shapes:
        for name, (make, bytes_a_weight) in _ways(device).items():
            row = {"B": B, "D": D, "C": C, "way": name}
            needed, free = (bytes_a_weight + 8) * C * D + 2 * B * C, machine.available_bytes(device)
            if free is not None and needed > 0.92 * free:
                yield row | {"skipped": f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"}
                continue
            try:
                row |= _time(make, B, D, C, device)
                # What must move: the centres read in the forward pass, then all that the update reads and writes.
                row["bytes_s"] = (4 + bytes_a_weight) * C * D / float(known["copy_bytes_s"])
            except Exception as error:
                row["skipped"] = f"failed: {measure.first_line(error)}"
            yield row
            release(device)


def _ways(device: torch.device) -> dict[str, tuple[Callable[[int, int, Tensor], _Step], int]]:
    """How to make the step, and the bytes a weight of float32 that its backward pass and update move at the least."""
    found: dict[str, tuple[Callable[[int, int, Tensor], _Step], int]] = {}
    for name in compared_backends(device):
        for save_bytes, kept in ((1 << 62, "E kept"), (0, "recomputed")):
            found[f"{name}, {kept}, FusedSGD"] = (ours(name, save_bytes, True), 16)  # centres and momentum, both ways
            found[f"{name}, {kept}, torch.optim.SGD"] = (ours(name, save_bytes, False), 28)
    found["PartialFC algorithm, torch.optim.SGD"] = (_partial_fc, 28)
    return found


def ours(backend: str, save_bytes: int, fused: bool) -> Callable[[int, int, Tensor], _Step]:
    """From D, C and the first centres ``[C, D]`` to a step, with their update in the backward pass or after it."""

    def make(D: int, C: int, centres: Tensor) -> _Step:
        head = ak.AMSoftmaxLoss(
            D, C, SCALE, MARGIN, backend=backend, save_bytes=save_bytes, device=centres.device
        )  # fmt: skip
        head.set_centres(centres)
        optimizer = FusedSGD(head, **OPTIONS) if fused else torch.optim.SGD(head.parameters(), **OPTIONS, fused=True)
        return _stepped(head, optimizer)

    return make


def _partial_fc(D: int, C: int, centres: Tensor) -> _Step:
    weight = torch.nn.Parameter(centres.clone())
    optimizer = torch.optim.SGD([weight], **OPTIONS, fused=True)
    return _stepped(lambda x, labels: partial_fc(x, weight, labels), optimizer)


def _stepped(loss: Callable[[Tensor, Tensor], Tensor], optimizer: torch.optim.Optimizer) -> _Step:
    def step(x: Tensor, labels: Tensor) -> Tensor:
        x.grad = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            value = loss(x, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def _check(backend: str, B: int, D: int, C: int, device: torch.device) -> Row:
    """Three steps of both optimizers: centres and momentum apart, relative to what they have changed."""
    x, centres, labels = problem(B, D, C, device)
    start, ends = centres.detach().clone(), []
    labels[1] = labels[0]
    for fused in (True, False):
        head = ak.AMSoftmaxLoss(D, C, SCALE, MARGIN, backend=backend, device=device)
        head.set_centres(start)
        optimizer = FusedSGD(head, **OPTIONS) if fused else torch.optim.SGD(head.parameters(), **OPTIONS)
        step = _stepped(head, optimizer)
        for _ in range(3):
            step(x, labels)
        ends.append((head.weight.detach() - start, optimizer.state[head.weight]["momentum_buffer"]))
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(*ends, strict=True))
    return {"apart": apart, "ok": apart <= APART}


def _time(make: Callable[[int, int, Tensor], _Step], B: int, D: int, C: int, device: torch.device) -> Row:
    x, centres, labels = problem(B, D, C, device)
    step = make(D, C, centres.detach())
    del centres

    def one() -> Tensor:
        return step(x, labels)

    loss = one().item()
    one()
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one()
        peak = torch.cuda.max_memory_allocated() - held  # above centres and momentum
    once = measure.seconds(one, device)
    samples = [measure.seconds(one, device) for _ in range(max(min(int(SECONDS / once), 40), 3))]
    return {"loss": loss, "median_s": statistics.median(samples), "min_s": min(samples), "peak_bytes": peak}
