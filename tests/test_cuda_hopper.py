"""Hopper's kernels without a GPU: the cosine kernel, emulated as it stands, its machine code, and the choice of it."""

from __future__ import annotations

import functools
import itertools
import math
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels import __main__ as command
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import Problem, chunking, cuda, proof
from amsoftmax_kernels.backends.cuda import build
from amsoftmax_kernels.backends.cuda import library as cuda_library
from amsoftmax_kernels.backends.kernels import Cosines, Rows
from bench.kernels import library as read

from .cases import BY_NAME, CASES, CHUNK, Case, in_turn, oracle
from .emulation import last_block, seed, serve
from .test_cuda import CPU, CUTLASS, DTYPES, NVCC, check, check_the_cosine_kernel, ours
from .test_cuda_gradient import check_the_gradient_kernel


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


@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["plain", "s64-wrong", "s1000", "no-fn", "filter", "one-dimension"])
def test_tf32_against_the_reference(name: str, save_bytes: int | None, hopper: None, short_chunks: None) -> None:
    case = BY_NAME[name]
    actual = ours(torch.float32, *case.tensors(torch.float32), save_bytes=save_bytes, **case.options)
    check(case, actual, oracle(case, torch.float32))


def test_predictions(hopper: None, short_chunks: None) -> None:
    features, weight, labels, _ = Case("", "", B=40, C=3 * CHUNK + 5, D=16).tensors(torch.float32)
    features, weight = features.half().float(), weight.half().float()
    features[:20] = weight[labels[:20]] + 0.1 * features[:20]
    expected = ak.reference.am_softmax_loss(features, weight, labels, return_predictions=True)[1]
    with torch.autocast("cpu", torch.float16):
        _, predictions = ak.am_softmax_loss(features, weight, labels, backend="cuda", return_predictions=True)
    assert (predictions == expected).float().mean() > 0.9


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
        facts.append([proof._facts(name, _traits(CPU, torch.bfloat16)) for name in ("cuda", "triton")])
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


def _commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: str) -> list[list[str]]:
    """What a build would run."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command)
        Path(command[-1]).touch()

    monkeypatch.setattr(build, "_run", run)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    build.build([arch], tmp_path / "library.so")
    return commands


def _headers(at: Path, version: tuple[int, int, int] = (4, 2, 0)) -> Path:
    (at / "cutlass").mkdir(parents=True)
    names = zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
    (at / "cutlass" / "version.h").write_text("".join(f"#define CUTLASS_{name} {number}\n" for name, number in names))
    return at


def test_cutlass_is_for_hopper_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headers = _headers(tmp_path / "include")
    monkeypatch.setattr(build, "find_cutlass", lambda: headers)
    commands = _commands(monkeypatch, tmp_path, "90a")
    with_it = [each for each in commands if str(headers) in each]
    sources = {Path(part).name for each in with_it for part in each if part.endswith(".cu")}
    assert sources == set(build.HOPPER_SOURCES) and len(with_it) == len(sources)
    assert not any("compute_80" in part for each in with_it for part in each)
    assert all("-DAK_CUTLASS" in each for each in commands[:-1])
    for arch, found in (("80", headers), ("90a", None)):
        monkeypatch.setattr(build, "find_cutlass", lambda found=found: found)
        commands = _commands(monkeypatch, tmp_path, arch)
        parts = [part for each in commands for part in each]
        assert not any("AK_CUTLASS" in part or part.endswith(build.HOPPER_SOURCES) for part in parts)


def test_headers_that_do_not_compile_leave_the_portable_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a CUTLASS that is too old or too new; in strict builds, and of our own mistakes, an error."""
    commands: list[list[str]] = []
    faulty, said = build.HOPPER_SOURCES[0], "x.hpp(1): error: no such thing"

    def run(command: list[str]) -> None:
        commands.append(command)
        if any(part.endswith(faulty) for part in command):
            raise build.BuildError(f"{' '.join(command)}\n{said}\n")
        Path(command[-1]).touch()

    monkeypatch.setattr(build, "_run", run)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    headers = _headers(tmp_path / "include", (3, 1, 0))
    monkeypatch.setattr(build, "find_cutlass", lambda: headers)
    monkeypatch.setattr(build, "cache", lambda: tmp_path / "cache")
    with pytest.raises(build.BuildError, match=faulty):
        build.build(["90a"], tmp_path / "library.so", strict=True)
    commands.clear()
    with pytest.warns(UserWarning, match=r"do not compile with .* CUTLASS 3\.1\.0 .*pip install .*no such thing"):
        assert build.cached("90a").is_file()
    first = commands.index(next(each for each in commands if "-DAK_CUTLASS" not in each))
    assert not any("AK_CUTLASS" in part or part.endswith(build.HOPPER_SOURCES) for each in commands[first:] for part in each)
    said = "cute/config.hpp:42:10: fatal error: cuda/std/utility: No such file or directory"
    (remark,) = build.build(["90a"], tmp_path / "library.so")
    assert f"CCCL's, which nvcc does not find: pip install {build.CCCL}" in remark and build.CUTLASS not in remark
    faulty = "rows.cu"
    with pytest.raises(build.BuildError, match=faulty):
        build.build(["90a"], tmp_path / "library.so")


def test_building_ahead_of_time_says_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "_run", lambda command: Path(command[-1]).touch())
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    for headers, arch, told in ((None, "90a", True), (_headers(tmp_path / "include"), "90a", False), (None, "80", False)):
        monkeypatch.setattr(build, "find_cutlass", lambda headers=headers: headers)
        assert build.main(["--arch", arch, "--out", str(tmp_path / "library.so")]) == 0
        printed = capsys.readouterr().out
        assert f"for sm_{arch}" in printed
        assert (
            f"but without Hopper's own kernels, which take CUTLASS's headers: pip install {build.CUTLASS}" in printed
        ) == told


def test_products_one_after_the_other_fail_a_strict_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of which ptxas only remarks."""

    def run(command: list[str]) -> str:
        Path(command[-1]).touch()
        return "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."

    monkeypatch.setattr(build, "_run", run)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    build.build(["90a"], tmp_path / "library.so")
    with pytest.raises(build.BuildError, match="instructions are serialized"):
        build.build(["90a"], tmp_path / "strict.so", strict=True)
    assert not (tmp_path / "strict.so").exists()


def test_finding_cutlass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    headers = _headers(tmp_path / "named" / "include")
    for named in (headers, headers.parent):
        monkeypatch.setenv("CUTLASS_PATH", str(named))
        assert build.find_cutlass() == headers
    assert build.cutlass_version(headers) == "4.2.0"
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    assert build.find_cutlass() is None
    # The package is found without being imported, which would import a good deal.
    monkeypatch.delenv("CUTLASS_PATH")
    package = tmp_path / "site" / "cutlass_library"
    _headers(package / "source" / "include")
    (package / "__init__.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert build.find_cutlass() == package / "source" / "include"


def test_the_cache_key_depends_on_cutlass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = {build.key("80")}
    for headers in (None, _headers(tmp_path / "a"), _headers(tmp_path / "b", (4, 3, 0))):
        monkeypatch.setattr(build, "find_cutlass", lambda headers=headers: headers)
        keys |= {build.key("80"), build.key("90a")}
    assert len(keys) == 4


@pytest.mark.parametrize("headers", [True, False])
def test_the_command_says_what_to_install(
    headers: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _headers(tmp_path / "include") if headers else None
    monkeypatch.setattr(build, "find_cutlass", lambda: found)
    monkeypatch.setattr(backends, "NAMES", ("cuda",))
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert ("CUTLASS 4.2.0" in printed) == headers and (f"pip install {build.CUTLASS}" in printed) != headers


def _pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    """A GPU of this capability, as far as choosing a backend goes."""
    for module, name in ((cuda, "_library"), (cuda_library, "library")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, functools.cache(getattr(function, "__wrapped__", function)))
    monkeypatch.setattr(cuda, "_failed", {})
    monkeypatch.setattr(cuda, "_has_hopper", functools.cache(getattr(cuda._has_hopper, "__wrapped__", cuda._has_hopper)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    return torch.device("cuda", 0)


def _traits(device: torch.device, dtype: torch.dtype) -> backends.Traits:
    return backends.Traits(device, dtype, dtype, dtype, 16, True, True, False, False)


@pytest.mark.parametrize(("has_hopper", "headers"), [(True, True), (False, False), (False, True)])
def test_hopper_without_its_own_kernel_says_so(has_hopper: bool, headers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = _pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(cuda, "_builds", lambda device: True)
    monkeypatch.setattr(cuda, "_library", lambda device: type("Library", (), {"has_hopper": has_hopper}))
    monkeypatch.setattr(build, "find_cutlass", lambda: Path("include") if headers else None)
    assert cuda.refusal(device, torch.bfloat16) is None
    said = "did not compile" if headers else f"pip install {build.CUTLASS}"
    remark = cuda.remark()
    assert remark is None if has_hopper else remark is not None and said in remark
    monkeypatch.setenv("AMSOFTMAX_KERNELS_WITHOUT", "gradient_sm90")
    assert "AMSOFTMAX_KERNELS_WITHOUT leaves out gradient_sm90" in (cuda.remark() or "")
    _pretend(monkeypatch, (8, 0))
    assert cuda.remark() is None


@pytest.mark.parametrize("has_hopper", [True, False])
@pytest.mark.parametrize("prebuilt", [True, False])
@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (10, 0)])
def test_hoppers_own_kernels_built_ahead_come_first(
    capability: tuple[int, int], prebuilt: bool, has_hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    device = _pretend(monkeypatch, capability)
    looked: list[object] = []
    monkeypatch.setattr(cuda, "_builds", lambda device: (looked.append(device), True)[1])
    monkeypatch.setattr(cuda, "_library", lambda device: type("Library", (), {"has_hopper": has_hopper}))
    monkeypatch.setattr(build, "prebuilt_name", lambda: "library.so" if prebuilt else "")
    monkeypatch.setattr(build, "missing", lambda *_: None)
    triton = backends.load("triton")
    monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
    monkeypatch.setattr(triton, "refusal", lambda device, dtype: None)
    first = "cuda" if prebuilt and has_hopper and capability == (9, 0) else "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, _traits(device, torch.bfloat16)) == first
        assert set(ak.available_backends()[:2]) == {"cuda", "triton"} and (prebuilt or not looked)  # nothing is built for it
        # What it does not serve, as float32 where TF32 is not allowed, goes to the next.
        monkeypatch.setattr(cuda, "refusal", lambda device, dtype: "it does not serve that")
        assert backends.choose(None, _traits(device, torch.float32)) == "triton"
        assert backends.choose(None, _traits(torch.device("meta"), torch.float32)) == "chunked"


def test_an_unsupported_card_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (7, 5))
    assert "needs compute capability 8.0 or newer, but this GPU has 7.5" in (cuda.unavailable_reason() or "")
    assert "cuda" not in ak.available_backends()


@pytest.fixture
def broken_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A GPU, as far as choosing a backend goes, for which nothing can be built."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.h").write_text("")
    (tmp_path / "csrc" / "broken.cu").write_text("this is not C++\n")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    monkeypatch.setattr(build, "cache", lambda: tmp_path / "cache")
    return _pretend(monkeypatch, (8, 0))


def test_a_library_that_cannot_be_loaded_is_told_once_and_triton_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is built in its place."""
    pytest.importorskip("triton")
    device = _pretend(monkeypatch, (9, 0))
    (tmp_path / "library.so").write_text("no library")
    monkeypatch.setenv("AMSOFTMAX_KERNELS_LIBRARY", str(tmp_path / "library.so"))
    monkeypatch.setattr(backends.load("triton"), "unavailable_reason", lambda: None)
    monkeypatch.setattr(backends.load("triton"), "refusal", lambda device, dtype: None)
    monkeypatch.setattr(build, "build", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="the CUDA library cannot be had, other backends serve:\n"):
        assert backends.choose(None, _traits(device, torch.float16)) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, _traits(device, torch.bfloat16)) == "triton"


@NVCC
@pytest.mark.filterwarnings("ignore:amsoftmax_kernels")
def test_a_failed_build_is_the_reason_and_not_tried_again(
    broken_sources: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by name, or looked up: the compiler's words, and where the rest of them is."""
    builds: list[object] = []
    right = build.build
    monkeypatch.setattr(build, "build", lambda *args: (builds.append(None), right(*args))[1])
    assert "cuda" in ak.available_backends()  # nothing has been tried yet
    for device in (broken_sources, torch.device("cuda", 1)):
        with pytest.raises(ValueError, match=r"'cuda' cannot run here: .*broken\.cu.*error.*--arch 80 .* shows all"):
            backends.choose("cuda", _traits(device, torch.float16))
        assert cuda.refusal(device, torch.bfloat16) is not None
    assert len(builds) == 1 and "cuda" not in ak.available_backends()


def test_what_ails_a_device_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full GPU may have room later, a file that is no library stays none."""
    device = _pretend(monkeypatch, (8, 0))
    ailing = [True]

    class Library:
        def check(self, device: torch.device) -> None:
            if ailing[0]:
                raise RuntimeError("out of memory")

    monkeypatch.setattr(cuda_library, "library", functools.cache(lambda arch: Library()))
    with pytest.warns(UserWarning, match="does not serve cuda:0:\nout of memory"):
        assert cuda.refusal(device, torch.float16) is not None
    ailing[0] = False
    assert cuda.refusal(device, torch.float16) is None


@NVCC
@pytest.mark.filterwarnings("ignore:amsoftmax_kernels")
def test_the_command_builds_nothing(
    broken_sources: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what would."""
    monkeypatch.setattr(backends, "NAMES", ("cuda", "reference"))
    monkeypatch.setattr(backends, "choose", lambda *_: "reference")
    monkeypatch.setattr(command, "_describe_gpu", lambda: "none")
    monkeypatch.setattr(command, "_tested", lambda name, device: (f"{name} is tested", False))
    monkeypatch.setattr(build, "build", lambda *_: 1 / 0)
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert "cuda       not built yet: backend='cuda' builds it" in printed and build.COMMAND in printed


def test_a_backend_that_serves_nothing_fails_its_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.load("chunked"), "refusal", lambda device, dtype: f"it does not serve {dtype}")
    assert command.self_test("chunked", CPU) == "it does not serve torch.float32"


def test_a_case_by_either_kernel(hopper: None) -> None:
    """Without chunks: tiles of 128 classes, several streams."""
    case = BY_NAME["s64"]
    check(case, ours(torch.bfloat16, *case.tensors(torch.float32), **case.options), oracle(case, torch.float32))
