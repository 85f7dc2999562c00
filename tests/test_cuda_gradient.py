"""Hopper's gradient kernel without a GPU: its epilogue for every thread on the CPU, in its layouts; and its machine code."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

from amsoftmax_kernels.backends import cuda
from amsoftmax_kernels.backends.cuda import build
from amsoftmax_kernels.backends.cuda import library as cuda_library
from bench.kernels import library as read

from .cases import CASES, CHUNK, Case, in_turn, oracle
from .cuda_kernels import CPU, CUTLASS, DTYPES, NVCC, check, check_the_gradient_kernel, ours
from .emulation import seed, serve

SHAPES = [
    (1, 1, 8),
    (3, 64, 64),
    (64, 65, 128),
    (65, 257, 136),
    (20, 300, 256),
    (70, 63, 264),
    (9, 300, 512),
    (4, 1100, 256),
    (200, 1600, 512),  # more stages than there are, more tiles than clusters
]


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("B", "N", "D"), SHAPES)
def test_the_gradient_kernel(
    B: int, N: int, D: int, dtype: torch.dtype, order: int, hopper: None, hopper_library: cuda_library.Library
) -> None:
    """At every edge of a tile, of the columns of a block and of a cluster; rows of centres in halves and whole."""
    seed(hopper_library, order)
    check_the_gradient_kernel(B, N, D, dtype)


@pytest.mark.parametrize("wrong", ["inverse_norm", "centres"])
def test_a_wrong_epilogue_would_be_seen(wrong: str, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda._Kernels.grad_centres

    def grad_centres(self: Any, terms: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor) -> bool:
        if wrong == "centres":
            return right(self, terms, x, weight.roll(1, 0), inverse, grad)
        return right(self, terms, x, weight, inverse.roll(1), grad)

    monkeypatch.setattr(cuda._Kernels, "grad_centres", grad_centres)
    with pytest.raises(AssertionError):
        check_the_gradient_kernel(65, 257, 136, torch.float32)


def _operands(D: int = 64, dtype: torch.dtype = torch.bfloat16, N: int = 40) -> list[Tensor]:
    terms, x_factored = torch.ones(16, 48, dtype=dtype)[:, :N], torch.ones(16, -(-D // 16) * 16, dtype=dtype)
    weight = torch.ones(N, D)
    return [terms, x_factored, weight, torch.ones(N), torch.full_like(weight, 7)]


@pytest.mark.parametrize(("case", "save_bytes"), in_turn([case for case in CASES if case.D > 1], 0, None))
def test_against_the_reference(
    case: Case, save_bytes: int | None, hopper: None, short_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of centres that lie as the kernel wants them, every case, chunk by chunk; no other kernel makes their gradient.

    But where a class's centres are padded to a power of two, or labels are smoothed.
    """
    calls: list[str] = []
    call = cuda_library.Library.call
    monkeypatch.setattr(
        cuda_library.Library, "call", lambda self, name, *rest: (calls.append(name), call(self, name, *rest))[1]
    )
    case = dataclasses.replace(case, D=24)
    tensors = [each.clone(memory_format=torch.contiguous_format) for each in case.tensors(torch.float32)]
    check(case, ours(torch.float16, *tensors, save_bytes=save_bytes, **case.options), oracle(case, torch.float32))
    if case.options.get("subcentres") == 3 or "label_smoothing" in case.options:
        assert "ak_grad_centres" not in calls
        return
    assert calls.count("ak_grad_centres") == -(-case.C // CHUNK) and "ak_finish_centres" not in calls


@pytest.mark.parametrize(
    "why", ["tf32", "columns that are no eights", "too wide", "strided centres", "centres that start anywhere", "not Hopper"]
)
def test_what_it_leaves_to_others(why: str, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done, and the caller is told."""
    operands = _operands()
    if why == "tf32":
        operands = _operands(dtype=torch.float32)
    elif why == "columns that are no eights":
        operands = _operands(D=60)
    elif why == "too wide":
        operands = _operands(D=520)
    elif why == "strided centres":
        operands[2] = torch.ones(40, 128)[:, ::2]
    elif why == "centres that start anywhere":
        operands[2] = torch.ones(40 * 64 + 1)[1:].view(40, 64)
    else:
        monkeypatch.setattr(cuda, "_grad_clusters", lambda *unused: 0)
    assert not cuda._Kernels().grad_centres(*operands)
    assert (operands[4] == 7).all()


def test_bad_operands_are_errors(hopper: None, hopper_library: cuda_library.Library) -> None:
    kernels = cuda._Kernels()
    terms, x_factored, weight, inverse_norm, grad = _operands()
    for changed, message in [
        ((terms.float(), x_factored, weight, inverse_norm, grad), "operands must be bfloat16"),
        ((terms, x_factored, weight, inverse_norm, grad.half()), "one type"),
        ((terms[:8], x_factored, weight, inverse_norm, grad), "one number of rows"),
        ((terms[:, :32], x_factored, weight, inverse_norm, grad), "a column for each class"),
        ((terms, x_factored[:, :32], weight, inverse_norm, grad), "wider than the features"),
        ((terms[:0], x_factored[:0], weight, inverse_norm, grad), "nothing to sum"),
        ((torch.ones(16, 41).bfloat16()[:, :40], x_factored, weight, inverse_norm, grad), "multiples of 16 bytes"),
    ]:
        with pytest.raises(RuntimeError, match=f"ak_grad_centres: .*{message}"):
            kernels.grad_centres(*changed)


def test_the_portable_library_has_none(emulated_library: cuda_library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(emulated_library, monkeypatch)
    assert emulated_library.grad_clusters(CPU, 512, torch.float32) == 0
    assert not cuda._Kernels().grad_centres(*_operands())
    monkeypatch.setattr(cuda, "_grad_clusters", lambda *unused: 1)
    with pytest.raises(RuntimeError, match="there is no such kernel for this device"):
        cuda._Kernels().grad_centres(*_operands())


@NVCC
@CUTLASS
def test_the_machine_code() -> None:
    """Warpgroups' products of operands that lie transposed; copies in bulk for a whole cluster; sums sent; none spilled."""
    library = cuda_library.Library(build.cached("90a", strict=True))
    triton = pytest.importorskip("triton")  # which brings a disassembler along
    listing = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-sass", library.path], capture_output=True, text=True, check=True
    ).stdout
    kernels = [each for each in listing.split("Function : ")[1:] if "grad_centres" in each.splitlines()[0]]
    assert len(kernels) == 6  # of two numbers of columns, of three types of centres
    for code in kernels:
        columns = 256 if "ILi256E" in code.splitlines()[0] else 128
        products = rf"HGMMA\.64x{columns}x16\.F32\.BF16 R\d+, gdesc\[UR\d+\]\.tnspA\.tnspB"
        for instruction in (products, r"UTMALDG\.2D\.MULTICAST", r"USETMAXREG\.TRY_ALLOC\.CTAPOOL", "STAS"):
            assert re.search(rf"\b{instruction}(?![\w.])", code), instruction
        assert not re.search(r"\b(LDL|STL)\b", code)
        # Each stage's products are waited for once the next one's are under way, and the last ones alone.
        waits = "".join("A" if each == "ARRIVE" else each[-1] for each in re.findall(rf"WARPGROUP\.({read.WAITS})", code))
        assert re.fullmatch("(A1)+0", waits), waits
        # What the other half sent is read after a wait that acquires another block's: one that empties the L1 cache.
        wait = r"\bSYNCS\.PHASECHK\.TRANS64\.TRYWAIT\b"
        assert re.search(rf"\bSTAS\b.*?{wait}.*?\bCCTL\.IVALL\b.*?\bLDS\b", code, re.DOTALL)
        assert not re.search(r"\bLDS\b", code[: code.index("STAS")])
        # The warps that load give all but 24 registers away; the rest have room for the products and what they go with.
        loads = re.search(r"USETMAXREG\.DEALLOC\.CTAPOOL 0x18 ;(.*?)\bEXIT\b", code, re.DOTALL)
        assert loads is not None and max(int(each) for each in re.findall(r"\bR(\d+)\b", loads[1])) < 24
        # The centres come in batches of 16 loads: one by one, their latency would be all that counts.
        order = "".join("LS"[kind == "STG"] for kind in re.findall(r"\b(LDG|STG)\.E(?:\.64)? ", code))
        assert re.search(r"(L{16}S{16}){" + str(columns // 64 - 1) + "}", order), order


@NVCC
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("B", "N", "D"), [*SHAPES, (1024, 9000, 512), (4096, 3000, 384), (700, 20_000, 256), (1000, 5000, 128)]
)
def test_the_gradient_kernel_on_a_gpu(B: int, N: int, D: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    if not cuda._grad_clusters(torch.device("cuda", torch.cuda.current_device()), 16, torch.float32):
        pytest.skip("this GPU has no such kernel")
    for _ in range(3):  # a race would not show every time
        check_the_gradient_kernel(B, N, D, dtype, device)
