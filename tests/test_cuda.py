"""The CUDA sources without a GPU: every thread of every kernel emulated on the CPU, against float64; and their build."""

from __future__ import annotations

import functools
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import Problem, chunking, cuda, fused
from amsoftmax_kernels.backends.cuda import build
from amsoftmax_kernels.backends.cuda import library as cuda_library
from amsoftmax_kernels.backends.kernels import Cosines, Rows

from .cases import BY_NAME, CASES, CHUNK, Case, eager, evaluate, in_turn, oracle, relative
from .reduced_loss import check_a_reduced_loss, check_the_margin_kernel, on_the_device

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16]


def ours(dtype: torch.dtype, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 as where TF32 is allowed: there is nothing else to multiply float32 with."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return evaluate(ak.am_softmax_loss, *tensors, backend="cuda", **options)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=["fp16", "bf16", "tf32"])
@pytest.mark.parametrize(("B", "N", "width"), [(1, 1, 160), (127, 129, 16), (127, 129, 48), (130, 300, 48), (130, 300, 160)])
def test_the_cosine_kernel(B: int, N: int, width: int, dtype: torch.dtype, emulated: None) -> None:
    check_the_cosine_kernel(B, N, width, dtype, 2)


def rounded_to_tf32(values: Tensor) -> Tensor:
    """Ten bits of fraction, to the nearest."""
    return ((values.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def check_the_cosine_kernel(
    B: int, N: int, width: int, dtype: torch.dtype, partial_sums: int | None, device: torch.device = CPU, rtol: float = 1e-5
) -> None:
    """Products, exponentials, sums, masks and maxima from the very operands it was given."""
    generator = torch.Generator().manual_seed(B + width)
    x_hat, w_hat = (torch.randn(n, width, generator=generator).mul_(width**-0.5).to(device, dtype) for n in (B, N))
    if dtype == torch.float32:
        x_hat, w_hat = (rounded_to_tf32(each) for each in (x_hat, w_hat))
    labels = torch.randint(1000, 1000 + 2 * N, (B,), generator=generator)  # half of them in this chunk
    factor, shift = torch.rand(B, generator=generator) * 40 + 1, torch.randn(B, generator=generator)
    labels, factor, shift = (each.to(device) for each in (labels, factor, shift))
    cosine = x_hat.double() @ w_hat.double().T
    target = labels[:, None] == torch.arange(1000, 1000 + N, device=device)
    kernels = cuda._Kernels()
    for with_shift, limit in itertools.product((True, False), (math.inf, 0.1)):
        weight = torch.empty(N, width, dtype=dtype, device=device)
        problem = Problem(x_hat, weight, labels, None, 30.0, True, dtype, limit)
        parts = (partial_sums or kernels.streams(problem, N), B)
        terms = x_hat.new_full((B, chunking.padded(N)), math.nan, dtype=chunking.panel_dtype(dtype))
        z, best = factor.new_full(parts, math.nan, dtype=torch.float64), factor.new_full(parts, math.nan)
        best_class = labels.new_full(parts, -7)
        rows = Rows(x_hat, factor, factor, factor, shift if with_shift else None)
        kernels.cosine_exp(problem, 1000, rows, w_hat, Cosines(terms, z, best, best_class))
        exponent = cosine * factor.double()[:, None] - (shift.double()[:, None] if with_shift else 0)
        expected = exponent.exp2().masked_fill(target | (cosine > limit), 0)
        assert not terms[:, N:].any()
        assert relative(terms[:, :N].double(), expected) < (rtol if dtype == torch.float32 else 2**-8)
        assert torch.allclose(z.sum(0), expected.sum(1), rtol=rtol, atol=1e-12)
        negatives = cosine.masked_fill(target, -math.inf)
        values, where = best.max(0)
        assert torch.allclose(values.double(), negatives.max(1).values, atol=1e-6)
        chosen = best_class.gather(0, where[None])[0]
        found = chosen >= 0
        assert torch.equal(found, values > -math.inf)
        at = negatives[found].gather(1, (chosen[found] - 1000)[:, None])[:, 0]
        assert torch.allclose(at, values[found].double(), atol=1e-6)
        # Nothing but the sums, and nothing but the maxima under the filter.
        alone = torch.full_like(z, math.nan)
        kernels.cosine_exp(problem, 1000, rows, w_hat, Cosines(z=alone))
        assert torch.equal(alone, z)
        maxima, rows = Cosines(best=best, best_class=best_class), rows._replace(shift=None)
        kernels.cosine_exp(problem, 1000, rows._replace(factor=factor * 100), w_hat, maxima)
        allowed = negatives.masked_fill(cosine > limit, -math.inf).max(1).values
        assert torch.allclose(best.max(0).values.double(), allowed, atol=1e-6)
        kernels.cosine_exp(problem, 1000, rows, w_hat, maxima)
        assert best.max() == -math.inf or (factor > 92.33).any()


def check(case: Case, actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """As near the exact result as half-precision operands allow: an error of 2^-11 in a cosine is one of s · 2^-11."""
    scale = case.options.get("scale", 30.0)
    smallest = min(each.norm(dim=1).min().item() for each in case.tensors(torch.float32)[:2])
    floor = scale / smallest * 1e-3 if case.degenerate else 1e-12
    for name, got, expected in zip(("loss", "features", "weight"), actual, exact, strict=True):
        error, size = (got.double() - expected).norm().item(), expected.norm().item()
        assert error <= 1e-2 * max(1.0, scale / 64) * size + floor, (name, error, size)


@pytest.mark.parametrize(("case", "save_bytes"), in_turn(CASES, None, 0) + in_turn(CASES[1:], None, CHUNK * 24 * 2))
def test_against_the_reference(case: Case, save_bytes: int | None, emulated: None, short_chunks: None) -> None:
    actual = ours(torch.float16, *case.tensors(torch.float32), save_bytes=save_bytes, **case.options)
    check(case, actual, oracle(case, torch.float32))


@pytest.mark.parametrize(
    ("reduction", "save_bytes"), [("mean", None), ("sum", 0), ("mean", CHUNK * 24 * 2)], ids=["kept", "recomputed", "mixed"]
)
@pytest.mark.parametrize("name", ["plain", "s64-wrong", "s1000", "no-fn", "filter", "one-class"])
def test_a_reduced_loss(
    name: str, reduction: str, save_bytes: int | None, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose upstream gradient is one number, and joins the finished gradients."""
    if save_bytes:
        monkeypatch.setattr(chunking, "chunk_size", lambda batch, dim: CHUNK)
    case = BY_NAME[name]
    options = {**case.options, "reduction": reduction}
    actual = ours(torch.float16, *case.tensors(torch.float32), save_bytes=save_bytes, **options)
    check(case, actual, oracle(case, torch.float32, **options))


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "function"])
@pytest.mark.parametrize("needed", ["features", "weight", "scale", "all"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
def test_what_a_reduced_loss_must_be_differentiated_by(
    save_bytes: int | None, normalize: bool, needed: str, constant: bool, emulated: None
) -> None:
    check_a_reduced_loss("cuda", needed, normalize, save_bytes, 5e-3, CPU, constant)


@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["plain", "s64-wrong", "s1000", "no-fn", "filter", "one-dimension"])
def test_tf32_against_the_reference(name: str, save_bytes: int | None, emulated: None, short_chunks: None) -> None:
    case = BY_NAME[name]
    actual = ours(torch.float32, *case.tensors(torch.float32), save_bytes=save_bytes, **case.options)
    check(case, actual, oracle(case, torch.float32))


def test_operands_are_rounded_to_tf32(emulated: None) -> None:
    """To the nearest; dropping bits would make each of them, and every cosine, too small. Not what is no number."""
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    weight[3, 4] = math.inf
    w_hat, inverse_norm = torch.empty(5, 32), torch.empty(5)
    cuda._Kernels().prepare_centres(weight, w_hat, inverse_norm)
    rows = [0, 1, 2, 4]
    expected = weight[rows] * inverse_norm[rows, None]
    assert torch.equal(w_hat[rows], rounded_to_tf32(expected)) and not torch.equal(w_hat[rows], expected)
    assert w_hat[3].isnan().all()


def test_float32_is_served_where_pytorch_allows_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_builds", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    before = torch.get_float32_matmul_precision()
    try:
        for precision, served in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(precision)
            assert (cuda.refusal(torch.device("cuda", 0), torch.float32) is None) == served
            assert cuda.refusal(torch.device("cuda", 0), torch.bfloat16) is None
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
def test_a_scale_on_the_device(save_bytes: int | None, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose value the host does not know: taken for one that needs a shift, until the kernels have read it."""
    monkeypatch.setattr(fused, "scale_of", on_the_device)
    for needed in ("weight", "all"):
        check_a_reduced_loss("cuda", needed, True, save_bytes, 5e-3, CPU)


def test_a_wrong_result_would_be_seen(emulated: None) -> None:
    case = BY_NAME["plain"]
    exact = oracle(case, torch.float32)
    loss, dx, dw = ours(torch.float16, *case.tensors(torch.float32))
    wrong = [
        (loss, torch.zeros_like(dx), dw),
        (loss, dx, torch.zeros_like(dw)),
        (loss, dx * 1.02, dw),
        (loss, dx, dw * 1.02),
    ]
    wrong.append(ours(torch.float16, *case.tensors(torch.float32), margin=0.3))
    for result in wrong:
        with pytest.raises(AssertionError):
            check(case, result, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("own", [None, 0.9])
@pytest.mark.parametrize("scale", [30.0, 64.0])
def test_half_precision_errs_less_than_eager(dtype: torch.dtype, scale: float, own: float | None, emulated: None) -> None:
    case = Case("", "", B=64, C=300, D=64, own=own, options={"scale": scale})
    tensors, exact = case.tensors(torch.float32), oracle(case, torch.float32)
    mine = ours(dtype, *tensors, scale=scale)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = evaluate(eager, *tensors, scale=scale)
    for expected, got, other in zip(exact, mine, theirs, strict=True):
        assert relative(got, expected) <= relative(other, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_half_inputs_in_any_strides(dtype: torch.dtype, emulated: None) -> None:
    case = BY_NAME["plain"]
    features, weight, labels, upstream = case.tensors(dtype)
    strided = features.repeat_interleave(2, 1)[:, ::2], weight.T.contiguous().T
    actual = ours(dtype, *strided, labels, upstream)
    assert [each.dtype for each in actual] == [torch.float32, dtype, dtype]
    assert max(map(relative, actual, oracle(case, dtype))) < 1e-2


def test_odd_rows(emulated: None, short_chunks: None) -> None:
    features, weight, labels, upstream = Case("", "", B=40).tensors(torch.float32)
    features[3], weight[5], labels[2:30:3] = 0, 0, 7
    labels[6] = -100
    exact = evaluate(ak.reference.am_softmax_loss, features.double(), weight.double(), labels, upstream)
    features[6] = math.nan
    actual = ours(torch.float16, features, weight, labels.int(), upstream)
    assert not actual[1][6].any() and not actual[1][3].any() and not actual[2][5].any()
    assert max(map(relative, actual, exact)) < 5e-3
    features[8] = math.nan
    loss = ours(torch.float16, features, weight, labels, upstream)[0]
    assert loss[8].isnan() and loss.isnan().sum() == 1


def test_many_rows_of_a_class_are_rounded_once(emulated: None) -> None:
    """In bfloat16 centres: added one after the other they would stop counting."""
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(512, 16, generator=generator), torch.randn(4, 16, generator=generator).bfloat16()
    labels, upstream = torch.arange(512) % 2, torch.rand(512, generator=generator) + 0.5
    dw = ours(torch.bfloat16, features, weight, labels, upstream)[2]
    exact = evaluate(ak.reference.am_softmax_loss, features.double(), weight.double(), labels, upstream)[2]
    assert relative(dw, exact) < 4e-3


@pytest.mark.parametrize("options", [{}, {"scale": 500.0}, {"normalize_features": False}, {"interclass_filter": 0.3}])
def test_predictions(options: dict[str, Any], emulated: None, short_chunks: None) -> None:
    features, weight, labels, _ = Case("", "", B=40, C=3 * CHUNK + 5, D=16).tensors(torch.float32)
    features, weight = features.half().float(), weight.half().float()
    features[:20] = weight[labels[:20]] + 0.1 * features[:20]
    labels[4] = -100
    expected = ak.reference.am_softmax_loss(features, weight, labels, return_predictions=True, **options)[1]
    with torch.autocast("cpu", torch.float16):
        _, predictions = ak.am_softmax_loss(features, weight, labels, backend="cuda", return_predictions=True, **options)
    assert (predictions == expected).float().mean() > 0.9 and predictions[4] == -1


@pytest.mark.parametrize("normalize", [True, False])
def test_the_margin_kernel(normalize: bool, emulated: None) -> None:
    check_the_margin_kernel(cuda.fused.kernels, normalize, CPU)


def test_errors_come_back_as_exceptions(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = torch.empty(4, 17, dtype=torch.float16)[:, :16]
    problem = Problem(odd, odd, torch.zeros(4).long(), None, 30.0, True, torch.float16, math.inf)
    with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
        rows = Rows(odd, *[torch.ones(4)] * 3, None)
        cuda._Kernels().cosine_exp(problem, 0, rows, odd, Cosines())
    with pytest.raises(KeyError):
        cuda_library.matrix(torch.empty(4, 16, dtype=torch.float64))
    with (
        monkeypatch.context() as changed,
        pytest.raises(RuntimeError, match="operands must be float16, bfloat16 or, rounded"),
    ):
        for types in (cuda_library._TYPES, cuda_library._OPERANDS):
            changed.setitem(types, torch.int16, 4)
        x = torch.empty(4, 16, dtype=torch.int16)
        z = torch.empty(1, 4, dtype=torch.float64)
        cuda._Kernels().cosine_exp(problem, 0, Rows(x, *[torch.ones(4)] * 3, None), x, Cosines(z=z))
    x = torch.empty(4, 16)
    problem = Problem(x, x, torch.zeros(4).long(), None, 30.0, True, torch.float32, math.inf)
    with pytest.raises(RuntimeError, match="E must be bfloat16, or float32 beside TF32"):
        cuda._Kernels().cosine_exp(problem, 0, Rows(x, *[torch.ones(4)] * 3, None), x, Cosines(x.bfloat16()))


NVCC = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc on this machine")
CUTLASS = pytest.mark.skipif(build.find_cutlass() is None, reason=f"no CUTLASS headers: pip install {build.CUTLASS}")


@NVCC
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_it_builds_without_a_spill_and_exports_the_contract(arch: str) -> None:
    """With warnings and spills as errors; from the cache where nothing has changed."""
    library = cuda_library.Library(build.cached(arch, strict=True))
    symbols = subprocess.run(["nm", "-D", "--defined-only", library.path], capture_output=True, text=True).stdout
    exported = {line.split()[-1] for line in symbols.splitlines()}
    assert exported == {*cuda_library.LAUNCHERS, *cuda_library.CONSTANTS, "ak_check"}
    triton = pytest.importorskip("triton")  # which brings a disassembler along
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", library.path]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in (
        r"HMMA\.16816\.F32\.BF16",
        r"HMMA\.1688\.F32\.TF32",
        r"LDSM",
        r"LDGSTS\.E\.BYPASS\.128",
        r"LDG\.E\.128",
        r"STG\.E\.128",
    ):
        assert re.search(rf"\b{instruction}\b", code), instruction
    assert not re.search(r"\b(LDL|STL)\b", code)


def test_the_cache_key_depends_on_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(build.sources(), tmp_path / "csrc")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    first = build.key("80")
    assert build.key("80") == first != build.key("90a")
    (tmp_path / "csrc" / "arithmetic.h").write_text("// changed\n")
    assert build.key("80") != first


@pytest.mark.parametrize("name", ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "machine", "commands"])
def test_the_cache_key_depends_on_how_it_is_compiled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.key("80")
    if name == "machine":
        monkeypatch.setattr(platform, "machine", lambda: "another")
    elif name == "commands":
        text, found = Path(build.__file__).read_text().replace('"-O3"', '"-O2"'), build.sources()
        monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
        monkeypatch.setattr(build, "sources", lambda: found)
        (tmp_path / "build.py").write_text(text)
    else:
        monkeypatch.setenv(name, "-O0")
    assert build.key("80") != first


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
def test_a_cached_file_that_does_not_load_is_built_again_once(
    emulated_library: cuda_library.Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short, or for another machine. What is built in its place may not load either, which is an error."""
    monkeypatch.setattr(build, "cache", lambda: tmp_path)
    contents = [b"not a library either", emulated_library.path.read_bytes()]
    monkeypatch.setattr(build, "build", lambda archs, out, strict: (out.write_bytes(contents.pop(0)), [])[1])
    path = tmp_path / f"{build.key('80')}.so"
    path.write_bytes(b"not a library")
    load = cuda_library.library.__wrapped__
    with pytest.raises(OSError, match="file too short"):
        load("80")
    assert load("80").path == path and not contents
    assert load("80").path == path  # as it is
    assert build.cached("80", broken=build.written(path) - 1) == path  # another process has built it again


NVCC_11 = "sm_75\nsm_80\nsm_86\nsm_87\nsm_89\nsm_90\n"


def test_an_older_nvcc_compiles_for_what_it_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rather than for nothing: an older architecture whose code the GPU runs too, else PTX, which is always there."""
    targets: list[list[str]] = []
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "_nvcc_version", lambda: "release 11.8, V11.8.89")
    monkeypatch.setattr(build, "_listed", lambda nvcc: NVCC_11)
    monkeypatch.setattr(build, "_build", lambda nvcc, architectures, *rest: targets.append(list(architectures)))
    assert build.build(["80", "89"], tmp_path / "library.so") == []
    (remark,) = build.build(["120"], tmp_path / "library.so")
    assert "does not know sm_120: PTX for compute_80 in its place" in remark
    build.build(["90a"], tmp_path / "library.so")
    monkeypatch.setattr(build, "_listed", lambda nvcc: NVCC_11.replace("sm_89\n", ""))
    remarks = build.build(["89", "86"], tmp_path / "library.so")
    assert len(remarks) == 1 and "does not know sm_89: code for sm_86 in its place" in remarks[0]
    build.build(["120"], tmp_path / "library.so", strict=True)  # there it is an error
    assert targets == [["80", "89"], [], [], ["86"], ["120"]]
    monkeypatch.setattr(build, "_nvcc_version", lambda: "release 12.0, V12.0.76")
    assert build._known("90a", NVCC_11) == "90a" and build._known("121", "sm_120") == "120"
    assert build._known("120", "") == "120"  # one that does not tell is taken to know


@NVCC
def test_nvcc_says_what_it_knows() -> None:
    nvcc = build.find_nvcc()
    assert nvcc is not None and build._known("90a", build._listed(nvcc)) == "90a"
    assert build._known("80", build._listed(nvcc)) == "80" and build._known("999", build._listed(nvcc)) is None


def test_architectures() -> None:
    for capability, expected in (
        ((8, 0), "80"),
        ((8, 6), "86"),
        ((8, 7), "87"),
        ((8, 8), "86"),
        ((10, 1), "100"),
        ((13, 0), "80"),
        ((8, 9), "89"),
        ((9, 0), "90a"),
        ((12, 1), "121"),
    ):
        assert build.architecture(capability) == expected


def test_without_nvcc_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert "install the CUDA toolkit" in (build.missing() or "")
    with pytest.raises(build.BuildError, match="nvcc"):
        build.build(["80"], tmp_path / "library.so")


def test_a_library_built_ahead_of_time_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setenv("AMSOFTMAX_KERNELS_LIBRARY", str(tmp_path / "library.so"))
    assert "which is not there" in (build.missing() or "")
    (tmp_path / "library.so").write_bytes(b"")
    assert build.missing() is None and build.prebuilt() == tmp_path / "library.so"
    monkeypatch.chdir(tmp_path)  # a bare name is here, not where the loader looks for libraries
    monkeypatch.setenv("AMSOFTMAX_KERNELS_LIBRARY", "library.so")
    assert build.missing() is None and build.prebuilt() == tmp_path / "library.so"


def test_a_library_in_the_cache_serves_without_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The newest of these sources, whichever nvcc built it; not one of others."""
    monkeypatch.setattr(build, "cache", lambda: tmp_path)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    kept = []
    for age, version in ((20, "release 12.8"), (10, "release 13.0")):
        monkeypatch.setattr(build, "_nvcc_version", lambda version=version: version)
        kept.append(build.path_of("80"))
        kept[-1].touch()
        os.utime(kept[-1], (time.time() - age,) * 2)
    (tmp_path / "sm_80-of-other-sources.so").touch()
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(build, "_nvcc_version", lambda: "")
    assert kept[0] != kept[1] and build.path_of("80") == build.cached("80") == kept[1]
    assert build.missing("80") is None
    for arch in ("90a", ""):
        assert "install the CUDA toolkit" in (build.missing(arch) or "")
    with pytest.raises(build.BuildError, match="install the CUDA toolkit"):
        build.cached("80", broken=build.written(kept[1]))


def test_a_cache_that_cannot_be_written_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(build, "cache", lambda: tmp_path / "file" / "amsoftmax_kernels")
    with pytest.raises(build.BuildError, match=r"file/amsoftmax_kernels \(.*XDG_CACHE_HOME .*AMSOFTMAX_KERNELS_LIBRARY"):
        build.cached("80")


@pytest.mark.filterwarnings("ignore:amsoftmax_kernels")
def test_a_driver_that_is_too_old_is_found_before_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And once: the reason stays."""
    asked: list[object] = []
    monkeypatch.setattr(build, "cache", lambda: tmp_path)
    monkeypatch.setattr(build, "find_nvcc", lambda: "/somewhere/nvcc")
    monkeypatch.setattr(build, "_nvcc_version", lambda: "Cuda compilation tools, release 13.0, V13.0.48")
    monkeypatch.setattr(build, "build", lambda *_: 1 / 0)
    monkeypatch.setattr(build, "driver_version", lambda: (asked.append(None), (12, 4))[1])
    monkeypatch.setattr(cuda, "_failed", {})
    monkeypatch.setattr(cuda, "_library", cuda._library.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    said = r"/somewhere/nvcc is of CUDA 13\.0, and this machine's driver runs CUDA 12\.4: .*a toolkit of CUDA 12 .*CUDA_HOME"
    for _ in range(2):
        assert re.search(said, cuda.refusal(torch.device("cuda", 0), torch.float16) or "")
    assert len(asked) == 1
    for version in ((13, 0), (14, 1), None):
        monkeypatch.setattr(build, "driver_version", lambda version=version: version)
        assert build.too_new() is None


@pytest.mark.parametrize("device", [1, 99])
def test_nothing_is_launched_on_another_device(device: int, hopper_library: cuda_library.Library) -> None:
    """Where the caller's cannot be made the current one; the emulation has number 0 alone."""
    for name, structure in cuda_library.LAUNCHERS.items():
        with pytest.raises(RuntimeError, match=f"{name}: invalid device ordinal"):
            hopper_library.call(name, structure(), torch.device("cpu", device))
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        hopper_library.check(torch.device("cuda", device))


VERSION = f'extern "C" int ak_version() {{ return {cuda_library.VERSION}; }}'


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('extern "C" int ak_version() { return 1; } extern "C" int ak_has_hopper() { return 0; }', "has version 1 .*again"),
        ("", "not a lib"),
        (VERSION, "other.so has no ak_contract.*build it again"),
        (VERSION + 'extern "C" int ak_contract() { return 7; }', "has other structures in its interface.*build it again"),
        (f'{VERSION} extern "C" int ak_contract() {{ return {build.contract()}; }}', "has no ak_prepare_rows"),
    ],
    ids=["outdated", "another", "before a function", "other structures", "without a launcher"],
)
def test_another_library_is_refused_in_words(source: str, message: str, tmp_path: Path) -> None:
    """Also one from before a function was there: then other backends serve."""
    (tmp_path / "other.cpp").write_text(source)
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "other.cpp", "-o", tmp_path / "other.so"], check=True)
    with pytest.raises(build.BuildError, match=message):
        cuda_library.Library(tmp_path / "other.so")


def test_the_contract_changes_with_the_structures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, first = (build.sources() / "library.h").read_text(), build.contract()
    monkeypatch.setattr(build, "sources", lambda: tmp_path)
    for changed, same in (
        (text + "\n// a remark\n", True),
        (text.replace("int64_t batch, width", "int64_t width, batch"), False),
    ):
        assert changed != text
        (tmp_path / "library.h").write_text(changed)
        assert (build.contract() == first) == same


def test_nvcc_is_looked_for_until_a_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a step asks, and takes a while."""
    looked: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(build, "missing", lambda *_: looked.append(None))
    loaded = functools.lru_cache(lambda arch: object())
    monkeypatch.setattr(cuda_library, "library", loaded)
    assert cuda.unavailable_reason() is None and len(looked) == 1
    loaded("90a")
    assert cuda.unavailable_reason() is None and len(looked) == 1


@NVCC
def test_a_failed_build_shows_the_compilers_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.h").write_text("")
    (tmp_path / "csrc" / "broken.cu").write_text("this is not C++\n")
    monkeypatch.setattr(build, "sources", lambda: tmp_path / "csrc")
    assert build.main(["--arch", "80", "--out", str(tmp_path / "library.so")]) == 1
    assert "broken.cu" in capsys.readouterr().out
    assert {each.name for each in tmp_path.iterdir()} == {"csrc"}


@NVCC
def test_eight_processes_share_one_build(tmp_path: Path) -> None:
    """As eight ranks that start at once do."""
    import sys

    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.h").write_text("")
    (tmp_path / "csrc" / "one.cu").write_text('extern "C" int one() { return 1; }\n')
    script = (
        "from pathlib import Path; from amsoftmax_kernels.backends.cuda import build; "
        f"build.sources = lambda: Path({str(tmp_path / 'csrc')!r}); first = build.build; "
        "build.build = lambda *args: (print('built'), first(*args))[1]; print(build.cached('80'))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(8)]
    outputs = [each.communicate(timeout=120)[0] for each in running]
    assert all(each.returncode == 0 for each in running)
    assert sum("built" in each for each in outputs) == 1 and len({each.splitlines()[-1] for each in outputs}) == 1


@NVCC
@pytest.mark.gpu
@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.degenerate], ids=lambda case: case.name)
def test_on_a_gpu(case: Case, save_bytes: int | None) -> None:
    """The same library where it belongs: built for this GPU, nothing emulated."""
    tensors = [each.cuda() for each in case.tensors(torch.float32)]
    with torch.autocast("cuda", torch.float16):
        actual = evaluate(ak.am_softmax_loss, *tensors, backend="cuda", save_bytes=save_bytes, **case.options)
    check(case, tuple(each.cpu() for each in actual), oracle(case, torch.float32))


@NVCC
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=["fp16", "bf16", "tf32"])
@pytest.mark.parametrize(
    ("B", "N", "width"),
    [
        (1, 1, 16),
        (127, 129, 160),
        (128, 2000, 512),
        (129, 2000, 528),
        (300, 5000, 512),
        (1000, 30000, 512),
        (257, 9000, 1024),
    ],
)
def test_the_cosine_kernel_on_a_gpu(B: int, N: int, width: int, dtype: torch.dtype) -> None:
    """Whichever is this GPU's: at the tiles' edges, rows that stay in shared memory and rows too wide, one block and two."""
    for _ in range(3):  # a race would not show every time
        check_the_cosine_kernel(B, N, width, dtype, None, torch.device("cuda", 0), rtol=1e-4)
