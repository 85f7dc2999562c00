"""Sub-centres: the formula, both heads, their optimizers and checkpoints. The backends against the reference: CASES."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import amsoftmax_kernels as ak
from amsoftmax_kernels import backends, margins
from amsoftmax_kernels.backends import Traits
from amsoftmax_kernels.optim import FusedAdamW, FusedSGD
from amsoftmax_kernels.sharded.shards import whole

from .cases import FLOAT64, relative
from .ranks import Ranks, device
from .updated import two_steps_apart

K, C, D, B = 3, 40, 12, 24


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Features, ``[C·K, D]`` centres with a class of zeros, and labels, of which some are ignored and some are twice."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype) for n in (B, C * K))
    labels = torch.randint(C, (B,), generator=generator)
    labels[1], labels[4] = labels[0], -100
    weight[5 * K : 6 * K] = 0
    return x, weight, labels


def by_hand(x: Tensor, weight: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """Row by row and class by class, as in Deng et al. 2020, equation 3, with AM-Softmax's margin."""
    rows = []
    for b, y in enumerate(labels.tolist()):
        cosines = []
        for j in range(C):
            centres = [weight[j * K + k] for k in range(K)]
            of_class = [x[b] @ w / (x[b].norm() * w.norm()) if w.any() else w.new_zeros(()) for w in centres]
            cosines.append(torch.stack(of_class).max())
        logits = scale * torch.stack(cosines)
        if y < 0:
            rows.append(logits.new_zeros(()))
            continue
        logits = logits - scale * margin * torch.eye(C, dtype=logits.dtype)[y]
        rows.append(logits.logsumexp(0) - logits[y])
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_formula_and_its_gradient(backend: str, small_chunks: None) -> None:
    x, weight, labels = problem()
    results = []
    for loss in (
        lambda x, w: by_hand(x, w, labels, 20.0, 0.3),
        lambda x, w: ak.am_softmax_loss(
            x, w, labels, scale=20.0, margin=0.3, subcentres=K, reduction="none", backend=backend
        ),
    ):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        rows = loss(*leaves)
        (rows * torch.arange(1, B + 1)).sum().backward()
        grad = leaves[1].grad
        grad[5 * K : 6 * K] = 0  # by hand it is NaN: a zero row has no direction
        results.append((rows.detach(), leaves[0].grad, grad))
    for ours, exact in zip(results[1], results[0], strict=True):
        assert relative(ours, exact) < FLOAT64


def test_the_first_of_equal_centres_counts() -> None:
    """Not twice in the denominator, and not half a gradient each."""
    x, weight, labels = problem()
    twice = weight.unflatten(0, (C, K))[:, :1].expand(C, K, D).reshape(-1, D).clone().requires_grad_()
    once = weight[::K].clone().requires_grad_()
    losses = [ak.am_softmax_loss(x, w, labels, subcentres=k, backend="reference") for w, k in ((twice, K), (once, 1))]
    losses[0].backward()
    losses[1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    of_first = twice.grad.unflatten(0, (C, K))
    assert relative(of_first.sum(1), once.grad) < 1e-12 and not of_first[:, 1:][5].any()


def test_one_subcentre_is_the_loss_as_ever() -> None:
    x, weight, labels = problem()
    plain = ak.am_softmax_loss(x, weight, labels)
    assert torch.equal(ak.am_softmax_loss(x, weight, labels, subcentres=1), plain)


MARGINS = {
    "a margin a class": torch.linspace(0.1, 0.5, C, dtype=torch.float64),
    "angular": margins.AngularMargin(0.4),
    "of the norm": margins.MagFaceMargin(),
}


@pytest.mark.parametrize("name", list(MARGINS))
def test_any_margin(name: str, small_chunks: None) -> None:
    x, weight, labels = problem()
    results = []
    for backend in ("reference", "chunked"):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, predictions = ak.am_softmax_loss(
            *leaves, labels, margin=MARGINS[name], subcentres=K, return_predictions=True, backend=backend
        )
        loss.backward()
        results.append((loss.detach(), leaves[0].grad, leaves[1].grad, predictions))
    for ours, exact in zip(results[1][:3], results[0][:3], strict=True):
        assert relative(ours, exact) < FLOAT64
    asked = labels >= 0
    assert torch.equal(results[1][3][asked], results[0][3][asked]) and results[0][3].max() < C


def test_the_head(small_chunks: None) -> None:
    x, weight, labels = problem()
    head = ak.AMSoftmaxLoss(D, C, subcentres=K, dtype=torch.float64)
    assert tuple(head.weight.shape) == (C * K, D) and "subcentres=3" in repr(head)
    head.set_centres(weight)
    loss, predictions = head(x, labels, return_predictions=True)
    assert relative(loss.detach(), by_hand(x, weight, labels, 30.0, 0.35).sum() / (labels >= 0).sum()) < FLOAT64
    cosines = head.cosine(x).detach()
    assert tuple(cosines.shape) == (B, C)
    expected = torch.where(labels < 0, -1, cosines.argmax(1))
    assert torch.equal(predictions, torch.where(labels < 0, predictions, expected))
    with pytest.raises(ValueError, match=r"centres must have shape \[C·K, D\] = \[120, 12\], but it has \[40, 12\]"):
        head.set_centres(weight[:C])


def test_wrong_arguments() -> None:
    x, weight, labels = problem()
    with pytest.raises(ValueError, match=r"weight must have shape \[C·K, D\] with K = subcentres = 7, but it has \[120"):
        ak.am_softmax_loss(x, weight, labels, subcentres=7)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 40\)"):
        ak.am_softmax_loss(x, weight, labels + C, subcentres=K)
    with pytest.raises(ValueError, match="margin must have shape"):
        ak.am_softmax_loss(x, weight, labels, margin=torch.zeros(C * K), subcentres=K)
    for wrong, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        for call in (
            lambda: ak.am_softmax_loss(x, weight, labels, subcentres=wrong),  # noqa: B023
            lambda: ak.AMSoftmaxLoss(D, C, subcentres=wrong),  # noqa: B023
            lambda: ak.reference.am_softmax_loss(x, weight, labels, subcentres=wrong),  # noqa: B023
        ):
            with pytest.raises(error, match="subcentres must be"):
                call()


def test_kernels_serve_eight() -> None:
    for name, count in itertools.product(("triton", "cuda"), (8, 9)):
        traits = Traits(torch.device("cpu"), *(torch.float32,) * 3, 16, True, True, False, False, count)
        reason = backends._refused(name, traits) or ""
        assert ("up to 8 sub-centres" in reason) == (count == 9)
    x, weight, labels = problem()
    assert ak.am_softmax_loss(x, weight[:90], labels % 10, subcentres=9).isfinite()  # which chunked serves


def test_a_compiled_step() -> None:
    x, weight, labels = problem(dtype=torch.float32)
    grads = []
    loss = lambda x, w: ak.am_softmax_loss(x, w, labels, subcentres=K)  # noqa: E731
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        function(*leaves).backward()
        grads.append([each.grad for each in leaves])
    assert all(relative(a, b) < 1e-5 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("make", [FusedSGD, FusedAdamW])
def test_the_optimizers(make: Any, fused_backend: str, small_chunks: None, short_chunks: None) -> None:
    """By chunked in float64 and by kernels in float32."""
    for backend, dtype, tolerance in (("chunked", torch.float64, 1e-12), (fused_backend, torch.float32, 2e-5)):
        assert two_steps_apart(make, problem(dtype=dtype), C, subcentres=K, backend=backend) < tolerance, backend


def clustered(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, and samples of which each class has most at its last centre."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(C * K, D, generator=generator)
    labels = torch.arange(C).repeat(5)
    place = torch.tensor([K - 1, K - 1, K - 1, 0, 1]).repeat_interleave(C)
    return centres, centres[labels * K + place] + 0.01 * torch.randn(5 * C, D, generator=generator), labels


def test_sizes_and_what_is_left_of_them() -> None:
    centres, x, labels = clustered()
    head = ak.AMSoftmaxLoss(D, C, subcentres=K)
    head.set_centres(centres)
    labels = torch.cat([labels, torch.tensor([-100, -100])])
    batches = list(zip(torch.cat([x, x[:2]]).split(30), labels.split(30), strict=True))
    sizes = head.subcentre_sizes(batches)
    assert sizes.tolist() == [[1, 1, 3]] * C
    with pytest.raises(ValueError, match=r"sizes must have shape \[C, K\] = \[40, 3\], but it has \[40, 2\]"):
        head.keep_largest_subcentres(sizes[:, :2])
    with pytest.raises(TypeError, match="sizes must be an integer Tensor"):
        head.keep_largest_subcentres(sizes.float())
    with pytest.raises(ValueError, match="labels must lie"):
        head.subcentre_sizes([(x, torch.full((len(x),), C))])
    head.keep_largest_subcentres(sizes)
    assert head.subcentres == 1 and torch.equal(head.weight, centres[K - 1 :: K]) and head.weight.requires_grad
    assert head(x, labels[:-2], return_predictions=True)[1].shape == (5 * C,)


def test_insightfaces_files_have_one_centre_a_class(tmp_path: Path) -> None:
    head = ak.AMSoftmaxLoss(D, C, subcentres=K)
    for call in (ak.insightface.save_centres, ak.insightface.load_centres):
        with pytest.raises(
            ValueError, match="head must have one centre a class, as these files have, but it has subcentres=3"
        ):
            call(head, tmp_path)


def test_resizing_keeps_whole_classes() -> None:
    labels = problem()[2]
    head = ak.AMSoftmaxLoss(D, C, subcentres=K)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head(torch.randn(B, D), labels).backward()
    optimizer.step()
    before = head.weight.detach().clone().unflatten(0, (C, K))
    momentum = optimizer.state[head.weight]["momentum_buffer"].unflatten(0, (C, K))
    keep = torch.tensor([7, 0, 31])
    ak.resize_classes(head, 5, keep=keep, optimizer=optimizer)
    assert tuple(head.weight.shape) == (5 * K, D)
    assert torch.equal(head.weight.detach()[: 3 * K], before[keep].flatten(0, 1))
    after = optimizer.state[head.weight]["momentum_buffer"]
    assert torch.equal(after[: 3 * K], momentum[keep].flatten(0, 1)) and not after[3 * K :].any()


@pytest.mark.parametrize("place", range(K))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_centre_that_is_no_number_is_seen(place: int, value: float, fused_backend: str, small_chunks: None) -> None:
    """By rows of its class and by all others, wherever it stands among its class's."""
    x, weight, labels = problem(dtype=torch.float32)
    weight[place] = value
    own = torch.zeros_like(labels)
    for backend, classes in itertools.product(("reference", "chunked", fused_backend), (own, labels.clamp(min=1))):
        rows = ak.am_softmax_loss(x, weight, classes, subcentres=K, reduction="none", backend=backend)
        assert rows.isnan().all(), (backend, rows)


def test_centres_with_a_class_a_row() -> None:
    weight = problem(dtype=torch.float32)[1]
    head = ak.AMSoftmaxLoss(D, C, subcentres=K)
    head.set_centres(weight.view(C, K, D))
    assert torch.equal(head.weight, weight)
    for shape in ((C // 2, K * 2, D), (C * K, 1, D), (K, C, D)):  # of another K: nothing is loaded
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            head.load_state_dict({"weight": torch.zeros(shape)})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        ak.AMSoftmaxLoss(D, C * K).load_state_dict({"weight": torch.zeros(C, K, D)})
    assert torch.equal(head.weight, weight)


# Over ranks. C·K is no multiple of 3·K: ranks hold whole classes all the same.


def on_ranks(folder: str) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    made = {"subcentres": K, "seed": 1, "device": device()}
    head = ak.ShardedAMSoftmaxLoss(D, C, **made)
    first = whole(head.weight).detach().flatten(0, 1)
    centres, x, labels = (each.to(device()) for each in clustered())
    head.set_centres(centres)
    mine = slice(rank, None, world)
    sizes = head.subcentre_sizes([(x[mine], labels[mine]), (x[:0], labels[:0])])
    cosines = head.cosine(x[:4]).detach()
    optimizer = FusedSGD(head, lr=0.1, momentum=0.9)
    head(x[mine], labels[mine]).backward()
    optimizer.step()
    stepped = whole(head.weight).detach().flatten(0, 1)
    dcp.save({"head": head.state_dict()}, checkpoint_id=folder)
    whole_head = ak.ShardedAMSoftmaxLoss(D, C, **made)
    whole_head.load_state_dict({"weight": stepped})  # as one process saves it
    alike = torch.equal(whole(whole_head.weight), whole(head.weight))
    ak.resize_classes(whole_head, C + 2)
    resized = whole(whole_head.weight).detach().flatten(0, 1)
    head.keep_largest_subcentres(sizes)
    kept = whole(head.weight).detach()
    return {"first": first, "sizes": sizes, "cosines": cosines, "stepped": stepped, "alike": alike, "resized": resized,
            "kept": kept}  # fmt: skip


def test_sharded(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(3, on_ranks, str(tmp_path))
    centres, x, labels = clustered()
    head = ak.ShardedAMSoftmaxLoss(D, C, subcentres=K, seed=1)  # in one process
    assert tuple(head.weight.shape) == (C * K, D)
    assert torch.equal(torch.cat([each["sizes"] for each in results]), torch.tensor([[1, 1, 3]] * C))
    for each in results:
        assert torch.equal(each["first"].cpu(), head.weight) and each["alike"]
        assert torch.equal(each["resized"][: C * K], each["stepped"])
        assert torch.equal(each["kept"], each["stepped"][K - 1 :: K])
    head.set_centres(centres)
    assert relative(results[0]["cosines"].cpu(), head.cosine(x[:4]).detach()) < 1e-6
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head(x, labels).backward()
    optimizer.step()
    assert relative(results[0]["stepped"].cpu() - centres, head.weight.detach() - centres) < 1e-5
    # From three ranks into one process, by dcp and by a state_dict.
    target = {"head": {"weight": torch.zeros(C, K, D)}}
    dcp.load(target, checkpoint_id=str(tmp_path))
    loaded = ak.AMSoftmaxLoss(D, C, subcentres=K)
    loaded.load_state_dict(target["head"])
    assert torch.equal(loaded.weight.detach(), results[0]["stepped"].cpu())


@pytest.mark.parametrize("corrected", [False, True])
def test_sampled_classes_bring_all_their_centres(corrected: bool) -> None:
    x, _, labels = problem()
    options: dict[str, Any] = {"subcentres": K, "dtype": torch.float64, "seed": 2}
    head = ak.ShardedAMSoftmaxLoss(D, C, sample_rate=0.7, sampling_correction=corrected, **options)
    fused = copy.deepcopy(head)
    optimizer = FusedSGD(fused, lr=0.1)
    head(x, labels).backward()
    grad = head.weight.grad.unflatten(0, (C, K))
    drawn = grad.flatten(1).any(1)
    assert B < int(drawn.sum()) < C
    fused(x, labels).backward()
    optimizer.step()
    moved = (head.weight - fused.weight).detach()
    assert relative(moved, 0.1 * head.weight.grad) < 1e-12
    if corrected:
        return
    # The loss is that of a head of the drawn classes alone.
    classes = drawn.nonzero()[:, 0]
    number = torch.full((C,), -1)
    number[classes] = torch.arange(len(classes))
    of_drawn = head.weight.detach().unflatten(0, (C, K))[classes].flatten(0, 1)
    expected = ak.am_softmax_loss(x, of_drawn, torch.where(labels < 0, labels, number[labels.clamp(0)]), subcentres=K)
    head.get_buffer("sampling_state")[1] = 0
    assert head(x, labels).item() == pytest.approx(expected.item(), rel=1e-12)


def sizes_of_few_classes() -> Tensor:
    head = ak.ShardedAMSoftmaxLoss(D, 4, subcentres=K, seed=1, device=device())
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(dist.get_rank())).to(device())
    sizes = head.subcentre_sizes([(x, torch.arange(6, device=x.device) % 4)] * 2)
    head.keep_largest_subcentres(sizes)
    assert head(x, torch.arange(6, device=x.device) % 4).isfinite()
    return sizes


def test_ranks_without_a_class_count_none(ranks: Ranks) -> None:
    sizes = ranks.run(3, sizes_of_few_classes)
    assert [len(each) for each in sizes] == [2, 2, 0] and int(torch.cat(sizes).sum()) == 3 * 2 * 6


def load_other_shapes() -> list[str]:
    """What is said of whole centres that have as many numbers and another shape."""
    head = ak.ShardedAMSoftmaxLoss(D, C, subcentres=K, seed=1, device=device())
    before, said = head.weight.to_local().clone(), []
    for shape in ((C * K * 2, D // 2), (C, D, K), (K, C, D)):
        with pytest.raises((RuntimeError, AssertionError, ValueError)) as error:
            head.load_state_dict({"weight": torch.zeros(shape)})
        said.append(str(error.value))
    assert torch.equal(head.weight.to_local(), before)
    return said


def test_a_state_dict_of_another_shape_is_refused(ranks: Ranks) -> None:
    for said in ranks.run(2, load_other_shapes):
        assert all("weight" in each for each in said)
    plain = ak.AMSoftmaxLoss(D, C, subcentres=K)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        plain.load_state_dict({"weight": torch.zeros(C, D)})
    plain.load_state_dict({"weight": torch.zeros(C, K, D)})
    assert not plain.weight.any()
