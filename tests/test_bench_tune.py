"""Tuning of the Triton kernels' tiles, rehearsed on a CPU."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from amsoftmax_kernels import backends
from amsoftmax_kernels.backends.triton import tiles
from bench.kernels import tune

CPU = torch.device("cpu")


@pytest.mark.parametrize(("capability", "how"), [((8, 0), "half"), ((9, 0), "half"), ((9, 0), "tf32"), ((10, 0), "float32")])
def test_candidates(capability: tuple[int, int], how: str) -> None:
    found = list(tune.candidates(capability, how))
    assert found[0] == tiles.config(capability, how) and len(found) > 4
    for config in found:
        assert all(size & (size - 1) == 0 for size in (config.rows, config.classes, config.depth))
        assert config.bulk == (capability[0] >= 9 and how != "float32")
    gradients = list(tune.gradient_candidates(tiles.GRADIENT[9]))
    assert gradients[:2] == [tiles.GRADIENT[9], None] and len(gradients) == len(set(gradients)) > 4


def test_tuning_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions on a CPU: a candidate is scored, one that fails says so, whole steps are timed by sizes of chunks."""
    from amsoftmax_kernels.backends import triton as backend

    if not backends.serves("triton", CPU, torch.float32):
        pytest.skip("Triton is not interpreted here")
    monkeypatch.setattr(tune, "SHAPES", [(8, 16, 40)])
    sums: list[Tensor] = []
    row = tune._score(backend._INTERPRETED, "float32", CPU, sums)
    assert row["score"] > 0 and "TFLOP/s" in tune._line(row) and sums[0].shape == (8,)
    failed = tune._score(dataclasses.replace(backend._INTERPRETED, rows=24), "float32", CPU, sums)
    assert "failed" in failed and failed["failed"] in tune._line(failed)
    wrong = tune._score(backend._INTERPRETED, "float32", CPU, [sums[0] * 1.01])
    assert "9.9e-03 away" in wrong["failed"]
    monkeypatch.setattr(tune, "gradient_candidates", lambda listed: [listed, None])
    rows = list(tune._gradients(CPU, math.inf, (8,), 16, 40))
    assert [row["config"] is None for row in rows] == [False, True] and all(row["seconds"] > 0 for row in rows)
    monkeypatch.setattr(tune, "CHUNK_SHAPE", (8, 16, 40))
    (row,) = tune._chunks(CPU, math.inf, (1 << 25,), (1 << 22,))
    assert row["kept"] > 0 and row["recomputed"] > 0
