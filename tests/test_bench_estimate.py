"""The estimates of a step's time: against counts by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from amsoftmax_kernels.backends import chunking
from bench.kernels import estimate

H200 = estimate.CARDS["sm_90"]
SHAPE = (1024, 512, 1_000_000)
DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu.md"


@pytest.mark.parametrize("arch", list(estimate.CARDS))
def test_estimates_grow_with_the_work_and_never_beat_the_floor(arch: str) -> None:
    rows = [row for row in estimate.table(arch) if row["dtype"] == "bfloat16" and row["kernels"] == "Triton"]
    assert [(row["B"], row["D"], row["C"]) for row in rows[::2]] == estimate.SHAPES
    for kept, recomputed in zip(rows[::2], rows[1::2], strict=True):
        assert 0 < kept["of_floor"] < 1 and 0 < recomputed["of_floor"] < 1
        assert kept["total_s"] < recomputed["total_s"]
    totals = [row["total_s"] for row in rows[::2]]
    assert totals == sorted(totals)


def test_each_kernel_by_hand() -> None:
    found = {each.kernel: each for each in estimate.work(H200, *SHAPE, kept=True)}
    flops, library = 2 * 1024 * 512 * 1e6, 584e12
    assert sum(each.flops for each in found.values()) == 3 * flops
    assert found["prepare_centres"].seconds == pytest.approx(6 * 512e6 / 4.3e12)
    assert found["cosine_exp"].seconds == pytest.approx(1.35 * flops / (0.92 * library), rel=0.04)
    assert found["product E·ŵ"].seconds == pytest.approx(flops / 661e12)
    assert found["centres' gradient"].seconds == pytest.approx(flops / (0.92 * library) + 8 * 512e6 / 4.3e12, rel=0.04)
    again = {each.kernel: each for each in estimate.work(H200, *SHAPE, kept=False)}
    for name, times in (("prepare_centres", 2), ("cosine_exp", 2), ("product E·ŵ", 1), ("centres' gradient", 1)):
        assert again[name].seconds == pytest.approx(times * found[name].seconds)
    cpp = estimate.step(H200, *SHAPE, kept=True, kernels="C++")
    assert cpp["pieces_s"]["cosine_exp"] == pytest.approx(flops / library, rel=0.04)
    # Without a kernel for it the gradient is a product and a pass; the other dtypes have that.
    apart = {each.kernel: each for each in estimate.work(H200, *SHAPE, kept=True, kind="float16")}
    assert apart["product E·ŵ"].seconds - found["product E·ŵ"].seconds == pytest.approx(4 * 512e6 / 4.3e12)
    a100 = {each.kernel: each for each in estimate.work(estimate.CARDS["sm_80"], *SHAPE, kept=True)}
    assert a100["centres' gradient"].seconds == pytest.approx(flops / (250e12 * 584 / 790) + 12 * 512e6 / 1.7e12)


def test_the_cpp_kernels_shared_memory_by_hand() -> None:
    """x̂ 32, ŵ 64, its copies 32, E 16 bytes a clock of 128 at D = 512; of fewer columns E is more of it."""
    assert estimate.shared_memory_bytes(512, 2) == 144 == estimate.shared_memory_bytes(512, 4) - 32
    assert estimate.shared_memory_bytes(128, 2) == 128 + 64 and estimate.shared_memory_bytes(1024, 2) == 160 + 8
    bfloat16, tf32 = estimate.KINDS["bfloat16"], estimate.KINDS["TF32"]
    full = 4096 * 132 * 1.755e9
    assert estimate.shared_memory_bound(H200, 512, bfloat16) == pytest.approx(full * 128 / 144)
    assert estimate.shared_memory_bound(H200, 256, tf32) == pytest.approx(full / 2 * 128 / 160)
    assert estimate.shared_memory_bound(estimate.CARDS["sm_100"], 512, bfloat16) == float("inf")
    for D, bound in ((512, 584e12), (64, full * 128 / 256)):  # which is less
        found = {each.kernel: each for each in estimate.work(H200, 1024, D, 1_000_000, kept=False, kernels="C++")}
        assert found["cosine_exp"].rate == pytest.approx(bound, rel=0.02)


def test_tiles_come_in_whole_rounds() -> None:
    """84 tiles of 128 x 256 on 132 SMs take as long as 132."""
    assert H200.rounds(84) == pytest.approx(132 / 84) and H200.rounds(132) == 1 and H200.rounds(136) == 264 / 136
    few = {each.kernel: each for each in estimate.work(H200, 256, 512, 10_516, kept=True)}
    assert few["cosine_exp"].seconds == pytest.approx(132 / 84 * 1.35 * 2 * 256 * 512 * 10_516 / (0.92 * 584e12))


def test_other_dtypes() -> None:
    for kept in (True, False):
        steps = {name: estimate.step(H200, *SHAPE, kept, name) for name in estimate.KINDS}
        assert steps["float16"]["total_s"] > steps["bfloat16"]["total_s"]
        assert 1.6 < steps["TF32"]["total_s"] / steps["bfloat16"]["total_s"] < 3
        assert steps["float32"]["total_s"] > 3 * steps["TF32"]["total_s"]
        assert all(0 < each["of_floor"] < 1 for each in steps.values())
    assert estimate.KINDS["float32"].rate(estimate.CARDS["sm_80"]) == pytest.approx(0.8 * 19.5e12, rel=0.01)


def test_launches_are_counted() -> None:
    assert estimate.own_launches(256, 512, 10_516, kept=True, at_once=True) == 7
    assert estimate.own_launches(256, 512, 10_516, kept=False, at_once=True) == 9
    chunks = -(-1_000_000 // chunking.chunk_size(1024, 512))
    pieces = -(-1_000_000 // chunking.finish_size(512))
    own = estimate.own_launches(*SHAPE, kept=True, at_once=False)
    assert own == 4 + 2 * chunks + pieces
    assert estimate.launches(*SHAPE, kept=True, at_once=False) == own + 2 * chunks - 1 + pieces + estimate.TORCH_LAUNCHES


def test_the_table_says_that_it_is_an_estimate() -> None:
    text = estimate.printed(estimate.table("sm_90"), H200)
    assert text.startswith("Estimated, not measured") and text.count("C++ ") == 2 * len(estimate.SHAPES)


def test_the_documentation_has_these_estimates() -> None:
    rows = re.findall(r"^\| [\d,]+ \| [\d,]+ \| .*? \| (.*) \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(estimate.SHAPES)
    for shape, row in zip(estimate.SHAPES, rows, strict=True):
        steps = [estimate.step(H200, *shape, kept, kernels=name) for name in ("Triton", "C++") for kept in (True, False)]
        for (total, share), step in zip(re.findall(r"([\d.]+) \(([\d.]+)\)", row), steps, strict=True):
            assert float(total) == pytest.approx(1e3 * step["total_s"], rel=0.05)
            assert float(share) == pytest.approx(step["of_floor"], abs=0.006)
