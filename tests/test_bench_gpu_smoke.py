"""The GPU run's first launches: each backend in a process of its own, and what it is left out without."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch

from amsoftmax_kernels import backends
from bench.gpu import checks as gpu_checks
from bench.gpu import smoke as gpu_smoke
from bench.gpu import terms as gpu_terms

from .test_bench_gpu import CPU, nothing_left_out  # noqa: F401


def test_a_backend_is_not_broken_for_want_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "run_child", lambda *_: {"ok": None, "skipped": "did not end", "output": ""})
    assert gpu_smoke._ask(CPU, "triton", None, 60)["ok"] is False
    monkeypatch.setattr(gpu_checks.clock, "ends", 0.0)
    row = gpu_smoke._ask(CPU, "triton", None, 60)
    assert row["ok"] is None and gpu_smoke.leave_out([row]) == []


def test_a_backend_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked in a process of its own, that may hang or crash; then without the kernel that it can do without."""
    monkeypatch.setattr(backends, "NAMES", ("chunked", "reference"))
    (row,) = gpu_smoke.smoke(CPU, seconds=0.01)
    assert not row["ok"] and row["error"].startswith("did not end in 0.01 s")
    asked: list[Any] = []

    def ask(device: torch.device, name: str, kernel: str | None, seconds: float) -> dict[str, Any]:
        asked.append(kernel)
        return {"backend": name, "without": kernel, "ok": kernel == works}

    monkeypatch.setattr(gpu_smoke, "_ask", ask)
    monkeypatch.setattr(gpu_smoke, "absent", lambda device: [])
    monkeypatch.setattr(gpu_smoke, "compared_backends", lambda device: ["triton"])
    for works, expected in ((None, [None]), ("grad_centres", [None, "grad_centres"]), ("nothing", [None, "grad_centres"])):
        asked.clear()
        rows = list(gpu_smoke.smoke(CPU))
        assert asked == expected and [row["ok"] for row in rows] == [False] * (len(expected) - 1) + [works != "nothing"]
    monkeypatch.setattr(backends, "NAMES", ("triton", "cuda", "chunked", "reference"))
    fine, ill = {"backend": "chunked", "without": None, "ok": True}, {"backend": "triton", "without": None, "ok": False}
    assert gpu_smoke.leave_out([fine]) == []
    assert gpu_smoke.leave_out([fine, ill, ill | {"without": "grad_centres", "ok": True}]) == ["triton's grad_centres"]
    assert gpu_checks.left_out == {"triton": "grad_centres"} and "triton" in backends.NAMES
    assert gpu_smoke.leave_out([fine, ill, ill | {"without": "grad_centres"}]) == ["triton"]
    assert backends.NAMES == ("cuda", "chunked", "reference")


def test_the_portable_kernel_is_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Hopper's own serves, by the environment of a process of its own; and where only that does, it stays so."""
    asked: list[Any] = []

    def ask(device: torch.device, name: str, kernel: str | None, seconds: float) -> dict[str, Any]:
        asked.append(kernel)
        return {"backend": name, "without": kernel, "ok": kernel in works}

    works: tuple[str | None, ...] = ()

    monkeypatch.setattr(gpu_smoke, "_ask", ask)
    monkeypatch.setattr(gpu_smoke, "absent", lambda device: [])
    monkeypatch.setattr(gpu_smoke, "compared_backends", lambda device: ["cuda"])
    monkeypatch.setattr(gpu_smoke, "has_hopper", lambda device: True)
    monkeypatch.setattr(backends, "NAMES", ("cuda", "chunked"))
    monkeypatch.setenv("AMSOFTMAX_KERNELS_WITHOUT", "")
    both = gpu_smoke.PORTABLE
    for served, expected, left in (
        ((None, both), [None, both], []),
        ((None,), [None, both], []),
        (("cosine_sm90", both), [None, "gradient_sm90", "cosine_sm90", both], ["cuda's cosine_sm90"]),
        ((both,), [None, "gradient_sm90", "cosine_sm90", both], [f"cuda's {both}"]),
    ):
        asked.clear()
        gpu_checks.left_out.clear()
        works = served
        rows = list(gpu_smoke.smoke(CPU))
        assert asked == expected and gpu_smoke.leave_out(rows) == left
    assert os.environ["AMSOFTMAX_KERNELS_WITHOUT"] == both and gpu_checks.left_out == {"cuda": both}
    commands: list[Any] = []
    monkeypatch.setattr(gpu_terms, "compared_backends", lambda device: ["cuda", "chunked"])
    monkeypatch.setattr(gpu_checks, "left_out", {})
    monkeypatch.setattr(
        gpu_terms, "run_child", lambda *given: (commands.append(given), {"ok": True, "output": '{"ok": true}\n'})[1]
    )
    rows = list(gpu_terms.terms(CPU))
    assert [(row["without"], row["C"]) for row in rows] == [(w, C) for w in (None, both) for _, _, C in gpu_terms.SHAPES]
    assert [given[2]["AMSOFTMAX_KERNELS_WITHOUT"] for given in commands] == [""] * 3 + [both] * 3
    assert max(B * C for B, _, C in gpu_terms.SHAPES) > 2**31 and gpu_terms.REPEATS == 50


def test_terms_of_a_kernel_by_itself(
    fused_backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right, and the same bits each time; a wrong sum and a bit that changes are seen."""
    assert gpu_terms.main(["cpu", fused_backend, "5", "16", "40", "3"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["ok"] and row["same_bits"] and row["repeats"] == 3 and 0 < row["E_error"] < 1e-4
    kernels: Any = type(backends.load(fused_backend).fused.kernels)  # type: ignore[attr-defined]
    right, calls = kernels.cosine_exp, 0

    def changed(self: Any, *given: Any) -> None:
        nonlocal calls
        calls += 1
        right(self, *given)
        out = given[-1]
        if what == "sum":
            out.z[0] *= 1.01
        elif calls > 1:
            out.terms[1, 7] *= 1 + 1e-6

    monkeypatch.setattr(kernels, "cosine_exp", changed)
    for what, name in (("sum", "z_error"), ("bit", "same_bits")):
        calls = 0
        assert gpu_terms.main(["cpu", fused_backend, "5", "16", "40", "3"]) == 1
        row = json.loads(capsys.readouterr().out)
        assert not row["ok"] and (row[name] > 1e-3 if what == "sum" else not row[name])


def test_a_users_first_step_is_tried() -> None:
    row = gpu_smoke.default(CPU)
    assert row["ok"] and "Error" not in row["output"]
