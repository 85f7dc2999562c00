"""`python -m bench tune`: time the candidates for the Triton backend's table on this GPU, and print the entries that won.

A candidate's cosine kernel runs alone, storing E, on the shapes of the benchmark; its score is the geometric mean of its
times, if it has the row sums that the table's own entry has. Then the tiles of the centres' gradient, and the sizes of
chunks, by whole steps. What is printed goes into backends/triton/tiles.py by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from amsoftmax_kernels import am_softmax_loss
from amsoftmax_kernels.backends import Problem, chunking
from amsoftmax_kernels.backends import triton as backend
from amsoftmax_kernels.backends.kernels import Cosines, Rows
from amsoftmax_kernels.backends.triton import tiles as triton_tiles
from amsoftmax_kernels.backends.triton.tiles import Config, GradientConfig

from .. import machine, measure
from ..loss.peers import problem, step

# (B, D, C) of one chunk.
SHAPES = [(256, 512, 10_496), (1024, 512, 131_072), (4096, 512, 32_768)]
CHUNK_SHAPE = (1024, 512, 1_000_000)
CHUNKS = (1 << 25, 1 << 26, 1 << 27, 1 << 28)
FINISHES = (1 << 22, 1 << 23, 1 << 24, 1 << 30)
GRADIENT_ROWS = (256, 1024, 2048, 4096)
SAME_SUMS = 1e-3  # relative, between candidates: their products are summed in other orders
KINDS = {"half": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench tune`."""
    parser.add_argument("--out", type=Path, default=Path("out/tune"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all")
    parser.add_argument("--seconds", type=float, default=240, help="shared by all; default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Time, print and write."""
    if not torch.cuda.is_available():
        raise SystemExit("bench tune: PyTorch finds no GPU here")
    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability()
    begin, share = time.perf_counter(), args.seconds / (len(args.kind) + 1)  # what is left at the end is for whole steps
    report: dict[str, Any] = {"machine": machine.describe(device), "capability": capability, "candidates": []}
    args.out.mkdir(parents=True, exist_ok=True)
    winners: dict[str, Config] = {}
    precision = torch.get_float32_matmul_precision()
    for i, how in enumerate(args.kind):
        torch.set_float32_matmul_precision("high" if how == "tf32" else "highest")
        best = math.inf
        sums: list[Tensor] = []
        for config in itertools.chain([triton_tiles.config(capability, how)], candidates(capability, how)):
            if time.perf_counter() > begin + share * (i + 1):
                print("out of time: the rest of the candidates is left out")
                break
            row = _score(config, how, device, sums)
            report["candidates"].append(row)
            mark = ""
            if row.get("score", math.inf) < best:
                best, winners[how], mark = row["score"], config, "  <- best so far"
            print(_line(row) + mark, flush=True)
            (args.out / "tune.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    torch.set_float32_matmul_precision(precision)
    print("\nentries for amsoftmax_kernels/backends/triton/tiles.py:")
    for how, config in winners.items():
        print(f'    ({capability[0]}, "{how}"): {config},')
    end = begin + args.seconds
    for name, rows in (("gradient", _gradients(device, end)), ("chunks", _chunks(device, end))):
        report[name] = []
        try:
            report[name].extend(rows)
        except Exception as error:  # whatever a candidate may have left behind
            print(f"{name}: {measure.first_line(error)}")
        (args.out / "tune.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def candidates(capability: tuple[int, int], how: str) -> Iterator[Config]:
    """The table's own entry first (twice in all: the GPU is cold at first), then its neighbours that fit an SM's memory."""
    yield triton_tiles.config(capability, how)
    bulk = capability[0] >= 9 and how != "float32"
    size = 2 if how == "half" else 4
    room = 227 << 10 if capability[0] >= 9 else 163 << 10
    tiles = {
        "half": [(128, 256, 8), (256, 128, 8), (128, 128, 4), (128, 128, 8), (64, 256, 4), (64, 256, 8)],
        "tf32": [(128, 128, 8), (128, 256, 8), (64, 128, 4), (64, 256, 8)],
        "float32": [(128, 64, 8), (64, 64, 4), (64, 64, 8), (128, 128, 8)],
    }[how]
    depths = {"half": (64, 32, 128), "tf32": (32, 64), "float32": (16, 32)}[how]
    for (rows, classes, warps), depth, stages in itertools.product(tiles, depths, (3, 4, 2)):
        staged = rows * classes * (2 if how == "half" else 4) if bulk else 0  # the tile's way to memory
        memory = stages * (rows + classes) * depth * size + staged
        if memory <= room:
            resident = 2 if memory * 2 < room and rows * classes // (32 * warps) <= 128 and warps <= 4 else 1
            yield Config(rows, classes, depth, stages, warps, bulk, resident)


def gradient_candidates(listed: GradientConfig) -> Iterator[GradientConfig | None]:
    """The table's entry; a library's product and a pass after it; then the entry's neighbours that fit an SM's memory."""
    yield listed
    yield None
    for (classes, warps), rows, stages in itertools.product(((64, 8), (64, 4)), (32, 64), (4, 3, 2)):
        config = dataclasses.replace(listed, rows=rows, classes=classes, stages=stages, warps=warps)
        if config != listed and 2 * stages * rows * (classes + config.columns) <= 227 << 10:
            yield config


def _score(config: Config, how: str, device: torch.device, sums: list[Tensor]) -> dict[str, Any]:
    """``sums``: z of each shape, as the first candidate leaves it here and the others must have it."""
    row: dict[str, Any] = {"kind": how, "config": dataclasses.asdict(config)}
    try:
        with mock.patch.object(backend, "_config", lambda *_: config):
            timed = [_cosine_seconds(*shape, KINDS[how], device) for shape in SHAPES]
    except Exception as error:  # a candidate that does not compile or fit
        return row | {"failed": measure.first_line(error)}
    row["seconds"] = [seconds for seconds, _ in timed]
    sums[:] = sums or [z for _, z in timed]
    apart = max(float(((z - right) / right).abs().max()) for (_, z), right in zip(timed, sums, strict=True))
    if not apart < SAME_SUMS:
        return row | {"failed": f"its sums are {apart:.1e} away from those of the table's entry"}
    row["score"] = statistics.geometric_mean(row["seconds"])
    row["tflops"] = [2e-12 * B * D * C / s for (B, D, C), s in zip(SHAPES, row["seconds"], strict=True)]
    return row


def _cosine_seconds(B: int, D: int, C: int, dtype: torch.dtype, device: torch.device) -> tuple[float, Tensor]:
    """Seconds of a launch, and the row sums."""
    features, weight, labels = (each.detach() for each in problem(B, D, C, device))
    given = Problem(features, weight, labels, None, 30.0, True, dtype, math.inf)
    kernels, width = backend._Kernels(), chunking.padded(D)
    cosine, norm, shift, factor = features.new_empty(4, B).unbind()
    rows = Rows(features.new_empty(B, width, dtype=dtype), factor, cosine, norm, shift)
    kernels.prepare_rows(given, 30.0, rows)
    w_hat = weight.new_empty(C, width, dtype=dtype)
    kernels.prepare_centres(weight, w_hat, features.new_empty(C))
    terms = features.new_empty(B, chunking.padded(C), dtype=chunking.panel_dtype(dtype))
    z = features.new_empty(kernels.streams(given, C), B, dtype=torch.float64)
    rows = rows._replace(shift=None)

    def launch() -> None:
        kernels.cosine_exp(given, 0, rows, w_hat, Cosines(terms, z))

    def five() -> None:
        for _ in range(5):
            launch()

    five()
    seconds = statistics.median(measure.seconds(five, device, queued=True) / 5 for _ in range(5))
    return seconds, z.sum(0)


def _gradients(
    device: torch.device, end: float, batches: tuple[int, ...] = GRADIENT_ROWS, D: int = 512, C: int = 131_072
) -> Iterator[dict[str, Any]]:
    """Whole steps with the centres' gradient by other tiles, and as a product and a pass after it."""
    listed = backend._gradient_config(device)
    if listed is None:
        return
    for B, config in itertools.product(batches, gradient_candidates(listed)):
        if time.perf_counter() > end:
            return
        row: dict[str, Any] = {"B": B, "D": D, "C": C, "config": None if config is None else dataclasses.asdict(config)}
        with mock.patch.object(backend, "_gradient_config", lambda _, config=config: config):
            try:
                row["seconds"] = _step_seconds(problem(B, D, C, device), 1 << 62, device)
            except Exception as error:  # a candidate that does not compile or fit
                row["failed"] = measure.first_line(error)
        took = row.get("failed") or f"{1e3 * row['seconds']:.3f} ms"
        print(f"gradient, B={B}: {config or 'product and pass'}: {took}", flush=True)
        yield row


def _chunks(
    device: torch.device, end: float, chunks: tuple[int, ...] = CHUNKS, finishes: tuple[int, ...] = FINISHES
) -> Iterator[dict[str, Any]]:
    """Whole steps with other sizes of chunks."""
    tensors = problem(*CHUNK_SHAPE, device)
    for chunk, finish in itertools.product(chunks, finishes):
        if time.perf_counter() > end:
            return
        with mock.patch.object(chunking, "CHUNK_ELEMENTS", chunk), mock.patch.object(chunking, "FINISH_ELEMENTS", finish):
            row: dict[str, Any] = {"chunk": chunk, "finish": finish}
            for name, save_bytes in (("kept", 1 << 62), ("recomputed", 0)):
                row[name] = _step_seconds(tensors, save_bytes, device)
        print(f"chunk 2^{chunk.bit_length() - 1}, finish 2^{finish.bit_length() - 1}: "
              f"kept {1e3 * row['kept']:.3f} ms, recomputed {1e3 * row['recomputed']:.3f} ms", flush=True)  # fmt: skip
        yield row


def _step_seconds(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], save_bytes: int, device: torch.device) -> float:
    def loss(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return am_softmax_loss(x, w, y, backend="triton", save_bytes=save_bytes)

    def one() -> None:
        step(loss, *tensors, autocast=device.type == "cuda")

    for _ in range(2):
        one()
    return statistics.median(measure.seconds(one, device) for _ in range(5))


def _line(row: dict[str, Any]) -> str:
    c = row["config"]
    tile = f"{row['kind']:8} {c['rows']:4}x{c['classes']:<4} depth {c['depth']:3} stages {c['stages']} warps {c['warps']}"
    tile += f" resident {c['resident']}"
    if "failed" in row:
        return f"{tile}  {row['failed']}"
    return tile + "  " + "  ".join(f"{each:7.1f}" for each in row["tflops"]) + " TFLOP/s"
