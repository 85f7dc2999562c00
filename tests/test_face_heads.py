"""The losses of the face benchmark that are plain PyTorch, and the schedules of the arms, against formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from amsoftmax_kernels import AMSoftmaxLoss
from amsoftmax_kernels.margins import SphereFaceMargin
from amsoftmax_kernels.optim import FusedSGD
from bench.faces import arms, training
from bench.faces.heads import CentreLoss, LSoftmaxLoss, SoftmaxLoss

B, D, C = 12, 5, 4


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features near, across and opposite to their class's centre, so that every piece of ψ is met; centres; labels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(C, D, generator=generator, dtype=torch.float64)
    labels = torch.arange(B) % C
    toward = torch.linspace(-1, 1, B, dtype=torch.float64)[:, None]
    features = 2 * toward * weight[labels] + 0.5 * torch.randn(B, D, generator=generator, dtype=torch.float64)
    return features, weight, labels


def margin_logit(x: np.ndarray, w: np.ndarray, m: int, lambda_: float) -> float:
    """‖w‖‖x‖·(λ·cos θ + (−1)^k·cos(mθ) − 2k)/(1 + λ), by the angle: θ in [kπ/m, (k + 1)π/m]."""
    length = math.hypot(*x) * math.hypot(*w)
    theta = math.acos(float(x @ w) / length)
    k = min(int(theta * m / math.pi), m - 1)
    return length * (lambda_ * math.cos(theta) + (-1) ** k * math.cos(m * theta) - 2 * k) / (1 + lambda_)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    rows = [math.log(sum(math.exp(z) for z in row)) - row[y] for row, y in zip(logits, labels, strict=True)]
    return sum(rows) / len(rows)


@pytest.mark.parametrize(("m", "lambda_"), [(2, 0.0), (2, 5.0), (3, 0.5), (4, 5.0)])
@pytest.mark.parametrize("normalized", [False, True], ids=["l-softmax", "a-softmax"])
def test_l_softmax_and_a_softmax(m: int, lambda_: float, normalized: bool, problem: tuple[torch.Tensor, ...]) -> None:
    features, weight, labels = problem
    margin = SphereFaceMargin(m, base=0.0, minimum=lambda_)
    head = AMSoftmaxLoss(D, C, margin=margin, normalize_features=False) if normalized else LSoftmaxLoss(D, C, margin)
    head = head.double()
    centres = head.weight if normalized else head.classifier.weight
    with torch.no_grad():
        centres.copy_(weight)
    x, w, y = features.numpy(), weight.numpy(), labels.numpy()
    if normalized:  # A-Softmax is L-Softmax on centres of length 1
        w = w / np.linalg.norm(w, axis=1, keepdims=True)
    logits = x @ w.T
    pieces = set()
    for row in range(B):
        cosine = logits[row, y[row]] / np.linalg.norm(x[row]) / np.linalg.norm(w[y[row]])
        pieces.add(int(math.acos(cosine) * m / math.pi))
        logits[row, y[row]] = margin_logit(x[row], w[y[row]], m, lambda_)
    assert pieces == set(range(m))
    assert head(features, labels).item() == pytest.approx(cross_entropy(logits, y), rel=1e-12)


def test_gradients_of_l_softmax(problem: tuple[torch.Tensor, ...]) -> None:
    features, weight, labels = problem
    head = LSoftmaxLoss(D, C, SphereFaceMargin(3, base=0.0, minimum=0.5)).double()

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(head, {"classifier.weight": w}, (x, labels))

    assert torch.autograd.gradcheck(loss, (features.requires_grad_(), weight.requires_grad_()))


def test_centre_loss_and_its_centres(problem: tuple[torch.Tensor, ...]) -> None:
    features, weight, labels = problem
    labels = labels.where(labels != 3, 0)  # a class that is not in the batch
    head = CentreLoss(D, C, weight=0.02, alpha=0.3).double()
    head.centres.copy_(weight.flip(0))
    x, y, centres = features.numpy(), labels.numpy(), head.centres.numpy().copy()
    pull = sum(((x[row] - centres[y[row]]) ** 2).sum() for row in range(B)) / B
    plain = cross_entropy(x @ head.classifier.weight.detach().numpy().T, y)
    assert head(features, labels).item() == pytest.approx(plain + 0.01 * pull, rel=1e-12)
    for j in range(C):
        own = x[y == j]
        centres[j] -= 0.3 * (len(own) * centres[j] - own.sum(0)) / (1 + len(own))
    np.testing.assert_allclose(head.centres.numpy(), centres, rtol=1e-12)
    head.eval()
    head(features, labels)
    np.testing.assert_allclose(head.centres.numpy(), centres, rtol=1e-12)  # in evaluation they stay


def test_gradients_of_the_centre_loss(problem: tuple[torch.Tensor, ...]) -> None:
    features, weight, labels = problem
    head = CentreLoss(D, C, weight=0.5).double().eval()
    head.centres.copy_(weight)
    assert torch.autograd.gradcheck(lambda x: head(x, labels), (features.requires_grad_(),))
    # The batch's own features move the centres, but no gradient flows through that.
    (before,) = torch.autograd.grad(head(features, labels), features)
    (after,) = torch.autograd.grad(head.train()(features, labels), features)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("loss", "step", "iteration"), [("a-softmax", 1, 140), ("l-softmax", 1, 150), ("l-softmax", 200, 30_000)]
)
def test_annealing_is_the_authors_over_the_whole_training(loss: str, step: int, iteration: int) -> None:
    own = {"m": 2, "minimum": 0.0} if loss == "l-softmax" else {"m": 4}
    margin = arms.HEADS[loss](D, C, 200, **own).margin
    for _ in range(step - 1):
        margin.step()
    authors = max(5.0, 1000 / (1 + 0.12 * iteration)) if loss == "a-softmax" else 1000 * (1 + 2e-5 * iteration) ** -45.0
    assert margin.lambda_.item() == pytest.approx(authors, rel=1e-9)


def test_margin_without_feature_normalization_grows_to_its_end() -> None:
    head = arms.HEADS["am-softmax-no-fn"](D, C, 150, margin=0.4)
    values = []
    for _ in range(150):
        values.append(head.margin.margin.item())
        arms.step_margin(head)
    assert values[0] == 0 and values[20] == pytest.approx(0.2) and values[40] == values[-1] == pytest.approx(0.4)
    assert head.normalize_features is False
    arms.step_margin(SoftmaxLoss(D, C))  # has none to step


def test_normface_learns_its_scale() -> None:
    arm = arms.by_name(["normface"])[0]
    head = arms.make_head(arm, D, C, 10)
    assert isinstance(head.scale, torch.nn.Parameter) and head.margin == 0.0
    head(torch.randn(B, D), torch.arange(B) % C).backward()
    assert head.scale.grad != 0


def test_bfloat16_centres_are_updated_by_fused_sgd() -> None:
    float32, bfloat16 = arms.by_name(["am-softmax-0.35", "am-softmax-0.35-bfloat16"])
    assert (float32.learning_rate, float32.options) == (bfloat16.learning_rate, bfloat16.options)
    settings = training.SMALL
    network = training.embedding_network(settings)
    head = arms.make_head(bfloat16, settings.embedding_dim, C, settings.steps)
    of_network, of_head = training.optimizers(bfloat16, network, head, settings)
    assert head.weight.dtype == torch.bfloat16 and isinstance(of_head, FusedSGD)
    assert sum(len(group["params"]) for group in of_network.param_groups) == len(list(network.parameters()))
    (alone,) = training.optimizers(float32, network, arms.make_head(float32, settings.embedding_dim, C, 1), settings)
    for option in ("lr", "momentum", "weight_decay", "nesterov"):
        assert of_network.param_groups[0][option] == of_head.param_groups[0][option] == alone.param_groups[0][option]
