"""The GPU run's first stage: everything is compiled before it is launched, and what does not compile is left out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from amsoftmax_kernels import backends
from bench.gpu import checks as gpu_checks
from bench.gpu import compilation as gpu_compile
from bench.gpu import graphs as gpu_graphs
from bench.gpu import smoke as gpu_smoke
from bench.gpu import times as gpu_times

from .test_bench_gpu import CPU, nothing_left_out  # noqa: F401


def test_the_first_stage_compiles_what_later_ones_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper, by the package's own host code with kernels that take notes."""
    pytest.importorskip("triton")
    from amsoftmax_kernels.backends import fused
    from amsoftmax_kernels.backends import triton as backend
    from bench.kernels.launches import no_product, recording

    def launched(cases: Iterable[tuple[int, int, int, str, str, dict[str, Any]]]) -> set[Any]:
        with recording((9, 0), 132) as launches:
            for B, D, C, dtype, centres, options in cases:
                features, labels = torch.empty(B, D), torch.zeros(B, dtype=torch.int64)
                weight = torch.empty(min(C, 300_000), D, dtype=gpu_checks.DTYPES[centres])
                how = gpu_checks.given(options, len(weight), CPU)
                for save_bytes in (1 << 40, 0):
                    with torch.autocast("cpu", gpu_checks.DTYPES[dtype], enabled=dtype != "float32"):
                        gpu_checks.take_step(features, weight, labels, "triton", save_bytes, how)
        return set(launches)

    monkeypatch.setattr(fused, "_product", no_product)
    monkeypatch.setattr(backend, "refusal", lambda *_: None)
    monkeypatch.setattr(backend, "unavailable_reason", lambda: None)
    monkeypatch.setenv("AMSOFTMAX_KERNELS_PROOF", "0")
    rows, classes = gpu_compile.ROWS, gpu_compile.CLASSES
    first = launched(
        (rows, each.D, classes, each.dtype, each.centres, dict(each.options))
        for each in gpu_compile.steps(torch.device("cuda"))
    )
    later = [
        (*shape, dtype, centres, {})
        for shape in (*gpu_smoke.SHAPES, *gpu_smoke.FEW, *gpu_times.SHAPES)
        for dtype in gpu_checks.DTYPES
        for centres in ("float32", "bfloat16" if dtype == "bfloat16" else "float32")
    ]
    later += [(*shape, dtype, "float32", options) for *shape, options in gpu_checks.SMALL for dtype in gpu_checks.DTYPES]
    in_half = (*gpu_checks.LARGE, *gpu_graphs.CAPTURED)
    later += [(*shape, "bfloat16", "float32", options) for *shape, options in in_half]
    assert len(first) > 150 and launched(later) <= first


def test_what_does_not_compile_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A child tells of each step, and whether a kernel that can be done without is to blame."""
    right = gpu_compile.take_step

    def fails(*arguments: Any) -> Any:
        if arguments[5].get("scale") == 200.0:
            raise RuntimeError("nvcc -c a.cu\nnote\na.cu(3): error: no such thing\nmore")
        return right(*arguments)

    monkeypatch.setattr(gpu_compile, "take_step", fails)
    assert gpu_compile.main(["cpu", "chunked", "0", "1"]) == 1
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["ok"] for row in told] == [True, False] and told[1]["error"] == "a.cu(3): error: no such thing"
    monkeypatch.setattr(gpu_compile, "run_child", lambda *_, **__: {"ok": False, "output": "\n".join(map(json.dumps, told))})
    row = gpu_compile._ask(CPU, "chunked", 0, 1, 60)
    assert gpu_compile.leave_out([row]) == ["chunked float32 D=16 scale=200.0"] and "chunked" in backends.NAMES
    assert gpu_checks.smoke_command(CPU, "chunked", None)[-2:] == ["--not", "chunked float32 D=16 scale=200.0"]
    checked = gpu_checks.correctness(CPU, True, [(5, 16, 30, {"scale": 200.0})])
    assert "no such thing" in next(row for row in checked if row["backend"] == "chunked" and row["ok"] is None)["skipped"]

    monkeypatch.setattr(gpu_compile, "take_step", lambda *_: (_ for _ in ()).throw(RuntimeError("error: spilled")))
    kernel = gpu_compile._told(CPU, "cuda", gpu_compile.steps(CPU)[0])
    assert kernel == {"step": "cuda float32 D=16", "ok": False, "error": "error: spilled"}

    def without_it(*arguments: Any) -> Any:
        if os.environ.get("AMSOFTMAX_KERNELS_WITHOUT") != "cosine_sm90":
            raise RuntimeError("error: spilled")

    monkeypatch.setattr(gpu_compile, "take_step", without_it)
    kernel = gpu_compile._told(CPU, "cuda", gpu_compile.steps(CPU)[0])
    assert kernel["without"] == "cosine_sm90"
    row = {"backend": "cuda", "ok": False, "failed": [kernel], "compiled": []}
    monkeypatch.setenv("AMSOFTMAX_KERNELS_WITHOUT", "")
    assert gpu_compile.leave_out([row]) == ["cuda's cosine_sm90"] and gpu_checks.left_out == {"cuda": "cosine_sm90"}
    assert os.environ["AMSOFTMAX_KERNELS_WITHOUT"] == "cosine_sm90"


def test_a_backend_of_which_nothing_compiles_is_left_out() -> None:
    """But not for want of time, nor torch.compile's part, which is no backend."""
    step = {"step": "triton float32 D=16", "ok": False, "error": "no C compiler"}
    broken = {"backend": "triton", "ok": False, "failed": [step], "compiled": []}
    late = {"backend": "cuda", "ok": None, "skipped": "did not end", "compiled": []}
    other = {"backend": gpu_compile.COMPILED, "ok": False, "compiled": [], "failed": [step | {"step": "triton a way"}]}
    crashed = {"backend": "chunked", "ok": False, "error": "killed", "compiled": ["chunked float32 D=16"]}
    assert gpu_compile.leave_out([broken, late, other, crashed]) == ["triton", "triton a way"]
    assert backends.NAMES == ("cuda", "chunked", "reference") and list(gpu_checks.not_compiled) == ["triton a way"]
    assert gpu_compile.leave_out({"ok": False, "error": "it broke"}) == []  # type: ignore[arg-type]


def test_every_later_step_is_compiled_before() -> None:
    names = {each.name("triton") for each in gpu_compile.steps(torch.device("cuda"))}
    wanted = [(D, "bfloat16", options) for _, D, _, options in [*gpu_checks.SMALL, *gpu_checks.LARGE, *gpu_graphs.CAPTURED]]
    wanted += [(D, dtype, {}) for _, D, _ in (*gpu_smoke.SHAPES, *gpu_smoke.FEW) for dtype in gpu_checks.DTYPES]
    wanted += [(512, "bfloat16", {"centres": "bfloat16"})]
    assert {gpu_checks.step_name("triton", *each) for each in wanted} <= names
