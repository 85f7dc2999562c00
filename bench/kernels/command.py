"""`python -m bench kernels`: compile every Triton kernel in every tuned configuration, without a GPU, and read the code.

Where nvcc is, the C++ library too (not with --quick). Writes the cubins, a table of registers, shared memory, spills and the
instructions that matter, and an estimate of each shape's time. Fails if a kernel spills, lacks its tensor-core or copy
instructions, or fits an SM fewer times than planned.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amsoftmax_kernels.backends.cuda import build

from . import estimate, library

if TYPE_CHECKING:
    from .launches import Launch

PRODUCTS = ("cosine_exp", "grad_centres")
# Local loads and stores in a kernel: a few in rarely taken branches are harmless.
MOST_LOCAL_ACCESSES = 16
_INSTRUCTIONS = {
    "local": r"LDL|STL",
    "HGMMA": r"HGMMA",
    "in flight": library.IN_FLIGHT,
    "HMMA": r"HMMA",
    "UTCMMA": r"UTC\w*MMA",
    "bulk": r"UTMALDG|UTMASTG",
    "cp.async": r"LDGSTS",
    "exp2": r"MUFU\.EX2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m bench kernels`."""
    parser.add_argument("--arch", choices=list(estimate.CARDS), default="sm_90", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/kernels"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="the most different variants only")


def run(args: argparse.Namespace) -> int:
    """Compile, print and write; 1 if a kernel is not as planned."""
    try:
        import triton
    except ImportError as error:
        raise SystemExit(f"bench kernels needs Triton: {error}; pip install 'triton>=3.6,<3.9'") from None
    from .launches import variants

    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: unset it to compile")
    card = estimate.CARDS[args.arch]
    launches = variants(card.capability, card.multiprocessors, args.quick)
    folder = args.out / args.arch
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    print(f"triton {triton.__version__}, {args.arch}: {len(launches)} kernels\n")
    print(f"{'kernel':17} {'variant':52} warps  regs  smem  fits  local  tensor  bulk  cp.async  exp2")
    workers = min(os.cpu_count() or 1, 8)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [(i, each, card.capability[0] * 10 + card.capability[1], folder) for i, each in enumerate(launches)]
        for launch, row in zip(launches, pool.map(_compile, jobs), strict=True):
            row["fits"] = card.programs_resident(row["registers"], row["shared_memory"], launch.warps)
            row["faults"] = faults(launch, row, card)
            rows.append(row)
            print(_line(row), flush=True)
    print("\n" + _summary(rows))
    cpp = [] if args.quick or build.find_nvcc() is None else library.rows(build.architecture(card.capability))
    if cpp:
        print("\nThe C++ library's:\n" + library.printed(cpp))
    shapes = estimate.table(args.arch)
    print("\n" + estimate.printed(shapes, card))
    report = {"triton": triton.__version__, "arch": args.arch, "kernels": rows, "cpp_kernels": cpp, "estimates": shapes}
    with open(folder / "kernels.json", "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
    bad = [f"{row['kernel']} ({row['variant']}): {fault}" for row in [*rows, *cpp] for fault in row["faults"]]
    print("\n" + ("\n".join(bad) if bad else f"all {len(rows) + len(cpp)} as planned") + f"\nwritten to {folder}")
    return int(bool(bad))


def faults(launch: Launch, row: dict[str, Any], card: estimate.Card) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    counts = row["instructions"]
    if counts["local"] > MOST_LOCAL_ACCESSES:
        found.append(f"{counts['local']} local loads and stores, at most {MOST_LOCAL_ACCESSES} allowed")
    if launch.kernel not in PRODUCTS:
        return found
    gradient = launch.kernel == "grad_centres"
    tensor = gradient or launch.constant("PRECISION") == "tf32" or "fp32" not in dict(launch.signature)["x_hat"]
    if tensor and not counts[card.tensor_instruction]:
        found.append(f"no {card.tensor_instruction}")
    if tensor and card.tensor_instruction == "HGMMA" and not counts["in flight"]:
        found.append("each group of HGMMAs is waited for")
    bulk = gradient or launch.constant("BULK")
    if bulk and not counts["bulk"]:
        found.append("no bulk copies")
    if not bulk and not counts["cp.async"]:
        found.append("no asynchronous copies")
    planned = 1 if gradient else card.config(launch).resident
    if row["fits"] < planned:
        found.append(f"fits an SM {row['fits']} times, {planned} planned")
    return found


def _compile(job: tuple[int, Launch, int, Path]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .launches import module_of

    number, launch, capability, folder = job
    function = getattr(module_of(launch.kernel), launch.kernel)
    names = [name for name, _ in launch.signature]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible_by_16}
    compiled = triton.compile(
        ASTSource(function, dict(launch.signature), dict(launch.constants), attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    cubin = folder / f"{number:02}-{launch.kernel}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    registers, counts = _disassemble(cubin, launch.kernel in PRODUCTS)
    return {
        "kernel": launch.kernel,
        "variant": _variant(launch),
        "warps": launch.warps,
        "registers": registers,
        "shared_memory": compiled.metadata.shared,
        "instructions": counts,
        "cubin": cubin.name,
    }


def _disassemble(cubin: Path, products: bool) -> tuple[int, dict[str, int]]:
    """Registers, and instructions that matter; where nothing is multiplied, of these the words that are spilled alone."""
    import triton

    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))
    if not products:  # to disassemble takes longer than to compile
        return registers, dict.fromkeys(_INSTRUCTIONS, 0) | {"local": max(map(int, re.findall(r"STACK:(\d+)", usage))) // 4}
    with tempfile.TemporaryDirectory() as here:
        listing = subprocess.run(
            [triton.knobs.nvidia.nvdisasm.path, "-c", cubin.absolute()], capture_output=True, text=True, check=True, cwd=here
        ).stdout
    counts = {name: len(re.findall(rf"\b(?:{pattern})\b", listing)) for name, pattern in _INSTRUCTIONS.items()}
    return registers, counts


def _variant(launch: Launch) -> str:
    signature = dict(launch.signature)
    types = [
        signature[name] for name in ("x_hat", "w_hat", "terms", "x_factored", "features", "weight") if name in signature
    ]
    kinds = "/".join(dict.fromkeys(re.sub(r"tensordesc<(\w+)\[.*", r"\1", each).lstrip("*") for each in types))
    flags = [name for name, value in launch.constants if value is True]
    tile = [str(launch.constant(name)) for name in ("BLOCK_B", "BLOCK_C", "BLOCK_D") if launch.constant(name)]
    precision = launch.constant("PRECISION")
    parts = [kinds, "x".join(tile), "tf32" if precision == "tf32" else "", "+".join(flags).lower()]
    return " ".join(part for part in parts if part)


def _summary(rows: list[dict[str, Any]]) -> str:
    """How many of each kernel, with the most registers and local accesses of any."""
    lines = []
    for name in dict.fromkeys(row["kernel"] for row in rows):
        mine = [row for row in rows if row["kernel"] == name]
        registers, local = max(row["registers"] for row in mine), max(row["instructions"]["local"] for row in mine)
        lines.append(f"{name:17} {len(mine):4} compiled, at most {registers:3} registers and {local} local accesses")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    counts = row["instructions"]
    tensor = counts["HGMMA"] + counts["HMMA"] + counts["UTCMMA"]
    fault = "  <- " + "; ".join(row["faults"]) if row["faults"] else ""
    return (
        f"{row['kernel']:17} {row['variant'][:52]:52} {row['warps']:5} {row['registers']:5} {row['shared_memory']:6}"
        f"{row['fits']:5} {counts['local']:6} {tensor:7} {counts['bulk']:5} {counts['cp.async']:9} {counts['exp2']:5}{fault}"
    )
