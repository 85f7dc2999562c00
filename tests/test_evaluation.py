"""Protocols over all pairs against enumeration, on features whose cosines are multiples of 1/8: full of ties, exact."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from amsoftmax_kernels import evaluation as ev
from amsoftmax_kernels.evaluation import all_pairs, counting, distractors, passes, search
from amsoftmax_kernels.evaluation.search import Sample

DIM = 16
FARS = (1.0, 0.5, 0.1, 1e-2, 1e-3)


def planted(count: int, people: int, seed: int, flip: float = 0.15) -> tuple[Tensor, Tensor]:
    """Rows of ±1, 16 of them, so that unit rows and cosines are exact; some rows are equal, of one person or of several."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(people, (count,), generator=generator)
    signs = torch.randint(2, (people, DIM), generator=generator) * 2 - 1
    flips = torch.rand(count, DIM, generator=generator) < flip
    features = (signs[labels] * (1 - 2 * flips.long())).float()
    features[count // 2] = features[0]
    return features * torch.rand(count, 1, generator=generator).exp2().log2().ceil().exp2(), labels * 7 - 3


class Scores(NamedTuple):
    genuine: np.ndarray[Any, Any]
    impostors: np.ndarray[Any, Any]


def enumerated(features: Tensor, labels: Tensor) -> Scores:
    unit = torch.nn.functional.normalize(features.double())
    first, second = torch.tril_indices(len(unit), len(unit), -1)
    scores, same = (unit @ unit.T)[first, second].numpy().round(9), (labels[first] == labels[second]).numpy()
    return Scores(scores[same], scores[~same])


def kth(impostors: np.ndarray[Any, Any], far: float) -> float:
    k = math.floor(far * len(impostors) + 0.5)
    return float(np.sort(impostors)[-k]) if k else math.nan


def equal_error_rate(scores: Scores) -> float:
    """On the ROC with straight lines between its points."""
    thresholds = np.unique(np.concatenate(scores))[::-1]
    far = np.concatenate([[0], 1 - np.searchsorted(np.sort(scores.impostors), thresholds, "left") / len(scores.impostors)])
    frr = np.concatenate([[1], np.searchsorted(np.sort(scores.genuine), thresholds, "left") / len(scores.genuine)])
    after = int(np.argmax(far >= frr))
    before = after - 1
    weight = (frr - far)[before] / ((frr - far)[before] + (far - frr)[after])
    return float(far[before] + weight * (far[after] - far[before]))


def check(result: ev.Verification, scores: Scores, fars: tuple[float, ...] = FARS) -> None:
    assert (result.genuine, result.impostors) == (len(scores.genuine), len(scores.impostors))
    for far in fars:
        threshold = kth(scores.impostors, far)
        assert result.threshold[far] == pytest.approx(threshold, abs=1e-9, nan_ok=True)
        expected = math.nan if math.isnan(threshold) else float((scores.genuine >= threshold - 1e-9).mean())
        assert result.vr[far] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert result.eer == pytest.approx(equal_error_rate(scores), abs=1e-12)
    impostors = np.sort(scores.impostors)
    wins = np.mean([np.searchsorted(impostors, scores.genuine, side).mean() for side in ("left", "right")]) / len(impostors)
    assert abs(result.auc - wins) <= result.auc_error + 1e-12


@pytest.fixture(params=["all kept", "sampled", "too many to keep", "as on a GPU"])
def effort(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How a search goes: everything at hand, an interval at hand by a sample's advice, or hardly any score kept."""
    if request.param != "all kept":
        monkeypatch.setattr(all_pairs, "ALL_KEPT", 0)
        monkeypatch.setattr(search, "_TOGETHER", 10)
        monkeypatch.setattr(search, "_FEW", 8)
    if request.param == "too many to keep":
        for module in (passes, distractors):
            monkeypatch.setattr(module, "KEPT", 20)
    if request.param == "as on a GPU":  # PyTorch's operations in the place of NumPy's
        monkeypatch.setattr(counting, "in_numpy", lambda scores: False)
    yield request.param


@pytest.mark.parametrize("count, people, seed", [(5, 2, 0), (83, 12, 1), (300, 9, 2), (500, 200, 3)])
def test_all_pairs_against_enumeration(count: int, people: int, seed: int, effort: str) -> None:
    features, labels = planted(count, people, seed)
    check(ev.verification(features, labels, FARS), enumerated(features, labels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, effort: str) -> None:
    features, labels = planted(150, 20, 4)
    check(ev.verification(features.to(dtype), labels.int(), FARS), enumerated(features, labels))


def test_scores_without_ties(effort: str) -> None:
    """Real numbers, whose order decides: rates to the pair, thresholds to rounding."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(40, (250,), generator=generator)
    features = torch.randn(40, 24, generator=generator)[labels] + torch.randn(250, 24, generator=generator)
    scores = enumerated(features.double(), labels)
    found = ev.verification(features.double().numpy(), labels.numpy(), FARS)
    check(found, scores)
    single = ev.verification(features, labels, FARS)
    assert [single.vr[far] for far in FARS] == pytest.approx([found.vr[far] for far in FARS], abs=2 / found.genuine)
    assert single.auc == pytest.approx(found.auc, abs=1e-6 + single.auc_error + found.auc_error)


def test_a_sample_that_misleads_costs_a_pass_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = planted(300, 30, 6)
    wrong = np.zeros(counting.BINS)
    wrong[100] = 1.0
    monkeypatch.setattr(all_pairs, "ALL_KEPT", 0)
    monkeypatch.setattr(passes.AllPairs, "sample", lambda self: Sample(wrong, wrong, 10**9, 10**9, 10**9))
    check(ev.verification(features, labels, FARS), enumerated(features, labels))


def test_cosines_all_but_equal_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one bin, and too many to keep: cells of cells find the order."""
    monkeypatch.setattr(all_pairs, "ALL_KEPT", 0)
    monkeypatch.setattr(passes, "KEPT", 50)
    generator = torch.Generator().manual_seed(7)
    features = torch.eye(120, dtype=torch.float64) + 1e-9 * torch.randn(120, 120, dtype=torch.float64, generator=generator)
    labels = torch.arange(120) // 4
    unit = torch.nn.functional.normalize(features)
    first, second = torch.tril_indices(120, 120, -1)
    scores, same = (unit @ unit.T)[first, second].numpy(), (labels[first] == labels[second]).numpy()
    result = ev.verification(features, labels, (0.3, 0.01))
    for far in (0.3, 0.01):
        assert result.threshold[far] == pytest.approx(kth(scores[~same], far), rel=1e-6)


def test_same_bits_for_any_threads_and_order() -> None:
    generator = torch.Generator().manual_seed(8)
    labels = torch.randint(300, (3000,), generator=generator)
    features = torch.randn(3000, 32, generator=generator)
    threads = torch.get_num_threads()
    try:
        found = []
        for each in (1, 2, 3):
            torch.set_num_threads(each)
            found.append(ev.verification(features, labels).as_json())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_products_are_in_float32_whatever_training_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within, and as it was after, an error too."""
    generator = torch.Generator().manual_seed(21)
    features, labels = torch.randn(300, 64, generator=generator), torch.arange(300) // 3
    expected = [
        each.as_json() for each in (ev.verification(features, labels), ev.megaface(features, labels, features.flip(1)))
    ]
    seen: list[str] = []
    product = passes.product_nt

    def spy(left: Tensor, right: Tensor) -> Tensor:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return product(left, right)

    monkeypatch.setattr(passes, "product_nt", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # autocast is a thread's own: the work is in this one
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = [ev.verification(features, labels), ev.megaface(features, labels, features.flip(1))]
            with pytest.raises(ValueError, match="distractors must be finite"):
                ev.megaface(features, labels, features * math.nan)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_num_threads(threads)
    assert [each.as_json() for each in found] == expected and set(seen) == {"ieee"}


def test_progress_is_shown_where_it_takes_long(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(passes.time, "monotonic", lambda: next(clock))
    features, labels = planted(1600, 30, 22)
    ev.verification(features, labels)
    assert capsys.readouterr().err == ""
    ev.verification(features, labels, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("verification: 100%, 0:00 left") and len(lines) > 2


def test_features_are_left_as_they_are_and_read_only_arrays_are_taken() -> None:
    features, labels = planted(60, 9, 9)
    array = features.numpy().copy()
    array.flags.writeable = False
    before = array.copy()
    flipped = array[::-1]
    results = [ev.verification(array, labels), ev.verification(flipped, labels.flip(0)), ev.verification(features, labels)]
    assert results[0].as_json() == results[1].as_json() == results[2].as_json()
    assert (array == before).all()


def test_where_there_is_no_rate() -> None:
    features, labels = planted(30, 5, 10)
    alone = ev.verification(features, torch.zeros(30, dtype=torch.long))
    assert (alone.genuine, alone.impostors) == (435, 0)
    assert all(map(math.isnan, [*alone.vr.values(), *alone.threshold.values(), alone.eer, alone.auc]))
    assert "no rate at FAR 0.001: there are no impostor pairs" in alone.notes
    strangers = ev.verification(features, torch.arange(30), (0.1, 1e-3))
    assert strangers.genuine == 0 and math.isnan(strangers.vr[0.1]) and not math.isnan(strangers.threshold[0.1])
    assert any("no genuine pairs" in note for note in strangers.notes)
    assert "435 impostor pairs are too few, it takes 500" in str(strangers)
    for count in (0, 1):
        assert ev.verification(features[:count], labels[:count]).impostors == 0
    zero = ev.verification(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), [0, 0, 1], 1.0)
    assert zero.threshold[1.0] == 0.0, "a zero row has cosine 0 with all"


def test_numbers_far_from_one() -> None:
    """Rows whose squares leave float32's range have the cosines of the same rows at a usual norm."""
    features, labels = planted(80, 9, 11)
    scaled = features.clone()
    scaled[::3] *= 2.0**100
    scaled[1::3] *= 2.0**-100
    assert ev.verification(scaled, labels, FARS).as_json() == ev.verification(features, labels, FARS).as_json()


@pytest.mark.parametrize("far", [0.0, -1.0, 1.5, math.nan, "x", (), None])
def test_rates_that_are_none(far: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="far"):
        ev.verification(torch.eye(3), [0, 0, 1], far)


def test_errors_name_the_argument() -> None:
    features, labels = planted(12, 3, 12)
    for row, value in ((3, math.nan), (11, math.inf)):
        bad = features.clone()
        bad[row, 2] = value
        with pytest.raises(ValueError, match=f"features must be finite, but these rows are not: {row}$"):
            ev.verification(bad, labels)
    with pytest.raises(ValueError, match=r"rows are not: 0, 1, 2, 3, 4, …"):
        ev.verification(features * math.nan, labels)
    with pytest.raises(ValueError, match=r"labels must have shape \[12\]"):
        ev.verification(features, labels[:5])
    with pytest.raises(TypeError, match="labels must be integers"):
        ev.verification(features, labels.float())
    with pytest.raises(TypeError, match="features must be floating-point"):
        ev.verification(features.long(), labels)
    with pytest.raises(TypeError, match="features must be a tensor or an array"):
        ev.verification("features", labels)
    with pytest.raises(ValueError, match=r"features must have shape \[N, D\]"):
        ev.verification(features[0], labels)


def megaface_by_hand(
    features: Tensor, labels: Tensor, others: Tensor, sizes: list[int], far: float
) -> tuple[dict[int, float], float]:
    unit, far_unit = (torch.nn.functional.normalize(each.double()) for each in (features, others))
    among, with_others = (unit @ unit.T).numpy().round(9), (unit @ far_unit.T).numpy().round(9)
    rank1 = {}
    for size in sizes:
        hits = [
            among[probe, mate] > with_others[probe, :size].max()
            for probe in range(len(unit))
            for mate in range(len(unit))
            if probe != mate and labels[probe] == labels[mate]
        ]
        rank1[size] = float(np.mean(hits))
    scores = enumerated(features, labels)
    threshold = kth(np.concatenate([scores.impostors, with_others.ravel()]), far)
    return rank1, float((scores.genuine >= threshold).mean())


def test_megaface_against_enumeration(effort: str, tmp_path: Any) -> None:
    features, labels = planted(40, 6, 13, flip=0.05)
    others, _ = planted(1100, 300, 14)
    sizes = [10, 700, 1100]
    rank1, tar = megaface_by_hand(features, labels, others, sizes, 1e-3)
    np.save(tmp_path / "others.npy", others.numpy())
    mapped = np.load(tmp_path / "others.npy", mmap_mode="r")
    for given in (others, mapped):
        result = ev.megaface(features, labels, given, sizes, 1e-3)
        assert result.rank1 == pytest.approx(rank1, abs=1e-12) and result.tar[1e-3] == pytest.approx(tar, abs=1e-12)
    assert result.impostors == 40 * 39 // 2 - result.genuine + 40 * 1100
    more = ev.megaface(features, labels, others, (10, 5000))
    assert math.isnan(more.rank1[5000]) and "there are 1,100" in str(more) and more.rank1[10] == rank1[10]


def test_megaface_of_files(tmp_path: Any) -> None:
    features, labels = planted(20, 4, 15)
    others, _ = planted(30, 9, 16)
    paths = []
    for number, row in enumerate(others.numpy()):
        paths.append(tmp_path / f"{number}.bin")
        paths[-1].write_bytes(np.array([DIM, 1, 4, 5], "<i4").tobytes() + row.astype("<f4").tobytes())
    expected = ev.megaface(features, labels, others, 30, 0.01)
    assert ev.megaface(features, labels, paths, 30, 0.01).as_json() == expected.as_json()
    whole = paths[3].read_bytes()
    for broken, message in ((whole[:-1], "16 float32"), (b"", "must start with"), (b"\x07" * 80, "must start with")):
        paths[3].write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            ev.megaface(features, labels, paths, 30, 0.01)
    paths[3].write_bytes(np.array([2, 1, 4, 5], "<i4").tobytes() + bytes(8))
    with pytest.raises(ValueError, match=r"must have 16 dimensions, but .*3\.bin has 2"):
        ev.megaface(features, labels, paths, 30, 0.01)
    with pytest.raises(TypeError, match="distractors must be a tensor, an array or a sequence of paths"):
        ev.megaface(features, labels, 7)
    bad = others.clone()
    bad[17] = math.nan
    with pytest.raises(ValueError, match="distractors must be finite, but these rows are not: 17"):
        ev.megaface(features, labels, bad)


@pytest.mark.gpu
def test_on_a_gpu(effort: str) -> None:
    features, labels = planted(300, 30, 17)
    others, _ = planted(1100, 300, 18)
    check(ev.verification(features.cuda(), labels.cuda(), FARS), enumerated(features, labels))
    expected = ev.megaface(features, labels, others, 1100, 1e-3).as_json()
    assert ev.megaface(features.cuda(), labels, others, 1100, 1e-3).as_json() == expected


@pytest.mark.slow
def test_memory_of_all_pairs() -> None:
    """40,000 features of 64 in less than 800 MB above the inputs, most of which PyTorch's threads bring along."""
    import resource

    generator = torch.Generator().manual_seed(19)
    labels = torch.randint(4000, (40_000,), generator=generator)
    features = torch.randn(4000, 64, generator=generator)[labels] + torch.randn(40_000, 64, generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = ev.verification(features, labels)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 800e6
    assert result.genuine + result.impostors == 40_000 * 39_999 // 2
