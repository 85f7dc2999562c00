"""Hopper's own kernels without a GPU: the cosine kernel, emulated as it stands, and its machine code."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

from amsoftmax_kernels.backends import Problem, chunking, cuda, proof
from amsoftmax_kernels.backends.cuda import build
from amsoftmax_kernels.backends.cuda import library as cuda_library
from amsoftmax_kernels.backends.kernels import Cosines, Rows
from bench.kernels import library as read

from .cases import BY_NAME, CASES, Case, in_turn, oracle, traits
from .cuda_kernels import CPU, CUTLASS, DTYPES, NVCC, check, check_the_cosine_kernel, check_the_gradient_kernel, ours
from .emulation import last_block, seed, serve


def test_one_block_of_few_rows_and_two_that_share_classes(hopper_library: cuda_library.Library) -> None:
    for (batch, rows), dtype in itertools.product(
        ((1, 128), (128, 128), (129, 256), (4096, 256)), (torch.bfloat16, torch.float32)
    ):
        tiling = hopper_library.tiling(CPU, batch, 512, dtype)
        assert (tiling.rows, tiling.classes, tiling.parts) == (rows, 128, 2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=["fp16", "bf16", "tf32"])
@pytest.mark.parametrize(
    ("B", "N", "width", "partial_sums"),
    [(1, 1, 16, 2), (64, 64, 48, 14), (127, 129, 16, 4), (130, 300, 160, 2), (257, 640, 16, 14), (128, 700, 272, 2),
     (130, 700, 528, 2), (129, 400, 1024, 2), (256, 700, 512, 4)],
)  # fmt: skip
def test_the_cosine_kernel(
    B: int, N: int, width: int, partial_sums: int, dtype: torch.dtype, order: int, hopper: None,
    hopper_library: cuda_library.Library,
) -> None:  # fmt: skip
    """At tiles' edges, one block and two, rows of x̂ that stay and that come again, streams of many tiles and of none."""
    seed(hopper_library, order)
    check_the_cosine_kernel(B, N, width, dtype, partial_sums)


@pytest.mark.parametrize("wrong", ["mask", "factor", "shift", "class"])
def test_a_wrong_epilogue_would_be_seen(wrong: str, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda._Kernels.cosine_exp

    def cosine_exp(self: Any, problem: Problem, start: int, rows: Rows, w_hat: Tensor, out: Cosines) -> None:
        if wrong == "mask":
            problem = problem._replace(labels=torch.full_like(problem.labels, -1))
        elif wrong == "class":
            start += 1
        elif wrong == "factor":
            rows = rows._replace(factor=rows.factor.roll(1))
        elif rows.shift is not None:
            rows = rows._replace(shift=rows.shift.roll(1))
        right(self, problem, start, rows, w_hat, out)

    monkeypatch.setattr(cuda._Kernels, "cosine_exp", cosine_exp)
    with pytest.raises(AssertionError):
        check_the_cosine_kernel(130, 300, 16, torch.bfloat16, 4)


def test_a_row_of_nan_is_its_own(hopper: None) -> None:
    B, N, width = 140, 200, 16
    x_hat, w_hat = (torch.randn(n, width).div(4).bfloat16() for n in (B, N))
    x_hat[7] = math.nan
    problem = Problem(x_hat, w_hat, torch.arange(B), None, 30.0, True, torch.bfloat16, math.inf)
    terms, z = torch.empty(B, 208, dtype=torch.bfloat16), torch.empty(4, B, dtype=torch.float64)
    best, best_class = torch.empty(4, B), torch.empty(4, B, dtype=torch.int64)
    vectors = Rows(x_hat, *[torch.full((B,), 9.0)] * 3, None)
    cuda._Kernels().cosine_exp(problem, 0, vectors, w_hat, Cosines(terms, z, best, best_class))
    rows = terms.isnan().any(1)
    assert rows[7] and rows.sum() == 1 and terms[7, 7] == 0 and not terms[:, N:].any()
    assert z.sum(0).isnan().tolist() == rows.tolist()
    assert (best[:, 7] == -math.inf).all() and (best_class[:, 7] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "tf32"])
def test_terms_end_where_their_matrix_does(dtype: torch.dtype, hopper: None) -> None:
    """Rows of E are written into a wider matrix, whose other columns are another chunk's."""
    x_hat, w_hat = (torch.randn(n, 16).to(dtype) for n in (130, 72))
    problem = Problem(x_hat, w_hat, torch.zeros(130).long(), None, 30.0, True, dtype, math.inf)
    kept = torch.full((131, 200), 7.0, dtype=chunking.panel_dtype(dtype))
    terms = kept[:130, 40 : 40 + 80]
    cuda._Kernels().cosine_exp(problem, 0, Rows(x_hat, *[torch.ones(130)] * 3, None), w_hat, Cosines(terms))
    assert (kept[:130, :40] == 7).all() and (kept[:130, 120:] == 7).all() and (kept[130] == 7).all()
    assert terms[:, 1:72].gt(0).all() and not terms[:, 72:].any() and not terms[:, 0].any()


@pytest.mark.parametrize(("case", "save_bytes"), in_turn(CASES, None, 0))
def test_against_the_reference(case: Case, save_bytes: int | None, hopper: None, short_chunks: None) -> None:
    actual = ours(torch.float16, *case.tensors(torch.float32), save_bytes=save_bytes, **case.options)
    check(case, actual, oracle(case, torch.float32))


def test_blocks_are_as_the_benchmarks_count_them(
    hopper: None, hopper_library: cuda_library.Library, emulated_library: cuda_library.Library,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for width, variant in ((512, "x̂ stays"), (528, read.COMES_AGAIN)):
        check_the_cosine_kernel(1, 1, width, torch.bfloat16, 2)
        assert last_block(hopper_library) == read.block(read.COSINE, variant)
    for width in (128, 512):
        check_the_gradient_kernel(1, 1, width, torch.float32)
        assert last_block(hopper_library) == read.block(read.GRADIENT, "")
    serve(emulated_library, monkeypatch)
    check_the_cosine_kernel(1, 1, 16, torch.bfloat16, 1)
    assert last_block(emulated_library) == read.block(read.PORTABLE, "")


def test_kernels_are_left_out_one_by_one(
    hopper: None, hopper_library: cuda_library.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the environment: the portable kernel and the pass over the library's product serve in their place."""
    for names, parts, clusters in (
        ("", 2, 3),
        ("cosine_sm90", 1, 3),
        ("gradient_sm90", 2, 0),
        (" cosine_sm90, gradient_sm90", 1, 0),
    ):
        monkeypatch.setenv("AMSOFTMAX_KERNELS_WITHOUT", names)
        library = cuda_library.Library(hopper_library.path)
        library.check(CPU)
        assert library.tiling(CPU, 300, 512, torch.bfloat16).parts == parts
        assert library.grad_clusters(CPU, 512, torch.float32) == clusters
        assert library.has_hopper == (parts == 2 or clusters > 0)
        serve(library, monkeypatch)
        check_the_cosine_kernel(130, 300, 16, torch.bfloat16, 2)
        if clusters:
            check_the_gradient_kernel(3, 64, 64, torch.float32)
    facts = []
    for names in ("", "cosine_sm90"):  # what serves is proven, whatever is left out
        monkeypatch.setenv("AMSOFTMAX_KERNELS_WITHOUT", names)
        facts.append([proof._facts(name, traits(CPU, torch.bfloat16)) for name in ("cuda", "triton")])
    assert facts[0][0] != facts[1][0] and facts[0][1] == facts[1][1]
    monkeypatch.setenv("AMSOFTMAX_KERNELS_WITHOUT", "cosine_sm80")
    with pytest.raises(ValueError, match=r"AMSOFTMAX_KERNELS_WITHOUT names 'cosine_sm80', .* cosine_sm90, gradient_sm90"):
        cuda_library.Library(hopper_library.path)


def test_an_odd_number_of_partial_sums_is_an_error(hopper: None) -> None:
    with pytest.raises(RuntimeError, match="ak_cosine_exp: an odd number of partial sums"):
        check_the_cosine_kernel(1, 1, 16, torch.float16, 3)


@NVCC
@CUTLASS
def test_the_machine_code() -> None:
    """Warpgroups' products; copies in bulk, for a whole cluster, and out; registers where they are needed, none spilled."""
    library = cuda_library.Library(build.cached("90a", strict=True))
    assert library.has_hopper
    triton = pytest.importorskip("triton")  # which brings a disassembler along
    listing = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-sass", library.path], capture_output=True, text=True, check=True
    ).stdout
    kernels = [each for each in listing.split("Function : ")[1:] if re.search("sm90.*cosine_exp", each.splitlines()[0])]
    assert len(kernels) == 12  # of three types, with and without maxima and filter, rows that stay or come again
    for code in kernels:
        name = code.splitlines()[0]
        tf32 = "tfloat32" in name
        products = r"HGMMA\.64x128x8\.F32\.TF32" if tf32 else r"HGMMA\.64x128x16\.F32"
        products += r"\.BF16" if "bfloat16" in name else r"(?!\.BF16)"
        copies = (r"UTMALDG\.2D", r"UTMALDG\.2D\.MULTICAST", r"UTMASTG\.2D")
        registers = (r"USETMAXREG\.DEALLOC\.CTAPOOL", r"USETMAXREG\.TRY_ALLOC\.CTAPOOL")
        for instruction in (products, *copies, *registers, r"MUFU\.EX2"):
            assert re.search(rf"\b{instruction}(?![\w.])", code), instruction
        assert not re.search(r"\b(LDL|STL)\b", code)
        # Each stage's products are waited for once the next one's are under way, and the last ones alone.
        waits = "".join("A" if each == "ARRIVE" else each[-1] for each in re.findall(rf"WARPGROUP\.({read.WAITS})", code))
        assert re.fullmatch("(A1)+0", waits), waits
        # The warps that load give all but 24 registers away.
        loads = re.search(r"USETMAXREG\.DEALLOC\.CTAPOOL 0x18 ;(.*?)\bEXIT\b", code, re.DOTALL)
        assert loads is not None and max(int(each) for each in re.findall(r"\bR(\d+)\b", loads[1])) < 24
        # A box of E: all have come, stores, made visible to bulk copies, all have come, off it goes.
        order = re.findall(r"\b(?:(STS)|(FENCE\.VIEW)|(BAR\.SYNC)|(UTMASTG))", code)
        letters = "".join("SFBU"[[bool(each) for each in found].index(True)] for found in order)
        assert re.fullmatch(r"[FB]*(BS{8}FBU){16}[FB]*" if tf32 else r"[FB]*(BS{16}FBU){8}[FB]*", letters), letters


def test_a_case_by_either_kernel(hopper: None) -> None:
    """Without chunks: tiles of 128 classes, several streams."""
    case = BY_NAME["s64"]
    check(case, ours(torch.bfloat16, *case.tensors(torch.float32), **case.options), oracle(case, torch.float32))
