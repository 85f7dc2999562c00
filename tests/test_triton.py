"""The Triton backend against the reference in float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels import backends
from amsoftmax_kernels.backends import Problem, Request, chunking, fused
from amsoftmax_kernels.backends.triton import tiles as triton_configs

from .cases import BY_NAME, CASES, CHUNK, Case, check, eager, evaluate, in_turn, oracle, relative, traits
from .reduced_loss import check_a_reduced_loss, check_the_margin_kernel, on_the_device
from .triton_kernels import DEVICE, MARKS, backend

pytestmark = MARKS
PLAIN = BY_NAME["plain"]


def ours(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    on_device = [each.to(DEVICE) for each in tensors]
    results = evaluate(ak.am_softmax_loss, *on_device, backend="triton", **options)
    return tuple(each.cpu() for each in results)  # type: ignore[return-value]


@pytest.mark.parametrize(("case", "save_bytes"), in_turn(CASES, None, 0) + in_turn(CASES[1:], None, CHUNK * 24 * 4))
def test_against_the_reference(case: Case, save_bytes: int | None, short_chunks: None) -> None:
    actual = ours(*case.tensors(torch.float32), save_bytes=save_bytes, **case.options)
    check(case, torch.float32, actual, oracle(case, torch.float32))


REDUCED = [("mean", None, False), ("sum", 0, False), ("mean", CHUNK * 24 * 4, True)]


@pytest.mark.parametrize(("reduction", "save_bytes", "short"), REDUCED, ids=["kept", "recomputed", "mixed"])
@pytest.mark.parametrize("name", ["plain", "one-class", "one-row", "wide", "s64-near", "s1000", "no-fn", "filter"])
def test_a_reduced_loss(
    name: str, reduction: str, save_bytes: int | None, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose upstream gradient is one number, and joins the finished gradients."""
    case = BY_NAME[name]
    if short:
        monkeypatch.setattr(chunking, "chunk_size", lambda batch, dim: CHUNK)
    options = {**case.options, "reduction": reduction}
    actual = ours(*case.tensors(torch.float32), save_bytes=save_bytes, **options)
    check(case, torch.float32, actual, oracle(case, torch.float32, **options))


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "function"])
@pytest.mark.parametrize("needed", ["features", "weight", "scale", "all"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
def test_what_a_reduced_loss_must_be_differentiated_by(
    save_bytes: int | None, normalize: bool, needed: str, constant: bool
) -> None:
    check_a_reduced_loss("triton", needed, normalize, save_bytes, 5e-6, DEVICE, constant)


@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
def test_a_scale_on_the_device(save_bytes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose value the host does not know: taken for one that needs a shift, until the kernels have read it."""
    monkeypatch.setattr(fused, "scale_of", on_the_device)
    for needed in ("weight", "all"):
        check_a_reduced_loss("triton", needed, True, save_bytes, 5e-6, DEVICE)


def test_a_wrong_result_would_be_seen() -> None:
    loss, dx, dw = ours(*PLAIN.tensors(torch.float32))
    exact = oracle(PLAIN, torch.float32)
    wrong = [(loss, torch.zeros_like(dx), dw), (loss, dx, torch.zeros_like(dw)), (torch.zeros_like(loss), dx, dw)]
    wrong.append(ours(*PLAIN.tensors(torch.float32), margin=0.05))
    for result in wrong:
        with pytest.raises(AssertionError):
            check(PLAIN, torch.float32, result, exact)


@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "loads"])
@pytest.mark.parametrize("D", [1, 15, 16, 17, 40])
@pytest.mark.parametrize(("B", "C"), [(1, 2), (15, 31), (16, 32), (17, 33), (33, 65)])
def test_around_the_tiles_edges(B: int, C: int, D: int, bulk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(backend._INTERPRETED, bulk=bulk)
    monkeypatch.setattr(backend, "_config", lambda *_: config)
    case = Case("", "", B=B, C=C, D=D)
    check(case, torch.float32, ours(*case.tensors(torch.float32)), oracle(case, torch.float32))


@pytest.mark.parametrize("entry", list(triton_configs.TABLE), ids=str)
def test_the_tables_tiles(entry: tuple[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration, one element past its tiles; the compute capability it is meant for does not matter here."""
    (major, how), config = entry, triton_configs.TABLE[entry]
    if DEVICE.type == "cuda" and major != torch.cuda.get_device_capability()[0]:
        pytest.skip("another architecture's")
    monkeypatch.setattr(backend, "_config", lambda *_: config)
    case = Case("", "", B=config.rows + 1, C=config.classes + 1, D=config.depth + 1)
    tensors, exact = case.tensors(torch.float32), oracle(case, torch.float32)
    if DEVICE.type == "cpu" or how == "float32":
        check(case, torch.float32, ours(*tensors), exact)
        return
    monkeypatch.setattr(backend, "kind", lambda _: how)
    with torch.autocast("cuda", torch.bfloat16, enabled=how == "half"):
        assert max(map(relative, ours(*tensors), exact)) < 8e-3


DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("own", [None, 0.7, 0.9])
@pytest.mark.parametrize("scale", [30.0, 64.0, 200.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_half_precision_errs_at_most_twice_eager(
    dtype: torch.dtype, scale: float, own: float | None, save_bytes: int | None, short_chunks: None, large_tiles: None
) -> None:
    """Eager rounds the cosines too, where E in bfloat16 has 2^-9 of its own: what float16 rounds away is less."""
    case = Case("", "", B=64, C=500, D=64, own=own, options={"scale": scale})
    features, weight, labels, upstream = case.tensors(torch.float32)
    exact = oracle(case, torch.float32)
    with torch.autocast(DEVICE.type, dtype):
        mine = ours(features, weight, labels, upstream, scale=scale, save_bytes=save_bytes)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        theirs = evaluate(eager, *(each.to(DEVICE) for each in (features, weight, labels, upstream)), scale=scale)
    assert [each.dtype for each in mine] == [torch.float32] * 3
    for expected, got, other in zip(exact, mine, theirs, strict=True):
        assert relative(got, expected) <= relative(other.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_half_inputs(dtype: torch.dtype) -> None:
    loss, dx, dw = ours(*PLAIN.tensors(dtype))
    exact = oracle(PLAIN, dtype)
    assert (loss.dtype, dx.dtype, dw.dtype) == (torch.float32, dtype, dtype)
    assert relative(loss, exact[0]) < 2e-3 and max(map(relative, (dx, dw), exact[1:])) < 5e-3


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 1000.0}, {"normalize_features": False}, {"interclass_filter": 0.3}, {"save_bytes": 0}],
    ids=["plain", "s1000", "no-fn", "filter", "recomputed"],
)
def test_predictions(options: dict[str, Any], short_chunks: None) -> None:
    case = Case("", "", B=40, C=3 * CHUNK + 5, D=8)
    features, weight, labels, _ = case.tensors(torch.float32)
    features[:20] = weight[labels[:20]] + 0.1 * features[:20]
    features[7] = math.nan
    labels[4] = -100
    formula = {key: value for key, value in options.items() if key != "save_bytes"}
    expected = ak.reference.am_softmax_loss(features, weight, labels, return_predictions=True, **formula)[1]
    assert 15 <= (expected == labels).sum() < 35 and expected[4] == expected[7] == -1
    tensors = [each.to(DEVICE) for each in (features, weight, labels)]
    loss, predictions = ak.am_softmax_loss(*tensors, backend="triton", return_predictions=True, reduction="none", **options)
    assert torch.equal(predictions.cpu(), expected)
    plain = ak.am_softmax_loss(*tensors, backend="triton", reduction="none", **options)
    assert loss[7].isnan() and torch.equal(loss.nan_to_num(), plain.nan_to_num())


def test_a_filter_and_a_shift_do_not_lose_the_negatives() -> None:
    """At s = 1000 the shift must not come from a negative that the filter leaves out: the rest would underflow."""
    case = Case("", "", wrong=0.95, options={"scale": 1000.0, "interclass_filter": 0.9})
    check(case, torch.float32, ours(*case.tensors(torch.float32), **case.options), oracle(case, torch.float32))


def test_odd_rows(short_chunks: None) -> None:
    """Zero rows, ignored rows full of NaN, a NaN row, strided views, one label many times, int32 labels."""
    case = Case("", "", B=40)
    features, weight, labels, upstream = case.tensors(torch.float32)
    features[3], weight[5], labels[2:30:3] = 0, 0, 7
    labels[6] = -100
    exact = evaluate(ak.reference.am_softmax_loss, features.double(), weight.double(), labels, upstream, ignore_index=-100)
    features[6] = math.nan
    strided = features.repeat_interleave(2, 1)[:, ::2], weight.T.contiguous().T
    actual = ours(*strided, labels.int(), upstream)
    assert all(map(torch.equal, ours(*strided, labels.repeat_interleave(2)[::2], upstream), actual))
    assert not actual[1][6].any() and not actual[1][3].any() and not actual[2][5].any()
    assert max(map(relative, actual, exact)) < 5e-6
    features[8] = math.nan
    loss = ours(features, weight, labels, upstream)[0]
    assert loss[8].isnan() and loss.isnan().sum() == 1


def test_an_ignored_row_has_no_gradient_even_beside_a_broken_centre() -> None:
    features, weight, labels, upstream = PLAIN.tensors(torch.float32)
    weight[9, 3], labels[6] = math.inf, -100
    labels[labels == 9] = 8
    loss, dx, _ = ours(features, weight, labels, upstream)
    assert loss[6] == 0 and not dx[6].any() and loss[7].isnan()


def test_tf32_operands_are_rounded_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut, each would be up to 2^-10 too small, and every cosine with it; rounded, the errors are of both signs."""
    monkeypatch.setattr(backend, "kind", lambda _: "tf32")
    weight = Case("", "", C=300, D=48).tensors(torch.float32)[1].to(DEVICE)
    w_hat, inverse_norm = torch.empty(300, 48, device=DEVICE), torch.empty(300, device=DEVICE)
    backend._Kernels().prepare_centres(weight, w_hat, inverse_norm)
    w_hat = w_hat.cpu()
    exact = torch.nn.functional.normalize(weight.cpu().double())
    assert not (w_hat.view(torch.int32) & 0x1FFF).any()
    error = (w_hat - exact) / exact
    assert error.abs().max() < 2**-11 * 1.001 and error.mean().abs() < 2**-11 / 20


def test_the_setting_of_float32_products_is_followed() -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("an older PyTorch")
    before = matmul.fp32_precision
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "float32")):
            matmul.fp32_precision = setting
            assert triton_configs.kind(torch.float32) == expected and triton_configs.kind(torch.float16) == "half"
    finally:
        matmul.fp32_precision = before
    assert triton_configs.kind(torch.float32) == "float32"


def test_few_multiprocessors_idle() -> None:
    for batch in (1, 256, 1024, 4096, 4480, 8576, 12800, 100_000):
        blocks, tiles = -(-batch // 128), 512
        streams = fused.streams_for(132, blocks, tiles)
        rounds = -(-blocks * streams // 132) * -(-tiles // streams)
        assert 1 <= streams <= tiles and blocks * tiles / (132 * rounds) > (0.9 if batch > 1 else 0.8)
    assert fused.streams_for(132, 2, 42) == 42


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_an_empty_batch(reduction: str) -> None:
    _, weight, _, _ = PLAIN.tensors(torch.float32)
    w = weight.to(DEVICE).requires_grad_()
    x = torch.empty(0, PLAIN.D, device=DEVICE, requires_grad=True)
    loss = ak.am_softmax_loss(x, w, torch.empty(0, dtype=torch.int64, device=DEVICE), backend="triton", reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    loss.sum().backward()
    assert loss.sum() == 0 and w.grad is not None and not w.grad.any() and x.grad is not None


@pytest.mark.parametrize("margin", [0.35, torch.linspace(0.1, 0.5, PLAIN.C)], ids=["constant", "per-class"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [30.0, 100.0, None])
def test_every_gradient(scale: float | None, reduction: str, margin: float | Tensor, short_chunks: None) -> None:
    """Also of a learned scale, or of features without normalization; with a margin that autograd differentiates."""
    features, weight, labels, upstream = PLAIN.tensors(torch.float32)
    labels[3] = -100

    def gradients(device: torch.device, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        inputs = [each.to(device, dtype).requires_grad_() for each in (features, weight)]
        s = torch.tensor(scale or 1.0, dtype=dtype, device=device, requires_grad=scale is not None)
        m = margin.to(device, dtype) if isinstance(margin, Tensor) else margin
        loss = ak.am_softmax_loss(
            *inputs,
            labels.to(device),
            scale=s,
            margin=m,
            reduction=reduction,
            normalize_features=scale is not None,
            **options,
        )
        wanted = [*inputs, s] if scale else inputs
        return [each.cpu() for each in torch.autograd.grad((loss * upstream.to(loss)).sum(), wanted)]

    expected = gradients(torch.device("cpu"), torch.float64, backend="reference")
    for actual, exact in zip(gradients(DEVICE, torch.float32, backend="triton"), expected, strict=True):
        assert relative(actual, exact) < 1e-5


def test_a_scale_that_only_the_device_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a learned scale on a GPU is given: a pointer, whose value decides in the kernel whether a shift is needed."""
    for scale in (30.0, 300.0):
        tensor = torch.tensor(scale, device=DEVICE)
        monkeypatch.setattr(fused, "scale_of", lambda problem, tensor=tensor: tensor)
        case = Case("", "", wrong=0.9, options={"scale": scale})
        check(case, torch.float32, ours(*case.tensors(torch.float32), scale=scale), oracle(case, torch.float32))


@pytest.mark.parametrize("frozen", ["features", "weight"])
@pytest.mark.parametrize("save_bytes", [None, 0])
def test_frozen_inputs(frozen: str, save_bytes: int | None, short_chunks: None) -> None:
    tensors = [each.to(DEVICE) for each in PLAIN.tensors(torch.float32)]
    moved = tensors[frozen == "features"].requires_grad_()
    loss = ak.am_softmax_loss(*tensors[:3], backend="triton", reduction="none", save_bytes=save_bytes)
    (grad,) = torch.autograd.grad(loss, moved, tensors[3])
    assert relative(grad.cpu(), oracle(PLAIN, torch.float32)[1 + (frozen == "features")]) < 5e-6


def test_no_grad_keeps_nothing() -> None:
    features, weight, labels, _ = (each.to(DEVICE) for each in PLAIN.tensors(torch.float32))
    problem = Problem(features, weight, labels, None, 30.0, True, torch.float32, math.inf)
    out = backend.forward(problem, Request(0, False, False))
    assert out.kept.numel() == out.rows.numel() == out.best.numel() == 0


def test_kept_bytes_stay_within_the_budget() -> None:
    for batch, classes, budget in itertools.product((1, 7, 1024), (10, 100_003, 10_000_000), (0, 10**5, 10**9, 10**12)):
        count = chunking.kept_count(batch, classes, 512, torch.bfloat16, budget)
        assert count in range(classes + 1) and batch * chunking.padded(count) * 2 <= budget
        assert count == classes or batch * chunking.padded(classes) * 2 > budget


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_margin_kernel(normalize: bool, mean: bool) -> None:
    check_the_margin_kernel(backend.fused.kernels, normalize, mean, DEVICE)


def test_same_inputs_same_bits(short_chunks: None) -> None:
    tensors = Case("", "", B=40, C=150, D=20).tensors(torch.float32)
    tensors[2][::3] = 7
    first = ours(*tensors, save_bytes=0)
    assert all(map(torch.equal, first, ours(*tensors, save_bytes=0)))


def test_the_choice() -> None:
    assert "triton" in ak.available_backends()
    assert backends.choose(None, traits(DEVICE, torch.float32)) == ("triton" if DEVICE.type == "cuda" else "chunked")
    with pytest.raises(ValueError, match=r"does not serve torch\.float64"):
        backends.choose("triton", traits(DEVICE, torch.float64))


def test_a_newer_architecture_takes_the_newest_entry() -> None:
    for capability, expected in (((8, 0), 8), ((8, 9), 8), ((9, 0), 9), ((10, 0), 10), ((11, 0), 10), ((12, 0), 12)):
        assert triton_configs.config(capability, "half") == triton_configs.TABLE[expected, "half"]


def test_kernels_have_no_atomics() -> None:
    modules = list(Path(backend.__file__).parent.glob("*_kernels.py"))
    assert modules
    for module in modules:
        text = module.read_text(encoding="utf-8")
        assert "atomic_" not in text and "tl.store(" in text
