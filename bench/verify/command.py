"""`python -m bench verify`: a protocol on features that are in files, as a table, JSON and a figure.

Arrays are .npy, .npz (FILE.npz:NAME where it has several) or .txt with a number a line. Features are also MegaFace's .bin
files: one, a folder of them, or a .txt that lists them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from amsoftmax_kernels import evaluation as ev

from .. import machine
from .files import array, features, streamed


class Protocol(NamedTuple):
    """What runs a protocol, the options that it must and may have, and what it is."""

    run: Callable[[argparse.Namespace], ev.Result]
    needs: tuple[str, ...]
    may: tuple[str, ...]
    text: str


def _all_pairs(args: argparse.Namespace) -> ev.Result:
    rows, far = _on(args, features(args.features)), args.far or (1e-3, 1e-4)
    return ev.verification(rows, array(args.labels), far, progress=True)


def _pairs(args: argparse.Namespace) -> ev.Result:
    rows = _on(args, features(args.features))
    return ev.pairs(rows[::2], rows[1::2], array(args.same), args.folds or 10, args.far or (1e-3,))


def _templates(args: argparse.Namespace) -> ev.Result:
    rows = _on(args, features(args.features))
    far = args.far or (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    return ev.template_pairs(rows, array(args.first), array(args.second), array(args.same), far)


def _open_set(args: argparse.Namespace) -> ev.Result:
    far, ranks = args.far or (1e-2,), args.ranks or (1,)
    if len(far) > 1 or len(ranks) > 1:
        raise ValueError("--far and --ranks must be one number each with --protocol open-set")
    gallery, probes, impostors = (_on(args, features(each)) for each in (args.features, args.probes, args.impostors))
    return ev.open_set(gallery, array(args.labels), probes, array(args.probe_labels), impostors, far[0], ranks[0])


def _blufr(args: argparse.Namespace) -> ev.Result:
    labels, trials = ev.load_blufr(args.config)
    far, dir_far = args.far or (1e-3, 1e-4), args.dir_far or (1e-2,)
    return ev.blufr(_on(args, features(args.features)), labels, trials, far, dir_far, args.ranks or (1,), progress=True)


def _megaface(args: argparse.Namespace) -> ev.Result:
    options = {name: value for name, value in (("sizes", args.sizes), ("far", args.far)) if value is not None}
    rows = _on(args, features(args.features))
    return ev.megaface(rows, array(args.labels), streamed(args.distractors), progress=True, **options)


PROTOCOLS = {
    "verification": Protocol(_all_pairs, ("labels",), ("far",), "all pairs"),
    "pairs": Protocol(_pairs, ("same",), ("far", "folds"), "ten folds as of LFW: rows 2i and 2i + 1 are a pair"),
    "templates": Protocol(_templates, ("first", "second", "same"), ("far",), "IJB's 1:1: rows are templates"),
    "open-set": Protocol(
        _open_set, ("labels", "probes", "probe_labels", "impostors"), ("far", "ranks"), "features are the gallery's"
    ),
    "blufr": Protocol(_blufr, ("config",), ("far", "dir_far", "ranks"), "LFW BLUFR's ten trials"),
    "megaface": Protocol(_megaface, ("labels", "distractors"), ("far", "sizes"), "features are the probes'"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench verify`."""
    add = parser.add_argument
    texts = "; ".join(f"{name}: {each.text}" for name, each in PROTOCOLS.items())
    add("--protocol", choices=list(PROTOCOLS), default="verification", help=f"{texts}; default: %(default)s")
    add("--features", required=True, metavar="FILE", help="[N, D]: .npy, .npz[:NAME], MegaFace's .bin, a folder, a list")
    for name, text in (
        ("labels", "[N] integers, one a person"),
        ("same", "[P], whether pairs are of one person"),
        ("first", "[P] rows of the templates"),
        ("second", "[P] rows to compare them with"),
        ("probes", "[P, D], of people in the gallery"),
        ("probe-labels", "[P]"),
        ("impostors", "[I, D], of other people"),
        ("distractors", "[M, D], streamed: more than fit in memory"),
        ("config", "blufr_lfw_config.mat, of the protocol's authors"),
    ):
        add(f"--{name}", metavar="FILE", help=text)
    add("--far", type=float, nargs="+", metavar="RATE", help="false acceptance rates; default: the protocol's")
    add("--dir-far", type=float, nargs="+", metavar="RATE", help="false alarm rates of blufr's identification")
    add("--ranks", type=int, nargs="+", metavar="RANK", help="of identification; default: 1")
    add("--sizes", type=int, nargs="+", metavar="N", help="numbers of distractors; default: 10, 100 … 1,000,000")
    add("--folds", type=int, metavar="N", help="of pairs; default: 10")
    add("--device", default="cpu", help="where to compute: cuda, say; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the result there too")
    add("--plot", type=Path, metavar="FILE", help="draw it there: .png, .pdf or .svg")


def run(args: argparse.Namespace) -> int:
    """Run a protocol; exit status 0, 2 for bad arguments and files, 130 if interrupted."""
    try:
        _check(args)
        result = PROTOCOLS[args.protocol].run(args)
        print(result)
        if args.json is not None:
            report = result.as_json() | {"machine": machine.describe(torch.device(args.device))}
            args.json.write_text(json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
        if args.plot is not None:
            ev.figure(result).savefig(args.plot, dpi=150)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _check(args: argparse.Namespace) -> None:
    """That a protocol's options are there, and no other's.

    Raises:
        ValueError: one is missing, or not the protocol's.
    """
    protocol = PROTOCOLS[args.protocol]
    others = {name for each in PROTOCOLS.values() for name in (*each.needs, *each.may)} - {*protocol.needs, *protocol.may}
    for name in protocol.needs:
        if getattr(args, name) is None:
            raise ValueError(f"--protocol {args.protocol} needs --{name.replace('_', '-')}")
    for name in sorted(others):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is not for --protocol {args.protocol}")


def _on(args: argparse.Namespace, rows: Any) -> torch.Tensor:
    return torch.as_tensor(rows).to(args.device)
