"""Rank-1 identification, averaged over every choice of a gallery: for a set too small to have one gallery of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def cosine_matrix(embeddings: ArrayLike) -> NDArray[np.float64]:
    """Cosine similarity [N, N] of every two rows of embeddings [N, D]; a zero row has cosine 0 with all."""
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"embeddings must be [N, D], got shape {rows.shape}")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return np.asarray(unit @ unit.T)


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
