"""Rank-1 identification against cases worked out by hand and against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bench.faces import rank1 as v


def test_cosine_ignores_length_and_gives_zero_for_a_zero_row() -> None:
    cosine = v.cosine_matrix([[2.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    np.testing.assert_allclose(cosine, [[1, 0.5**0.5, 0], [0.5**0.5, 1, 0], [0, 0, 0]], atol=1e-15)


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


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="labels"):
        v.rank1_identification(np.eye(2), [0, 1])
    with pytest.raises(ValueError, match="embeddings"):
        v.cosine_matrix([1.0])
