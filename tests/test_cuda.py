"""The C++ kernels for any GPU, without one: every thread emulated on the CPU, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import Problem, chunking, cuda, fused
from amsoftmax_kernels.backends.cuda import library as cuda_library
from amsoftmax_kernels.backends.kernels import Cosines, Rows

from .cases import BY_NAME, CASES, CHUNK, Case, eager, evaluate, in_turn, oracle, relative
from .cuda_kernels import CPU, DTYPES, NVCC, check, check_the_cosine_kernel, ours, rounded_to_tf32
from .reduced_loss import check_a_reduced_loss, check_the_margin_kernel, on_the_device


@pytest.fixture(params=["emulated", "hopper"])
def either_kernel(request: pytest.FixtureRequest) -> None:
    """The portable cosine kernel, and Hopper's own."""
    request.getfixturevalue(request.param)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=["fp16", "bf16", "tf32"])
@pytest.mark.parametrize(("B", "N", "width"), [(1, 1, 160), (127, 129, 16), (127, 129, 48), (130, 300, 48), (130, 300, 160)])
def test_the_cosine_kernel(B: int, N: int, width: int, dtype: torch.dtype, emulated: None) -> None:
    check_the_cosine_kernel(B, N, width, dtype, 2)


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
def test_tf32_against_the_reference(name: str, save_bytes: int | None, either_kernel: None, short_chunks: None) -> None:
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
def test_predictions(options: dict[str, Any], either_kernel: None, short_chunks: None) -> None:
    features, weight, labels, _ = Case("", "", B=40, C=3 * CHUNK + 5, D=16).tensors(torch.float32)
    features, weight = features.half().float(), weight.half().float()
    features[:20] = weight[labels[:20]] + 0.1 * features[:20]
    labels[4] = -100
    expected = ak.reference.am_softmax_loss(features, weight, labels, return_predictions=True, **options)[1]
    with torch.autocast("cpu", torch.float16):
        _, predictions = ak.am_softmax_loss(features, weight, labels, backend="cuda", return_predictions=True, **options)
    assert (predictions == expected).float().mean() > 0.9 and predictions[4] == -1


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_margin_kernel(normalize: bool, mean: bool, emulated: None) -> None:
    check_the_margin_kernel(cuda.fused.kernels, normalize, mean, CPU)


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


@pytest.mark.parametrize("device", [1, 99])
def test_nothing_is_launched_on_another_device(device: int, hopper_library: cuda_library.Library) -> None:
    """Where the caller's cannot be made the current one; the emulation has number 0 alone."""
    for name, structure in cuda_library.LAUNCHERS.items():
        with pytest.raises(RuntimeError, match=f"{name}: invalid device ordinal"):
            hopper_library.call(name, structure(), torch.device("cpu", device))
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        hopper_library.check(torch.device("cuda", device))


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
