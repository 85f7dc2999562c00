"""What a config's margin_list means, against InsightFace's own loss written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import amsoftmax_kernels as ak
from amsoftmax_kernels.insightface import margin_of

from .cases import FLOAT64, Case, relative

CASE = Case("", "", own=0.6)


def insightface_loss(logits: Tensor, labels: Tensor, m1: float, m2: float, m3: float) -> Tensor:
    """What its CombinedMarginLoss makes of cosines, s = 64, and cross-entropy then of its logits."""
    each = torch.arange(len(labels))
    if m1 == 1 and m3 == 0:
        with torch.no_grad():
            angle = logits.arccos()
            angle[each, labels] += m2
        logits = logits + (angle.cos() - logits).detach()
    else:
        logits = logits.index_put((each, labels), logits[each, labels] - m3)
    return cross_entropy(64 * logits, labels)


@pytest.mark.parametrize("margin_list", [(1.0, 0.5, 0.0), (1.0, 0.0, 0.4), (0.9, 0.4, 0.15), [1, 3, 0]])
def test_a_margin_list_of_insightface(margin_list: Any) -> None:
    features, weight, labels, _ = CASE.tensors()
    results = []
    for ours in (True, False):
        x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            loss = ak.am_softmax_loss(x, w, labels, scale=64.0, margin=margin_of(margin_list))
        else:
            loss = insightface_loss(normalize(x) @ normalize(w).T, labels, *margin_list)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    assert max(map(relative, *results)) < FLOAT64


def test_what_insightface_refuses() -> None:
    for margin_list in ((1.35, 0.0, 0.0), (1.0, 0.5), (1.0, 0.5, -0.1)):
        with pytest.raises(ValueError, match="margin_list"):
            margin_of(margin_list)
    with pytest.raises(TypeError, match="margin_list"):
        margin_of((1.0, "0.5", 0.0))  # type: ignore[arg-type]
