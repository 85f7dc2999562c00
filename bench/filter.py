"""`python -m bench filter`: what a gradient filter leaves of this loss's gradient, emulated in float32.

Cut cross-entropy (Wijmans et al. 2024, arXiv 2411.09009, section 4.3) leaves a block of 128 x 128 out of both gradients if
no entry of the softmax in it, less 1 at the targets, reaches 2⁻¹², the classes in the order of their average logit. That
takes for granted that what is dropped is small beside what is kept. Here is how much it is, for features at random and for
some that have learned their own centre.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from . import machine
from .peers import MARGIN

BLOCK, LEAST = 128, 2.0**-12
CHUNK = 128 * BLOCK  # classes at a time
OWN = (None, 0.5, 0.7)  # cosine of each feature to its own centre; None: at random
COLUMNS = ("features", "weight", "other centres")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench filter`."""
    parser.add_argument("--classes", type=int, nargs="+", default=[93_431, 1_000_000], metavar="C", help="default: both")
    parser.add_argument("--scale", type=float, nargs="+", default=[30.0, 64.0], metavar="S", help="default: 30 and 64")
    parser.add_argument("--batch", type=int, default=256, metavar="B", help="default: %(default)s")
    parser.add_argument("--dim", type=int, default=512, metavar="D", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows and the machine there, as JSON")


def run(args: argparse.Namespace) -> int:
    """Compute and print."""
    print(f"margin {MARGIN}; relative errors of the gradients of features, of centres, and of those that are no row's own\n")
    print(f"{'B':>5} {'C':>10} {'s':>3} {'own':>5} {'p':>8} {'blocks':>8} " + " ".join(f"{each:>13}" for each in COLUMNS))
    rows = []
    for row in _rows(args):
        rows.append(row)
        own = "-" if row["own"] is None else row["own"]
        errors = " ".join(f"{row[each]:13.2g}" for each in COLUMNS)
        print(
            f"{row['B']:5} {row['C']:10,} {row['s']:3.0f} {own:>5} {row['p']:8.2g} {row['blocks']:8.2%} {errors}", flush=True
        )
    if args.out:
        args.out.write_text(json.dumps({"machine": machine.describe(), "results": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def _rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for C in args.classes:
        for scale in args.scale:
            for own in OWN:
                x, w, labels = embeddings(args.batch, args.dim, C, own)
                yield {"B": args.batch, "D": args.dim, "C": C, "s": scale, "own": own, **compare(x, w, labels, scale)}


def embeddings(B: int, D: int, C: int, own: float | None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized features and centres, and labels, no two alike; each feature at the cosine ``own`` to its centre."""
    generator = torch.Generator().manual_seed(seed)
    w = normalize(torch.randn(C, D, generator=generator))
    labels = torch.randperm(C, generator=generator)[:B]
    x = normalize(torch.randn(B, D, generator=generator))
    if own is not None:
        target = w[labels]
        x = own * target + math.sqrt(1 - own * own) * normalize(x - (x * target).sum(1, keepdim=True) * target)
    return x, w, labels


def compare(x: Tensor, w: Tensor, labels: Tensor, scale: float) -> dict[str, float]:
    """The mean of p, the negatives' probability; the share of blocks not left out; and the errors of both gradients.

    Gradients by x̂ and ŵ: what the normalization does to them later is the same for all.
    """
    B = len(x)
    z, average = x.new_zeros(B, dtype=torch.float64), []
    for start, part in _chunks(w):
        logits = scale * (x @ part.T)
        average.append(logits.mean(0))
        logits[_targets(labels, start, part)] = -math.inf
        z += logits.double().exp().sum(1)
    u = scale * ((x * w[labels]).sum(1).double() - MARGIN)
    lse = torch.logaddexp(z.log(), u)
    p = (z.log() - lse).exp()
    order = torch.cat(average).argsort()
    w, labels = w[order], torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))[labels]
    exact, filtered = torch.zeros_like(x), torch.zeros_like(x)
    size, error = x.new_zeros(2, dtype=torch.float64), x.new_zeros(2, dtype=torch.float64)  # of all centres, of others
    blocks = kept = 0
    for start, part in _chunks(w):
        cells = _targets(labels, start, part)
        panel = (scale * (x @ part.T) - lse[:, None]).exp().float()
        panel[cells] = -p[cells[0]].float()
        tiles = pad(panel, (0, -len(part) % BLOCK, 0, -B % BLOCK)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        live = tiles.abs().amax((1, 3), keepdim=True) >= LEAST
        blocks, kept = blocks + live.numel(), kept + int(live.sum())
        left = (tiles * live).flatten(2).flatten(0, 1)[:B, : len(part)]
        exact += panel @ part
        filtered += left @ part
        of_centres, lost = (panel.T @ x).square().sum(1), ((panel - left).T @ x).square().sum(1)
        others = torch.ones(len(part)).index_fill_(0, cells[1], 0)
        size += torch.stack([of_centres.sum(), of_centres @ others])
        error += torch.stack([lost.sum(), lost @ others])
    of_x = ((filtered - exact).norm() / exact.norm()).item()
    errors = dict(zip(COLUMNS, (of_x, *(error / size).sqrt().tolist()), strict=True))
    return {"p": p.mean().item(), "blocks": kept / blocks, **errors}


def _chunks(w: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(w), CHUNK):
        yield start, w[start : start + CHUNK]


def _targets(labels: Tensor, start: int, part: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose class is in this part, and its place there."""
    mine = ((labels >= start) & (labels < start + len(part))).nonzero()[:, 0]
    return mine, labels[mine] - start
