"""Metrics against cases worked out by hand and against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bench.faces import verification as v


def brute_force_vr(genuine: list[float], impostor: list[float], far: float) -> float:
    best = 0.0
    for threshold in [*genuine, *impostor, np.inf]:
        if sum(s >= threshold for s in impostor) <= far * len(impostor) + 1e-9:
            best = max(best, sum(s >= threshold for s in genuine) / len(genuine))
    return best


def test_pairs_are_counted_once_and_never_with_themselves() -> None:
    similarity = np.array([[1.0, 0.1, 0.2], [0.1, 1.0, 0.3], [0.2, 0.3, 1.0]])
    genuine, impostor = v.split_pairs(similarity, [7, 9, 7])
    assert genuine.tolist() == [0.2]
    assert sorted(impostor.tolist()) == [0.1, 0.3]


def test_cosine_ignores_length_and_gives_zero_for_a_zero_row() -> None:
    cosine = v.cosine_matrix([[2.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    np.testing.assert_allclose(cosine, [[1, 0.5**0.5, 0], [0.5**0.5, 1, 0], [0, 0, 0]], atol=1e-15)


def test_roc_points_by_hand_with_a_tie() -> None:
    far, tar = v.roc_points([0.9, 0.5], [0.5, 0.1])
    # Thresholds 0.9, 0.5, 0.1: at 0.5 the genuine and the impostor pair are accepted together.
    assert far.tolist() == [0, 0, 0.5, 1]
    assert tar.tolist() == [0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("genuine", "impostor", "expected"),
    [
        ([0.8, 0.9], [0.1, 0.2], 0.0),
        ([0.1, 0.2], [0.8, 0.9], 1.0),
        ([0.5], [0.5], 0.5),  # one tie: the ROC is the diagonal
        ([0.5, 0.5, 0.5], [0.5, 0.5], 0.5),
        ([0.9, 0.5], [0.5, 0.1], 0.25),  # from (0, 0.5) to (0.5, 1): FAR = 0.25 where FRR = 0.25
        ([4, 3, 1], [2, 0, -1], 1 / 3),
        ([4, 3, 2, 0], [1, -1], 0.25),  # the vertical part of the ROC crosses no equal point before FAR 0.5
    ],
)
def test_equal_error_rate_by_hand(genuine: list[float], impostor: list[float], expected: float) -> None:
    assert v.equal_error_rate(genuine, impostor) == pytest.approx(expected, abs=1e-12)


def test_a_genuine_pair_tied_with_a_forbidden_impostor_is_rejected() -> None:
    genuine, impostor = [0.9, 0.7, 0.7, 0.2], [0.7, 0.3, 0.1, 0.0]
    assert v.verification_rate(genuine, impostor, 0.0) == 0.25
    assert v.verification_rate(genuine, impostor, 0.25) == 0.75
    # Two impostors share 0.7: allowing one allows neither.
    assert v.verification_rate(genuine, [0.7, 0.7, 0.1, 0.0], 0.25) == 0.25
    assert v.verification_rate(genuine, [0.7, 0.7, 0.1, 0.0], 0.5) == 1.0


def test_too_few_impostors_give_the_rate_at_far_zero() -> None:
    assert v.verification_rate([0.9, 0.5, 0.1], [0.5, 0.2], 1e-3) == pytest.approx(1 / 3)


def test_far_is_met_exactly_despite_rounding() -> None:
    impostor = np.arange(100) / 100
    # 0.29 * 100 is 28.999...: 29 impostors may be accepted, and a genuine pair above the 30th may be too.
    assert v.verification_rate([0.705], impostor, 0.29) == 1.0
    assert v.verification_rate([0.70], impostor, 0.29) == 0.0
    assert v.verification_rate([-1.0], impostor, 1.0) == 1.0


def test_against_enumeration_with_many_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        genuine = rng.integers(2, 9, rng.integers(1, 12)).tolist()
        impostor = rng.integers(0, 7, rng.integers(1, 12)).tolist()
        fars = [0.0, 0.01, 0.1, 0.25, 0.5, 1.0]
        expected = [brute_force_vr(genuine, impostor, far) for far in fars]
        assert v.verification_rates(genuine, impostor, fars).tolist() == pytest.approx(expected)
        assert [v.verification_rate(genuine, impostor, far) for far in fars] == pytest.approx(expected)


def test_equal_error_rate_is_symmetric_and_on_the_roc() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        genuine, impostor = rng.integers(2, 9, 10) * 1.0, rng.integers(0, 7, 15) * 1.0
        eer = v.equal_error_rate(genuine, impostor)
        assert v.equal_error_rate(-impostor, -genuine) == pytest.approx(eer)
        # Shifting apart can only help.
        assert v.equal_error_rate(genuine + 1, impostor) <= eer + 1e-12


def test_rank1_by_hand() -> None:
    # Person 0 has images 0 and 1, person 1 has image 2. Probe 1 with gallery 0 beats image 2 (0.5 > 0.4);
    # probe 0 with gallery 1 does not (0.5 < 0.6).
    similarity = np.array([[1.0, 0.5, 0.6], [0.5, 1.0, 0.4], [0.6, 0.4, 1.0]])
    assert v.rank1_identification(similarity, [0, 0, 1]) == 0.5
    similarity[0, 2] = similarity[2, 0] = 0.5  # a tie is a failure
    assert v.rank1_identification(similarity, [0, 0, 1]) == 0.5


def test_rank1_equals_the_average_over_every_gallery() -> None:
    rng = np.random.default_rng(2)
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3])
    members = [np.flatnonzero(labels == person) for person in range(4)]
    for _ in range(5):
        similarity = rng.integers(0, 6, (9, 9)).astype(float)
        similarity = similarity + similarity.T
        hits = []
        for gallery in itertools.product(*members):
            for probe in set(range(9)) - set(gallery):
                own = gallery[labels[probe]]
                others = [g for g in gallery if g != own]
                hits.append(all(similarity[probe, own] > similarity[probe, g] for g in others))
        assert v.rank1_identification(similarity, labels) == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("bad", [[], [[0.1]], [np.nan], [np.inf]])
def test_scores_that_are_not_a_finite_vector_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="impostor"):
        v.equal_error_rate([0.5], bad)
    with pytest.raises(ValueError, match="genuine"):
        v.verification_rate(bad, [0.5], 0.1)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="far"):
        v.verification_rate([0.5], [0.5], 1.5)
    with pytest.raises(ValueError, match="labels"):
        v.rank1_identification(np.eye(2), [0, 1])
    with pytest.raises(ValueError, match="similarity"):
        v.split_pairs(np.eye(3), [0, 1])
