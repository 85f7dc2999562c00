from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import amsoftmax_kernels as ak
from amsoftmax_kernels.margins import AnnealedAdditiveMargin

from .cases import relative
from .reduced_loss import curved


def test_it_trains_and_equals_the_function() -> None:
    torch.manual_seed(0)
    backbone, head = nn.Linear(20, 16), ak.AMSoftmaxLoss(16, 50, scale=16.0, margin=0.2)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.2, momentum=0.9)
    labels = torch.arange(50).repeat(4)
    inputs = torch.randn(50, 20)[labels] + 0.1 * torch.randn(200, 20)
    first = head(backbone(inputs), labels)
    assert torch.equal(first, ak.am_softmax_loss(backbone(inputs), head.weight, labels, scale=16.0, margin=0.2))
    for _ in range(60):
        loss = head(backbone(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < first / 5
    assert (head.cosine(backbone(inputs)).argmax(1) == labels).float().mean() > 0.95


def test_cosine() -> None:
    head = ak.AMSoftmaxLoss(4, 3)
    features = torch.randn(5, 4)
    expected = torch.cosine_similarity(features[:, None], head.weight[None], dim=2)
    assert relative(head.cosine(features), expected) < 1e-6
    assert head.cosine(features.bfloat16()).dtype == torch.float32


def test_centres_start_isotropic_with_norms_near_one() -> None:
    torch.manual_seed(0)
    norms = ak.AMSoftmaxLoss(512, 1000).weight.norm(dim=1)
    assert abs(norms.mean().item() - 1) < 0.01 and norms.std() < 0.05


def test_centres_of_a_given_spread() -> None:
    for make in (ak.AMSoftmaxLoss, ak.ShardedAMSoftmaxLoss):
        head = make(64, 1000, std=0.01)
        first = head.weight.detach().clone()
        assert abs(first.std().item() / 0.01 - 1) < 0.02
        head.reset_parameters()
        assert not torch.equal(first, head.weight) and abs(head.weight.std().item() / 0.01 - 1) < 0.02
    for wrong in (0.0, -1.0, float("inf"), float("nan"), "0.1", True):
        with pytest.raises(ValueError, match="std"):
            ak.AMSoftmaxLoss(64, 1000, std=wrong)  # type: ignore[arg-type]


def test_centres_are_drawn_alike_from_a_seed() -> None:
    def drawn(times: int) -> torch.Tensor:
        head = ak.ShardedAMSoftmaxLoss(8, 50, seed=7)
        for _ in range(times):
            head.reset_parameters()
        return head.weight.detach()

    assert torch.equal(drawn(0), drawn(0)) and torch.equal(drawn(2), drawn(2)) and not torch.equal(drawn(1), drawn(2))


def test_set_centres() -> None:
    centres = torch.randn(50, 8, dtype=torch.float64)
    for make in (ak.AMSoftmaxLoss, ak.ShardedAMSoftmaxLoss):
        head = make(8, 50)
        weight = head.weight
        head.set_centres(centres)
        assert head.weight is weight and torch.equal(weight, centres.float())
        with pytest.raises(ValueError, match=r"centres must have shape \[C, D\] = \[50, 8\]"):
            head.set_centres(centres[:8])
        with pytest.raises(TypeError, match="centres"):
            head.set_centres(centres.long())


def test_device_and_dtype_are_passed_on() -> None:
    head = ak.AMSoftmaxLoss(8, 10, dtype=torch.bfloat16, device="meta")
    assert head.weight.dtype == torch.bfloat16 and head.weight.device.type == "meta"


def test_tensors_are_buffers_and_parameters_are_learned() -> None:
    margin = torch.linspace(0, 0.4, 10)
    head = ak.AMSoftmaxLoss(8, 10, scale=nn.Parameter(torch.tensor(30.0)), margin=margin)
    assert {name for name, _ in head.named_parameters()} == {"weight", "scale"}
    assert {name for name, _ in head.named_buffers()} == {"margin"}
    margin.zero_()  # the caller's tensor is not the head's
    assert head.get_buffer("margin")[-1] == 0.4
    assert head.double()(torch.randn(2, 8).double(), torch.tensor([1, 2])).dtype == torch.float64


def test_it_can_be_copied_pickled_and_saved() -> None:
    head = ak.AMSoftmaxLoss(8, 10, scale=20.0, margin=0.1, save_bytes=0)
    features, labels = torch.randn(3, 8), torch.tensor([1, 2, 3])
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    loaded = ak.AMSoftmaxLoss(8, 10, scale=20.0, margin=0.1)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), loaded):
        assert torch.equal(other(features, labels), head(features, labels))


def test_repr_says_what_it_is() -> None:
    text = repr(ak.AMSoftmaxLoss(8, 10, margin=0.4, normalize_features=False))
    assert text == "AMSoftmaxLoss(embedding_dim=8, num_classes=10, margin=0.4, normalize_features=False)"
    learned = ak.AMSoftmaxLoss(8, 10, torch.nn.Parameter(torch.tensor(20.0)), torch.rand(10))
    assert "scale=Parameter[], margin=Tensor[10]" in repr(learned)
    assert "margin=curved" in repr(ak.AMSoftmaxLoss(8, 10, margin=curved))
    assert "(margin): AnnealedAdditiveMargin" in repr(ak.AMSoftmaxLoss(8, 10, margin=AnnealedAdditiveMargin(0.0, 0.4, 0.1)))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_reduction(reduction: str) -> None:
    head = ak.AMSoftmaxLoss(8, 10, reduction=reduction)
    rows = head(torch.randn(3, 8), torch.tensor([1, 2, 3]))
    assert rows.shape == ((3,) if reduction == "none" else ())


def test_a_plain_tensor_that_requires_grad_is_refused() -> None:
    for name in ("scale", "margin"):
        with pytest.raises(ValueError, match=f"{name} must be an nn.Parameter"):
            ak.AMSoftmaxLoss(8, 10, **{name: torch.tensor(0.3, requires_grad=True)})


def test_bad_dtype_and_features() -> None:
    with pytest.raises(TypeError, match="dtype"):
        ak.AMSoftmaxLoss(8, 10, dtype=torch.complex64)
    head = ak.AMSoftmaxLoss(8, 10)
    with pytest.raises(ValueError, match=r"features.* 7 and 8$"):
        head.cosine(torch.randn(5, 7))
    with pytest.raises(ValueError, match=r"logits \[B, C\].*; if not, embedding_dim and num_classes are swapped"):
        head(torch.randn(5, 10), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeError, match="features"):
        head.cosine(torch.ones(5, 8, dtype=torch.int64))


@pytest.mark.parametrize("margin", [0.35, torch.linspace(0.1, 0.5, 12)], ids=["constant", "per class"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_call(margin: Any, reentrant: bool) -> None:
    """Under torch.utils.checkpoint, which hands out saved tensors once."""
    torch.manual_seed(0)
    head, x, labels = ak.AMSoftmaxLoss(8, 12, margin=margin), torch.randn(5, 8, requires_grad=True), torch.arange(5)
    expected = torch.autograd.grad(head(x, labels), [x, head.weight])
    torch.utils.checkpoint.checkpoint(head, x, labels, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(head.weight.grad, expected[1])
    if not reentrant:  # which PyTorch does not let differentiate again
        loss = torch.utils.checkpoint.checkpoint(head, x, labels, use_reentrant=False)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        assert torch.equal(grad, expected[0])
        with pytest.raises(RuntimeError, match="differentiated once"):
            grad.sum().backward()
