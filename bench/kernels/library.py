"""The C++ library's kernels that multiply, read without a GPU: registers, stack and the instructions that matter."""

from __future__ import annotations

import re
import subprocess
from typing import Any

from amsoftmax_kernels.backends.cuda import build

from .estimate import CARDS

WAITS = r"ARRIVE|DEPBAR\.LE gsb0, 0x\d"  # of WARPGROUP: products begin, and are waited for but for the last so many groups
IN_FLIGHT = r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1"  # a wait that leaves the last group of HGMMAs at work
INSTRUCTIONS = {
    "local": r"LDL|STL",
    "HGMMA": r"HGMMA",
    "in flight": IN_FLIGHT,
    "HMMA": r"HMMA",
    "UTMALDG": r"UTMALDG",
    "multicast": r"UTMALDG\.2D\.MULTICAST",
    "UTMASTG": r"UTMASTG",
    "cp.async": r"LDGSTS",
    "exp2": r"MUFU\.EX2",
}
PORTABLE, COSINE, GRADIENT = KERNELS = ("cosine_exp, portable", "cosine_exp, Hopper's", "grad_centres, Hopper's")
COMES_AGAIN = "x̂ comes again"


def rows(arch: str) -> list[dict[str, Any]]:
    """One row a kernel of the library built, with spills as errors, for an architecture as nvcc calls it: 80, 90a."""
    import triton  # which brings a disassembler along

    card = CARDS["sm_" + arch.rstrip("a")]
    path = build.cached(arch, strict=True)

    def dump(option: str) -> str:
        command = [triton.knobs.nvidia.cuobjdump.path, option, "-arch", f"sm_{arch}", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"Function (\S+):\s*\n\s*(.*)", dump("--dump-resource-usage")))
    found = []
    for code in dump("-sass").split("Function : ")[1:]:
        name = code.split(maxsplit=1)[0]
        if not re.search("cosine_exp|grad_centres", name):
            continue
        resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[name])}
        variant = _variant(name)
        kernel = GRADIENT if "grad_centres" in name else COSINE if "sm90" in name else PORTABLE
        threads, shared = block(kernel, variant)
        fits = card.programs_resident(resources["REG"], shared + resources["SHARED"], threads // 32)
        planned = 2 if kernel == PORTABLE and "maxima" not in variant and 2 * shared < card.shared_memory else 1
        counts = {key: len(re.findall(rf"\b(?:{pattern})\b", code)) for key, pattern in INSTRUCTIONS.items()}
        found.append(
            {
                "kernel": kernel,
                "variant": variant,
                "warps": threads // 32,
                "registers": resources["REG"],
                "stack": resources["STACK"],
                "shared_memory": shared + resources["SHARED"],
                "fits": fits,
                "instructions": counts,
                "faults": _faults(kernel, resources["STACK"], counts)
                + ([f"fits an SM {fits} times, {planned} planned"] if fits < planned else []),
            }
        )
    return sorted(found, key=lambda row: (row["kernel"], row["variant"]))


def block(kernel: str, variant: str) -> tuple[int, int]:
    """Threads of a block as it is launched, and its bytes of dynamic shared memory."""
    if kernel == PORTABLE:
        return 256, 64 << 10
    return 384, (194 if kernel == GRADIENT else 209 if COMES_AGAIN in variant else 225) << 10


def _variant(name: str) -> str:
    if "grad_centres" in name:
        (columns,) = re.findall(r"grad_centresILi(\d+)E", name)
        centres = "bf16" if "bfloat16" in name else "fp16" if "half_t" in name else "fp32"
        return f"bf16, {columns} columns, {centres} centres"
    dtype = "bf16" if "bfloat16" in name else "tf32" if "tfloat32" in name else "fp16"
    general, *stays = re.findall(r"Lb([01])E", name)
    words = [dtype, *(["maxima and filter"] if general == "1" else [])]
    if "sm90" in name:
        words.append("x̂ stays" if stays[0] == "1" else COMES_AGAIN)
    return ", ".join(words)


def _faults(kernel: str, stack: int, counts: dict[str, int]) -> list[str]:
    copies = ("HGMMA", "UTMALDG", "multicast")
    wanted = {PORTABLE: ("HMMA", "cp.async"), COSINE: (*copies, "UTMASTG"), GRADIENT: copies}[kernel]
    found = [f"no {name}" for name in wanted if not counts[name]]
    if kernel != PORTABLE and not counts["in flight"]:
        found.append("each group of HGMMAs is waited for")
    if stack or counts["local"]:
        found.append(f"{stack} bytes of stack, {counts['local']} local loads and stores")
    return found


def printed(found: list[dict[str, Any]]) -> str:
    """The table as text."""
    names = ("local", "HGMMA", "HMMA", "UTMALDG", "UTMASTG", "cp.async", "exp2")
    head = f"{'kernel':22} {'variant':38} warps regs shared fits stack "
    lines = [head + " ".join(f"{name:>8}" for name in names)]
    for row in found:
        counts = " ".join(f"{row['instructions'][name]:8}" for name in names)
        fault = "  <- " + "; ".join(row["faults"]) if row["faults"] else ""
        lines.append(
            f"{row['kernel']:22} {row['variant']:38} {row['warps']:5} {row['registers']:4} {row['shared_memory']:6}"
            f" {row['fits']:4} {row['stack']:5} {counts}{fault}"
        )
    return "\n".join(lines)
