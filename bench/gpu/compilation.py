"""Before any time limit: everything that later stages launch is compiled, in children that run at once.

A child takes a few small steps, which leaves their kernels in Triton's cache on disk; one more builds the C++ library. What
does not compile is named with the compiler's own words and left out of the later stages: a backend's one kernel that it can
do without, a step's options, or the backend if none of its steps compiles.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import amsoftmax_kernels as ak
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends.cuda import build

from ..kernels.estimate import SHAPES
from ..loss.peers import problem, step
from ..measure import first_line
from . import checks, graphs, peers, smoke, whole_steps
from .checks import DTYPES, given, not_compiled, run_child, serves, step_name, take_step

Row = dict[str, Any]
SECONDS = 240  # for all of them: a C++ library takes a minute, no Triton kernel more than a few seconds
STEPS_A_CHILD = 4
# Sizes that change from step to step compile nothing new: a few rows and classes stand for all.
ROWS, CLASSES = 64, 1008
# Children that are no backend's: torch.compile's code, other libraries', steps that update the centres.
COMPILED, PEERS, UPDATED = "torch.compile", "peers", "whole steps"


class Step(NamedTuple):
    """What decides which kernels are launched."""

    D: int
    dtype: str
    centres: str
    options: tuple[tuple[str, Any], ...] = ()

    def name(self, backend: str) -> str:
        centres = {} if self.centres == "float32" else {"centres": self.centres}
        return step_name(backend, self.D, self.dtype, dict(self.options) | centres)


def steps(device: torch.device) -> list[Step]:
    """Of all later stages."""
    if device.type != "cuda":
        return [Step(16, "float32", "float32"), Step(16, "float32", "float32", (("scale", 200.0),))]
    found: dict[Step, None] = {}
    for (_, D, _), dtype in itertools.product([*smoke.SHAPES, *smoke.FEW], DTYPES):
        for centres in dict.fromkeys(("float32", dtype if dtype == "bfloat16" else "float32")):
            found[Step(D, dtype, centres)] = None
    for _, D, C, options in [*checks.SMALL, *checks.LARGE]:
        for dtype in ("bfloat16",) if C > 100_000 else checks.TOLERANCE:
            found[Step(D, dtype, "float32", tuple(options.items()))] = None
    for _, D, _, options in graphs.CAPTURED:
        found[Step(D, "bfloat16", "float32", tuple(options.items()))] = None
    return sorted(found, key=lambda each: (each.D != 512, each.D, each.dtype))  # the usual width has the most options


def compiled(device: torch.device, seconds: float = SECONDS) -> Iterator[Row]:
    """One row a child, as they end, with the steps that do not compile."""
    jobs: list[tuple[str, int, int]] = []
    for name in ak.available_backends():
        if name != "reference":
            parts = -(-len(steps(device)) // STEPS_A_CHILD) if name == "triton" else 1
            jobs += [(name, part, parts) for part in range(parts)]
    if device.type == "cuda":
        jobs += [(COMPILED, 0, 1), (PEERS, 0, 1), (UPDATED, 0, 1)]
    jobs.sort(key=lambda job: job[0] != "cuda")  # the longest first
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = [pool.submit(_ask, device, *job, seconds) for job in jobs]
        for each in concurrent.futures.as_completed(waiting):
            yield each.result()


def _ask(device: torch.device, name: str, part: int, parts: int, seconds: float) -> Row:
    command = [sys.executable, "-m", "bench.gpu.compilation", str(device), name, str(part), str(parts)]
    result = run_child(command, seconds, output=1 << 20)
    lines = [line for line in result["output"].splitlines() if line.startswith("{")]
    told = [json.loads(line) for line in lines]
    row: Row = {"backend": name, "part": part, "ok": result["ok"], "steps": len(told), "seconds": result.get("seconds")}
    if result["ok"] is None:
        row["skipped"] = result["skipped"]
    wrong = [each for each in told if not each["ok"]]
    if wrong:
        row |= {"failed": wrong, "error": f"{wrong[0]['step']}: {wrong[0]['error']}"}
    elif result["ok"] is False:  # the child itself broke
        row["error"] = build.summary(result["output"])
    row["compiled"] = [each["step"] for each in told if each["ok"]]
    return row


def leave_out(rows: list[Row]) -> list[str]:
    """Take what does not compile out of this process, and say what that is."""
    if not isinstance(rows, list):
        return []  # the stage itself broke
    said = []
    rows = [row for row in rows if "backend" in row]
    for name in dict.fromkeys(row["backend"] for row in rows):
        mine = [row for row in rows if row["backend"] == name]
        wrong = [each for row in mine for each in row.get("failed", ())]
        broken = all(row["ok"] is False for row in mine)  # not for want of time
        without = {each.get("without") for each in wrong}
        if name in backends.NAMES and broken and not any(row["compiled"] for row in mine) and without <= {None}:
            backends.NAMES = tuple(each for each in backends.NAMES if each != name)
            said.append(name)
        elif wrong and len(without) == 1 and (kernel := without.pop()) is not None:
            checks.left_out[name] = kernel
            smoke.do_without(name, kernel)
            said.append(f"{name}'s {kernel}")
        else:
            not_compiled.update({each["step"]: each["error"] for each in wrong})
            said += [each["step"] for each in wrong]
    return said


def main(arguments: list[str] | None = None) -> int:
    """A child: its part of the steps once each, a line of JSON a step; 1 if one does not compile."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.compilation")
    parser.add_argument("device", type=torch.device)
    parser.add_argument("name")
    parser.add_argument("part", type=int)
    parser.add_argument("parts", type=int)
    args = parser.parse_args(arguments)
    if args.name == COMPILED:
        told = _compiled_heads(args.device)
    elif args.name == PEERS:
        told = _others(args.device)
    elif args.name == UPDATED:
        told = _whole_steps(args.device)
    else:
        mine = steps(args.device)
        size = -(-len(mine) // args.parts)
        told = _backends(args.device, args.name, mine[args.part * size : (args.part + 1) * size])
    failed = False
    for row in told:
        failed |= not row["ok"]
        print(json.dumps(row), flush=True)
    return int(failed)


def _backends(device: torch.device, backend: str, mine: list[Step]) -> Iterator[Row]:
    served = [each for each in mine if serves(backend, device, DTYPES[each.dtype])]
    if not served:  # as after a build that failed
        reason = backends.unavailable_reason(backend) or backends.refusal(backend, device, torch.bfloat16)
        yield {"step": backend, "ok": False, "error": reason}
    for each in served:
        yield _told(device, backend, each)


def _told(device: torch.device, backend: str, each: Step) -> Row:
    row: Row = {"step": each.name(backend), "ok": True}
    try:
        _launch(device, backend, each)
    except Exception as error:  # whatever a compiler says
        row |= {"ok": False, "error": build.summary(str(error)) or first_line(error)}
        for kernel in smoke.WITHOUT.get(backend, ()):
            with smoke.without(backend, kernel):
                try:
                    _launch(device, backend, each)
                except Exception:  # it is not that kernel
                    continue
            row["without"] = kernel
            break
    return row


def _launch(device: torch.device, backend: str, each: Step) -> None:
    features, weight, labels = problem(ROWS, each.D, CLASSES, device)
    labels %= CLASSES // dict(each.options).get("subcentres", 1)
    weight = weight.detach().to(DTYPES[each.centres])
    options = given(dict(each.options), CLASSES, device)
    for save_bytes in (1 << 40, 0):
        with torch.autocast(device.type, DTYPES[each.dtype], enabled=each.dtype != "float32"):
            take_step(features, weight, labels, backend, save_bytes, options)
    if device.type == "cuda":
        torch.cuda.synchronize()


def _compiled_heads(device: torch.device) -> Iterator[Row]:
    """torch.compile's code: of the heads that are captured, and of eager PyTorch at the first shapes."""
    for name in checks.compared_backends(device):
        row: Row = {"step": f"{name} {graphs.REDUCED}", "ok": True}
        try:
            graphs.Head(name, *graphs.HEAD, device).reduced()()
        except Exception as error:
            row |= {"ok": False, "error": first_line(error)}
        yield row
    for shape in SHAPES[:2]:
        peer = next(each for each in peers.peers() if each.name == "torch.compile")
        yield _once(peer, shape, device)


def _whole_steps(device: torch.device) -> Iterator[Row]:
    """Steps that update the centres, of the widths that are checked and timed."""
    widths = dict.fromkeys(D for _, D, _ in (*whole_steps.CHECKED, *whole_steps.SHAPES))
    for name, D in itertools.product(checks.compared_backends(device), widths):
        row: Row = {"step": f"{name}, FusedSGD, D={D}", "ok": True}
        features, weight, labels = problem(ROWS, D, CLASSES, device)
        try:
            for save_bytes in (1 << 40, 0):
                whole_steps.ours(name, save_bytes, fused=True)(D, CLASSES, weight.detach())(features, labels)
        except Exception as error:  # the stage itself says it too
            row |= {"ok": False, "error": first_line(error)}
        yield row


def _others(device: torch.device) -> Iterator[Row]:
    for peer in peers.peers():
        if not peer.margin and peer.unavailable() is None:
            yield _once(peer, SHAPES[0], device)


def _once(peer: Any, shape: tuple[int, int, int], device: torch.device) -> Row:
    """A peer that fails here is no fault of ours: the times say so too."""
    row: Row = {"step": f"{peer.name} {shape}", "ok": True}
    tensors = problem(*shape, device)
    try:
        step(peer.make(), *(peer.given(*tensors) if peer.given else tensors), autocast=device.type == "cuda")
    except Exception as error:
        row["note"] = first_line(error)
    return row


if __name__ == "__main__":
    raise SystemExit(main())
