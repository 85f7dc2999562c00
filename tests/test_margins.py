"""Margins: those that ship, and that the protocol carries those that do not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import amsoftmax_kernels as ak
from amsoftmax_kernels.margins import AdditiveMargin, AnnealedAdditiveMargin, Margin

from .cases import FLOAT64, Case, relative

pytestmark = pytest.mark.usefixtures("small_chunks")
CASE = Case("", "", own=0.6)


class ArcFace:
    """ψ(t) = cos(arccos t + m) (Deng et al. 2019)."""

    def __call__(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        return torch.cos(torch.arccos(cosine.clamp(-1 + 1e-7, 1 - 1e-7)) + 0.5)


class Combined:
    """ψ(t) = cos(m1 arccos t + m2) − m3 (InsightFace)."""

    def __call__(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        return torch.cos(torch.arccos(cosine.clamp(-1 + 1e-7, 1 - 1e-7)) * 0.9 + 0.3) - 0.15


class AdaFace:
    """The margin by the batch's normalized feature norm, no gradient through it (Kim et al. 2022)."""

    def __call__(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        norm = feature_norm.detach()
        quality = ((norm - norm.mean()) / (norm.std() + 1e-3) * 0.333).clamp(-1, 1)
        angle = torch.arccos(cosine.clamp(-1 + 1e-7, 1 - 1e-7)) - 0.4 * quality
        return torch.cos(angle.clamp(1e-3, math.pi - 1e-3)) - (0.4 + 0.4 * quality)


class MagFace:
    """The angular margin grows with ‖x‖, and the gradient flows through it (Meng et al. 2021)."""

    def __call__(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        margin = 0.45 + 0.03 * feature_norm.clamp(1, 110)
        return torch.cos(torch.arccos(cosine.clamp(-1 + 1e-7, 1 - 1e-7)) + margin)


class PerClass:
    def __call__(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        return cosine - 0.1 - 0.001 * labels


@pytest.mark.parametrize("margin", [ArcFace(), Combined(), AdaFace(), MagFace(), PerClass()], ids=lambda m: type(m).__name__)
def test_any_margin_on_the_target(margin: Margin) -> None:
    """Against logits written out with the margin applied in their place."""
    features, weight, labels, _ = CASE.tensors()
    results = []
    for ours in (True, False):
        x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            loss = ak.am_softmax_loss(x, w, labels, margin=margin)
        else:
            cosine = normalize(x) @ normalize(w).T
            rows = torch.arange(CASE.B)
            logits = cosine.clone()
            logits[rows, labels] = margin(cosine[rows, labels], labels, x.norm(dim=1))
            loss = cross_entropy(30 * logits, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    assert max(map(relative, *results)) < FLOAT64


def test_float_tensor_and_module_agree() -> None:
    features, weight, labels, _ = CASE.tensors()
    expected = ak.am_softmax_loss(features, weight, labels, margin=0.25)
    per_class = torch.full((CASE.C,), 0.25, dtype=torch.float64)
    for margin in (per_class, torch.tensor(0.25), AdditiveMargin(0.25), AdditiveMargin(per_class)):
        assert relative(ak.am_softmax_loss(features, weight, labels, margin=margin), expected) < 1e-15


def test_a_margin_a_class_is_its_own_classs() -> None:
    features, weight, labels, _ = CASE.tensors()
    margin = torch.linspace(0, 0.5, CASE.C, dtype=torch.float64)
    rows = ak.am_softmax_loss(features, weight, labels, margin=margin, reduction="none")
    for b, y in enumerate(labels.tolist()):
        alone = ak.am_softmax_loss(features[b : b + 1], weight, labels[b : b + 1], margin=margin[y].item())
        assert relative(rows[b], alone) < 1e-12


def test_labels_of_ignored_rows_can_index() -> None:
    features, weight, labels, _ = CASE.tensors()
    labels[0] = -100
    margin = torch.linspace(0, 0.5, CASE.C, dtype=torch.float64)
    assert ak.am_softmax_loss(features, weight, labels, margin=margin).isfinite()


def test_annealing_takes_the_authors_steps() -> None:
    margin = AnnealedAdditiveMargin()
    assert margin.margin.item() == 0
    for _ in range(100):
        margin.step()
    assert margin.margin.item() == pytest.approx(100 * 5e-5, abs=1e-15)
    margin.steps.fill_(7999)
    assert margin.margin.item() < 0.4
    for _ in range(5):
        margin.step()
    assert margin.margin.item() == 0.4


def test_annealing_can_go_down_and_refuses_the_wrong_way() -> None:
    margin = AnnealedAdditiveMargin(0.5, 0.1, -0.1)
    margin.step()
    assert margin.margin.item() == pytest.approx(0.4)
    for arguments in ((0.0, 0.4, -1e-3), (0.5, 0.1, 0.1), (0.0, 0.4, 0.0), (0.0, 0.4, math.nan)):
        with pytest.raises(ValueError, match="increment"):
            AnnealedAdditiveMargin(*arguments)


def test_annealing_in_a_head() -> None:
    """Stepped between batches, saved and loaded with the head."""
    margin = AnnealedAdditiveMargin(0.0, 0.4, 0.05)
    head = ak.AMSoftmaxLoss(CASE.D, CASE.C, margin=margin, dtype=torch.float64)
    features, _, labels, _ = CASE.tensors()
    losses = []
    for step in range(3):
        loss = head(features, labels)
        fixed = ak.am_softmax_loss(features, head.weight, labels, margin=0.05 * step)
        assert relative(loss.detach(), fixed.detach()) < 1e-14
        losses.append(loss.item())
        margin.step()
    assert losses == sorted(losses) and losses[0] < losses[2]
    other = ak.AMSoftmaxLoss(CASE.D, CASE.C, margin=AnnealedAdditiveMargin(0.0, 0.4, 0.05), dtype=torch.float64)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(features, labels), head(features, labels))


def test_a_learned_margin_and_scale() -> None:
    margin = AdditiveMargin(nn.Parameter(torch.tensor(0.3, dtype=torch.float64)))
    scale = nn.Parameter(torch.tensor(20.0, dtype=torch.float64))
    head = ak.AMSoftmaxLoss(CASE.D, CASE.C, scale=scale, margin=margin, dtype=torch.float64)
    assert {name for name, _ in head.named_parameters()} == {"weight", "scale", "margin.margin"}
    features, _, labels, _ = CASE.tensors()
    twin = copy.deepcopy(head)
    twin.backend = "reference"
    for each in (head, twin):
        each(features, labels).backward()
    for ours, theirs in zip(head.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and relative(ours.grad, theirs.grad) < FLOAT64
        assert theirs.grad.norm() > 0


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_margin_of_another_signature_is_named(backend: str) -> None:
    features, weight, labels = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])

    class OfOne(torch.nn.Module):
        def forward(self, cosine: Tensor) -> Tensor:
            return cosine

    def broken(cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        return cosine + "a"  # type: ignore[operator]

    for margin in (lambda cosine: cosine, OfOne()):
        with pytest.raises(TypeError, match=r"margin must be callable as margin\(cosine, labels, feature_norm\)"):
            ak.am_softmax_loss(features, weight, labels, margin=margin, backend=backend)
    with pytest.raises(TypeError, match="unsupported operand"):  # the margin's own error stays as it is
        ak.am_softmax_loss(features, weight, labels, margin=broken, backend=backend)
