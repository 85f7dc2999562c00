"""The estimates of a step's time: against counts by hand, and the targets that they meet or miss."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")
from amsoftmax_kernels.backends import chunking
from bench import estimate, estimate_hopper, estimate_peers, estimate_targets

NO_LAUNCHES = {True: 0, False: 0}
H200 = estimate.CARDS["sm_90"]


def test_estimates_grow_with_the_work_and_never_beat_the_floor() -> None:
    for arch in estimate.CARDS:
        rows = [row for row in estimate.table(arch) if row["dtype"] == "bfloat16"]
        assert [(row["B"], row["D"], row["C"]) for row in rows[::2]] == estimate.SHAPES
        for kept, recomputed in zip(rows[::2], rows[1::2], strict=True):
            assert 0 < kept["of_floor"] < 1 and 0 < recomputed["of_floor"] < 1
            assert kept["total_s"] < recomputed["total_s"]
        totals = [row["total_s"] for row in rows[::2]]
        assert totals == sorted(totals)
    hopper = estimate.step(estimate.CARDS["sm_90"], 1024, 512, 1_000_000, True, NO_LAUNCHES)
    assert hopper["flops"] == 6 * 1024 * 512 * 1_000_000 and hopper["bytes"] == 18 * 512 * 1_000_000


def test_the_partial_fc_algorithm_is_estimated() -> None:
    """What is to be reached: a third of its time, a quarter of its memory (save_bytes and a chunk)."""
    card, shape = estimate.CARDS["sm_90"], (1024, 512, 1_000_000)
    ours, theirs = estimate.step(card, *shape, True, NO_LAUNCHES), estimate_peers.partial_fc(card, *shape)
    assert ours["total_s"] < theirs["total_s"] / 3
    assert theirs["held"] / 4 > 2 * 1024 * 1_000_000
    assert theirs["total_s"] > ours["floor_s"] + 90 * 1024 * 1_000_000 / card.copy


def test_estimates_of_the_cpp_kernels() -> None:
    """Never faster than the card's products, nor than what must be read and stored."""
    card = estimate.CARDS["sm_90"]
    for B, D, C in estimate.SHAPES:
        bounds = estimate_hopper.hopper_cosine_exp(card, B, D, C)
        assert bounds["busy"] >= 2 * B * D * C / card.products and bounds["memory"] >= 2 * B * C / card.copy
        gradient = estimate_hopper.hopper_grad_centres(card, B, D, C)
        assert gradient["busy"] >= 2 * B * D * C / card.products and gradient["memory"] >= 8 * C * D / card.copy
        kept, recomputed = (estimate_hopper.hopper_step(card, B, D, C, how, NO_LAUNCHES) for how in (True, False))
        assert kept["total_s"] < recomputed["total_s"] and kept["total_s"] > 6 * B * C * D / card.products


def test_the_centres_gradient_is_made_at_once_where_that_is_estimated_faster() -> None:
    card = estimate.CARDS["sm_90"]
    for B, D, C, centre in itertools.product(
        (256, 512, 1024, 2048, 4096), (64, 96, 128, 144, 256, 272, 384, 496, 512, 1024), (100_000, 10_000_000), (2, 4)
    ):
        bounds = estimate.grad_centres(card, B, D, C, centre)
        assert bounds["one after the other"] >= 2 * B * D * C / card.products + 2 * centre * C * D / card.copy
        other = 2 * B * D * C / card.products + (4 + 2 * centre) * C * D / card.copy
        other += 2 * -(-C // chunking.finish_size(D)) * estimate.SECONDS_A_LAUNCH
        if estimate.gradient_at_once(card, B, D):
            assert max(bounds.values()) < other
    assert estimate.gradient_at_once(card, 1024, 512) and not estimate.gradient_at_once(card, 2048, 512)
    assert estimate.gradient_at_once(card, 512, 128) and not estimate.gradient_at_once(card, 1024, 128)
    assert not estimate.gradient_at_once(card, 256, 272) and not estimate.gradient_at_once(card, 256, 1024)
    assert not estimate.gradient_at_once(estimate.CARDS["sm_80"], 256, 512)
    assert len(estimate_hopper.printed_hopper(card).splitlines()) == 3 * len(estimate.SHAPES) + 5


def test_the_product_is_made_beside_the_gradient_where_that_is_estimated_faster() -> None:
    card = estimate.CARDS["sm_90"]
    gained = 0.0
    sizes = (1, 64, 128, 200, 256, 512, 1024), (128, 256, 496, 512), range(100, 17_000, 487), (2, 4)
    for B, D, C, centre in itertools.product(*sizes):
        beside, apart = (
            estimate.step(card, B, D, C, True, NO_LAUNCHES, beside=how, centre=centre)["total_s"] for how in (True, False)
        )
        assert beside <= apart
        gained = max(gained, apart - beside)
    assert gained > 10e-6
    few, many = (estimate.step(card, 256, 512, C, True, NO_LAUNCHES)["pieces_s"] for C in (10_516, 20_000))
    assert few["product with centres"] == 0 < many["product with centres"]


def test_tiles_come_in_whole_rounds() -> None:
    """84 tiles of 128 x 256 on 132 SMs take as long as 132, and 136 as long as 264."""
    a_tile = 2 * 128 * 256 * 512 / (H200.products / 132)
    for B, C, rounds in ((256, 10_516, 1), (128, 132 * 256, 1), (128, 136 * 256, 2), (1024, 93_431, 23)):
        found = estimate.cosine_exp(H200, B, 512, C)
        assert found["tensor"] == pytest.approx(rounds * a_tile)
        assert found["epilogue"] == pytest.approx(rounds * 2648 / H200.clock)
    one, eight = (estimate.cosine_exp(H200, 1024, 512, C) for C in (131_072, 8 * 131_072))  # a launch a chunk
    assert eight["total"] == pytest.approx(8 * one["total"])


def test_a_product_of_few_tiles_is_split() -> None:
    rate, large = H200.products, estimate.library_product
    assert large(H200, 128 * 132, 256, 512) == pytest.approx(2 * 128 * 132 * 256 * 512 / rate)
    for B, depth in ((256, 10_516), (1024, 131_072), (4096, 32_768)):
        seconds = large(H200, B, 512, depth)
        tiles = B // 128 * 2
        whole = 2 * 128 * 256 * depth * 132 / rate  # not split: a tile's whole depth on one SM
        parts = 132 // tiles
        assert seconds <= whole / parts * 1.001 + 8 * parts * B * 512 / H200.l2 + estimate.SECONDS_A_LAUNCH
        assert 2 * B * 512 * depth / rate + estimate.SECONDS_A_LAUNCH < seconds < whole / 1.9
    # Eight parts of 16 tiles, on 128 of 132 SMs; what they add up to is written, read, and another kernel's.
    parts = 2 * 128 * 256 * 131_072 / 8 / (rate / 132) + 8 * 8 * 1024 * 512 / H200.l2 + estimate.SECONDS_A_LAUNCH
    assert large(H200, 1024, 512, 131_072) == pytest.approx(parts)
    full, slow = (estimate.product_with_centres(H200, 1024, 512, 131_072, of_rate=of) for of in (1, 0.6))
    assert slow == pytest.approx(full / 0.6)


def test_other_dtypes_by_what_they_add() -> None:
    shape = (1024, 512, 1_000_000)
    for kept in (True, False):
        steps = {name: estimate.step(H200, *shape, kept, NO_LAUNCHES, name) for name in estimate.KINDS}
        copied = steps["float16"]["total_s"] - steps["bfloat16"]["total_s"]  # ŵ to bfloat16 for E·ŵ, chunk by chunk
        assert copied == pytest.approx(4 * 512 * 1_000_000 / H200.copy + 8 * estimate.SECONDS_A_LAUNCH)
        assert 1.6 < steps["TF32"]["total_s"] / steps["bfloat16"]["total_s"] < 3
        assert steps["float32"]["total_s"] > 3 * steps["TF32"]["total_s"]
        assert all(0 < each["of_floor"] < 1 for each in steps.values())
    assert estimate.prepare_bytes(*shape, kept=True, size=4) == 8 * 512 * 1_000_000
    assert estimate.KINDS["float32"].rate(estimate.CARDS["sm_80"]) == pytest.approx(0.8 * 19.5e12, rel=0.01)


def test_peers_by_hand() -> None:
    B, D, C = 1024, 512, 1_000_000
    product, copy = 2 * B * D * C / H200.products, H200.copy
    assert 3 * product + (12 * B * C + 6 * D * C) / copy < estimate_peers.quack(H200, B, D, C) < 7.7e-3
    # One row at a time the centres are read twice a row, and their gradient made, read and written.
    assert estimate_peers.liger(H200, B, D, C) > B * 10 * D * C / copy
    assert estimate_peers.liger(H200, 1024, 512, 512) < 100e-6  # all rows at once
    for classes, filtered in ((93_431, False), (C, True), (10_000_000, True)):
        default, whole = (estimate_peers.cce(H200, B, D, classes, filtered=how) for how in (True, False))
        assert (default < 0.6 * whole) == filtered and default <= whole
        assert whole > 8 * B * D * classes / H200.products
    assert 2 * product < estimate_peers.cce(H200, B, D, C) and estimate_peers.cce(H200, B, D, C, scale=64.0) > 2.3 * product
    assert 3 * product + 74 * B * C / copy < estimate_peers.eager(H200, B, D, C)
    assert estimate_peers.eager(H200, B, D, C) < estimate_peers.partial_fc(H200, B, D, C)["total_s"]


def test_every_target_has_a_verdict() -> None:
    """Those that are missed are known: a change of the estimates or of the kernels that moves one shows here."""
    rows = estimate_targets.targets(H200, estimate.few_launches("sm_90"))
    for row in rows:
        better = row["estimate"] - row["limit"] if row["unit"] in ("of the floor", "times as fast") else None
        better = row["limit"] - row["estimate"] if better is None else better
        assert row["verdict"] == ("met" if better >= 0 else "missed")
    for backend in ("Triton", "C++"):
        mine = [(row["target"], row["shape"]) for row in rows if row["backend"] == backend]
        assert [shape for name, shape in mine if name == "E kept"] == estimate.SHAPES[1:]
        assert [shape for name, shape in mine if name == "recomputed"] == estimate.SHAPES[1:]
        assert len(mine) == 8 + 3 + 3 * len(estimate.SHAPES) + (4 if backend == "C++" else 0)
    missed = {(row["backend"], row["target"], row["shape"][2]) for row in rows if row["verdict"] == "missed"}
    filtered = {(f"CCE, {how}", C) for how in ("bare", "bare, bf16") for C in (1_000_000, 2_059_906, 10_000_000)}
    few = {(backend, "quack, bare", 10_516) for backend in ("Triton", "C++")} | {("C++", "quack, bare, bf16", 10_516)}
    assert missed == few | {(backend, *each) for backend in ("Triton", "C++") for each in filtered}
    text = estimate_targets.printed(rows, H200)
    assert text.count(" met ") + text.count(" missed ") == 2 * len(rows)


def test_the_backward_pass_by_chunks_is_favoured() -> None:
    for shape in estimate.SHAPES[1:]:
        fused_kernels = estimate_targets.fused_backward(H200, *shape)
        assert estimate_targets.backward(H200, *shape) < fused_kernels["least"] < fused_kernels["total"]
