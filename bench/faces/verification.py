"""Face verification and identification metrics, in NumPy.

A pair is *genuine* when both images show the same person and *impostor* otherwise. A pair is accepted when
its score is at least a threshold t:

- FAR(t), false acceptance rate: the share of impostor pairs with score >= t;
- TAR(t), true acceptance rate (verification rate): the share of genuine pairs with score >= t;
- FRR(t) = 1 - TAR(t), false rejection rate.

A threshold cannot tell equal scores apart, so pairs with equal scores are accepted or rejected together.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def _scores(values: ArrayLike, name: str) -> Floats:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"{name} must be a non-empty vector of scores, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(scores)).sum())} values that are not")
    return scores


def cosine_matrix(embeddings: ArrayLike) -> Floats:
    """Cosine similarity [N, N] of every two rows of embeddings [N, D]; a zero row has cosine 0 with all."""
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"embeddings must be [N, D], got shape {rows.shape}")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return np.asarray(unit @ unit.T)


def split_pairs(similarity: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """The scores of all genuine and all impostor pairs: each unordered pair once, self-pairs never."""
    scores, people = np.asarray(similarity, dtype=np.float64), np.asarray(labels)
    if people.ndim != 1 or scores.shape != (people.size, people.size):
        raise ValueError(f"similarity must be [N, N] for labels [N], got {scores.shape} and {people.shape}")
    first, second = np.triu_indices(people.size, k=1)
    upper, same = scores[first, second], people[first] == people[second]
    return upper[same], upper[~same]


def roc_points(genuine: ArrayLike, impostor: ArrayLike) -> tuple[Floats, Floats]:
    """FAR and TAR at every distinct threshold, from (0, 0) to (1, 1), both non-decreasing."""
    true, false = _scores(genuine, "genuine"), _scores(impostor, "impostor")
    thresholds = np.unique(np.concatenate([true, false]))[::-1]
    # side="left" leaves out the scores below the threshold and keeps those equal to it.
    far = 1 - np.searchsorted(np.sort(false), thresholds, side="left") / false.size
    tar = 1 - np.searchsorted(np.sort(true), thresholds, side="left") / true.size
    return np.concatenate([[0.0], far]), np.concatenate([[0.0], tar])


def equal_error_rate(genuine: ArrayLike, impostor: ArrayLike) -> float:
    """The rate at which FAR equals FRR, on the ROC with straight lines between its points."""
    far, tar = roc_points(genuine, impostor)
    excess = far - (1 - tar)  # FAR - FRR: -1 at the first point, 1 at the last, non-decreasing between
    after = int(np.argmax(excess >= 0))
    before = after - 1
    weight = excess[before] / (excess[before] - excess[after])
    return float(far[before] + weight * (far[after] - far[before]))


def verification_rate(genuine: ArrayLike, impostor: ArrayLike, far: float) -> float:
    """The largest TAR of any threshold whose FAR is at most `far`; nothing is interpolated.

    At most k = floor(far * number of impostor pairs) impostors may be accepted, so a genuine pair must score
    above the impostor of rank k + 1. One equal to it is rejected, as accepting it would accept that impostor.
    With fewer than 1 / far impostor pairs k is 0: the rate is then that at FAR 0, a lower bound.
    """
    true, false = _scores(genuine, "genuine"), _scores(impostor, "impostor")
    return float(_rates_at(true, false, np.array([far], dtype=np.float64))[0])


def verification_rates(genuine: ArrayLike, impostor: ArrayLike, fars: ArrayLike) -> Floats:
    """`verification_rate` at each of several FARs: the ROC curve on a grid."""
    grid = np.asarray(fars, dtype=np.float64)
    return _rates_at(_scores(genuine, "genuine"), _scores(impostor, "impostor"), grid)


def _rates_at(genuine: Floats, impostor: Floats, fars: Floats) -> Floats:
    if not ((fars >= 0) & (fars <= 1)).all():
        raise ValueError(f"far must lie in [0, 1], got {fars.tolist()}")
    true, false = np.sort(genuine), np.sort(impostor)[::-1]
    rates = np.empty(fars.size)
    for i, far in enumerate(fars.tolist()):
        # Rounding first: 0.29 * 100 is a little under 29 in floating point, and 29 impostors are allowed.
        allowed = math.floor(round(far * false.size, 9))
        if allowed >= false.size:
            rates[i] = 1.0
        else:
            rates[i] = 1 - np.searchsorted(true, false[allowed], side="right") / true.size
    return rates


def rank1_identification(similarity: ArrayLike, labels: ArrayLike) -> float:
    """Rank-1 identification rate: one gallery image a person, all other images are probes.

    A probe is identified when its own person's gallery image scores above every other person's; a tie counts
    as a failure. The rate is averaged over all choices of gallery images, each person's drawn independently
    and uniformly. The average is exact and needs no enumeration: for a probe and its own gallery image with
    score s, the chance that every other gallery image scores below s is the product, over the other people,
    of the share of their images that do.
    """
    scores, people = np.asarray(similarity, dtype=np.float64), np.asarray(labels)
    if people.ndim != 1 or scores.shape != (people.size, people.size):
        raise ValueError(f"similarity must be [N, N] for labels [N], got {scores.shape} and {people.shape}")
    members = [np.flatnonzero(people == person) for person in np.unique(people)]
    num_probes = sum(own.size - 1 for own in members)
    if len(members) < 2 or num_probes == 0:
        raise ValueError("labels must hold at least 2 people, and one of them 2 images or more")
    identified = 0.0
    for own in members:
        to_beat = scores[np.ix_(own, own)]  # probe by gallery image
        chance = np.ones_like(to_beat)
        for others in members:
            if others is not own:
                against = np.sort(scores[np.ix_(own, others)], axis=1)
                for row in range(own.size):
                    chance[row] *= np.searchsorted(against[row], to_beat[row], side="left") / others.size
        np.fill_diagonal(chance, 0.0)  # an image is not its own probe
        identified += chance.sum() / own.size
    return float(identified / num_probes)
