"""The Triton kernels compiled without a GPU: no spills, tensor cores and asynchronous copies where they belong."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from amsoftmax_kernels import backends, functional
from amsoftmax_kernels.arguments import LossOptions
from amsoftmax_kernels.backends import chunking, fused
from amsoftmax_kernels.backends.cuda import build
from bench.kernels import command as kernels
from bench.kernels import estimate, launches, library
from bench.kernels.launches import Launch, no_product, of_a_step, recording, variants

INSTRUCTIONS = {
    "sm_80": ("HMMA", "cp.async"),
    "sm_90": ("HGMMA", "bulk"),
    "sm_100": ("UTCMMA", "bulk"),
    "sm_120": ("HMMA", "cp.async"),
}
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("how", ["--quick", pytest.param(None, marks=pytest.mark.slow, id="every variant")])
@pytest.mark.parametrize(  # sm_120 takes sm_80's instructions
    "arch", [pytest.param(name, marks=[pytest.mark.slow] if name == "sm_120" else []) for name in estimate.CARDS]
)
def test_every_kernel_compiles_as_planned(arch: str, how: str | None, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "kernels", "--arch", arch, "--out", str(tmp_path), *([how] if how else [])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads((tmp_path / arch / "kernels.json").read_text())
    found = {row["kernel"] for row in report["kernels"]}
    assert found >= {"cosine_exp", "prepare_centres", "finish_centres", "finish_rows"}
    assert ("grad_centres" in found) == (arch == "sm_90")
    for row in report["kernels"]:
        assert (tmp_path / arch / row["cubin"]).stat().st_size > 1000
        assert row["instructions"]["local"] <= 16 and row["registers"] <= 255
        if row["kernel"] == "grad_centres":
            assert row["instructions"]["HGMMA"] == 2 and row["instructions"]["bulk"] > 2  # copies ahead of the loop too
        if row["kernel"] == "cosine_exp" and "fp32" not in row["variant"].split()[0]:
            counts = row["instructions"]
            tensor, copies = INSTRUCTIONS[arch]
            assert counts[tensor] > 0 and counts[copies] > 0
    assert "Estimated, not measured" in result.stdout


def test_what_is_not_as_planned_is_found() -> None:
    card = estimate.CARDS["sm_90"]
    signature = (("x_hat", "tensordesc<bf16[128, 64]>"),)
    launch = Launch("cosine_exp", signature, (("BULK", True), ("PRECISION", "ieee")), (), 8, 3)
    counts = {"local": 0, "HGMMA": 4, "in flight": 1, "HMMA": 0, "UTCMMA": 0, "bulk": 6, "cp.async": 0, "exp2": 128}
    good: dict[str, Any] = {"instructions": counts, "fits": 1}
    assert kernels.faults(launch, good, card) == []
    for name, value, fault in (
        ("local", 17, "local"),
        ("HGMMA", 0, "HGMMA"),
        ("in flight", 0, "waited"),
        ("bulk", 0, "bulk"),
    ):
        assert fault in kernels.faults(launch, {"instructions": counts | {name: value}, "fits": 1}, card)[0]
    assert "planned" in kernels.faults(launch, good | {"fits": 0}, card)[0]
    gradient = Launch("grad_centres", (), (), (), 8, 4)
    assert kernels.faults(gradient, good, card) == []
    for name, fault in (("HGMMA", "HGMMA"), ("in flight", "waited"), ("bulk", "bulk")):
        assert fault in kernels.faults(gradient, {"instructions": counts | {name: 0}, "fits": 1}, card)[0]
    loads = dataclasses.replace(launch, constants=(("BULK", False), ("PRECISION", "ieee")))
    assert "asynchronous" in kernels.faults(loads, good, card)[0]


def test_few_launches() -> None:
    """At 10 thousand classes they are what a step costs."""
    kept = [each.kernel for each in of_a_step((9, 0), 132, 256, 512, 2048)]
    forward = ["prepare_rows", "prepare_centres", "cosine_exp", "additive_margin"]
    assert kept == [*forward, "factor_rows", "grad_centres", "finish_rows"]
    assert [each.kernel for each in of_a_step((8, 0), 108, 256, 512, 2048)][5] == "finish_centres"


def test_sizes_that_change_compile_nothing_new() -> None:
    """The last batch of an epoch and the last chunk of classes take the kernels that are there."""
    compiled = set(of_a_step((9, 0), 132, 512, 512, 4096, predict=True, normalize=False, save_bytes=0))
    for B, C in ((100, 4096), (17, 4096), (512, 4099), (3, 1001)):
        assert set(of_a_step((9, 0), 132, B, 512, C, predict=True, normalize=False, save_bytes=0)) <= compiled


# What a caller can choose, each first value the usual one.
CHOICES: dict[str, list[Any]] = {
    "features": [torch.float32, None],  # None: the compute dtype
    "weight": [torch.float32, None],
    "scale": [30.0, 100.0, "tensor", "learned"],
    "margin": [0.35, "one a class"],
    "normalize_features": [True, False],
    "reduction": ["mean", "sum", "none"],
    "interclass_filter": [None, 0.5],
    "return_predictions": [False, True, "with_margin"],
    "subcentres": [1, 2],
    "label_smoothing": [0.0, 0.1],
    "save_bytes": [1 << 40, 0],
    "gradients": ["features and weight", "features", "weight", ""],
    "updated": [None, *launches._UPDATES],
    "chunks": [1, 2],
}


def launches_of_a_call(dtype: torch.dtype, choice: dict[str, Any]) -> set[Launch]:
    """Those of the public function and its backward pass, which CPU tensors take for a GPU's."""
    choice = dict(choice)
    updated = choice.pop("updated")
    gradients, classes = choice.pop("gradients"), 64 if choice.pop("chunks") == 1 else 300
    features = torch.zeros(16, 512, dtype=choice.pop("features") or dtype, requires_grad="features" in gradients)
    weight = torch.zeros(classes, 512, dtype=choice.pop("weight") or dtype, requires_grad="weight" in gradients)
    scale, margin = choice.pop("scale"), choice.pop("margin")
    if choice["subcentres"] > 1 or choice["interclass_filter"] is not None:
        choice["label_smoothing"] = 0.0  # which does not go with them
    if isinstance(scale, str):
        scale = torch.tensor(30.0, requires_grad=scale == "learned")
    if isinstance(margin, str):
        margin = torch.full((classes // choice["subcentres"],), 0.35)
    with (
        recording((9, 0), 132) as made,
        mock.patch.object(backends, "choose", lambda *_: "triton"),
        mock.patch.object(chunking, "CHUNK_ELEMENTS", 1),  # 256 classes a chunk
        mock.patch.object(fused, "_product", no_product),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        head = SimpleNamespace(
            check=lambda weight: None,
            check_turn=lambda asked: None,
            updating=lambda weight: contextlib.nullcontext(updated.of(weight)),
        )
        labels, given = torch.zeros(16, dtype=torch.int64), LossOptions(scale, margin, **choice)
        result = functional.loss_of(features, weight, labels, given, None if updated is None else head)
        loss = result[0] if isinstance(result, tuple) else result
        if loss.requires_grad:
            loss.backward(torch.ones(17)[1:].expand(16) if loss.dim() else torch.ones(2)[1])
    return set(made)


def test_every_kernel_that_can_be_launched_is_compiled() -> None:
    compiled = set(variants((9, 0), 132))
    usual = {name: values[0] for name, values in CHOICES.items()}
    calls = [usual | {name: value} for name, values in CHOICES.items() for value in values]
    generator = random.Random(0)
    found = set()
    precision = torch.get_float32_matmul_precision()
    try:
        for how, dtype in itertools.product(("highest", "high"), (torch.bfloat16, torch.float16, torch.float32)):
            if how == "high" and dtype != torch.float32:
                continue
            torch.set_float32_matmul_precision(how)
            some = [{name: generator.choice(values) for name, values in CHOICES.items()} for _ in range(100)]
            found.update(*(launches_of_a_call(dtype, call) for call in calls + some))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert len(found) > 200 and {each.kernel for each in found} == {each.kernel for each in compiled}
    assert found <= compiled, sorted({each.kernel for each in found - compiled})


def test_a_quick_run_has_every_kernel_flag_and_dtype() -> None:
    """It leaves out combinations of them, and tiles of other dimensions than the usual one."""

    def values(launches: list[Launch]) -> set[tuple[str, str, Any]]:
        known = {(each.kernel, *pair) for each in launches for pair in each.signature if "tensordesc" not in pair[1]}
        return known | {(each.kernel, *pair) for each in launches for pair in each.constants if isinstance(pair[1], bool)}

    quick, every = variants((9, 0), 132, quick=True), variants((9, 0), 132)
    assert set(quick) < set(every)
    # Without a gradient that is usually there, or in float16 (E computed again: in float32) what is the same in bfloat16.
    left_out = {
        ("finish_rows", "grad_features", "constexpr"),
        ("finish_rows", "grad_weight", "constexpr"),
        ("factor_rows", "x_hat", "*fp16"),
        ("factor_rows", "x_hat", "*fp32"),
        ("cosine_exp", "terms", "*fp16"),
        *(("update_centres", name, "*fp16") for name in ("centres", "weight", "first_state", "second_state")),
    }
    assert values(every) - values(quick) <= left_out, values(every) - values(quick)


def test_programs_resident() -> None:
    card = estimate.CARDS["sm_90"]
    assert card.programs_resident(128, 0, 8) == 2 and card.programs_resident(255, 0, 8) == 1
    assert card.programs_resident(32, 120 << 10, 4) == 1 and card.programs_resident(32, 0, 4) == 16


@pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("arch", [pytest.param("80", marks=pytest.mark.slow), "90a"])
def test_the_cpp_kernels_are_read(arch: str) -> None:
    found = library.rows(arch)
    hopper = [row for row in found if "Hopper" in row["kernel"]]
    assert len(hopper) == (18 if arch == "90a" and build.find_cutlass() else 0) and len(found) == 6 + len(hopper)
    assert len({(row["kernel"], row["variant"]) for row in found}) == len(found)
    assert not any(row["faults"] for row in found) and all(64 < row["registers"] <= 255 for row in found)
    assert len(library.printed(found).splitlines()) == len(found) + 1
    for row in found:  # two share an SM where its shared memory has room and no maxima are sought
        both = "portable" in row["kernel"] and "maxima" not in row["variant"]
        assert row["fits"] >= (2 if both else 1) and 64 << 10 < row["shared_memory"] <= 227 << 10
    for kernel in library.KERNELS:
        assert library._faults(kernel, 0, found[0]["instructions"] | {"HGMMA": 0, "HMMA": 0}) != []
    for row in hopper:
        assert library._faults(row["kernel"], 0, row["instructions"] | {"in flight": 0}) == [
            "each group of HGMMAs is waited for"
        ]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kept", [True, False])
def test_launches_of_many_chunks(kept: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the estimates count are those that a step has."""
    products: list[object] = []
    product = fused._product
    monkeypatch.setattr(fused, "_product", lambda *args: (products.append(None), product(*args))[1])
    monkeypatch.setattr(chunking, "chunk_size", lambda batch, dim: 512)
    for module in (chunking, estimate):
        monkeypatch.setattr(module, "finish_size", lambda width: 256)
    capability = (9, 0) if at_once else (8, 0)
    for classes in (200, 512, 513, 1400, 2048):
        products.clear()
        own = len(of_a_step(capability, 132, 16, 32, classes, save_bytes=1 << 40 if kept else 0))
        assert own == estimate.own_launches(16, 32, classes, kept, at_once)
        chunks = len(chunking.spans(16, 32, classes))
        sums = estimate.launches(16, 32, classes, kept, at_once) - own - len(products) - estimate.TORCH_LAUNCHES
        assert sums == chunks - 1
