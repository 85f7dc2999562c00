"""The margins that ship, each against its formula written out here, in value and gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

import amsoftmax_kernels as ak
from amsoftmax_kernels.margins import (
    AdaFaceMargin,
    AdditiveMargin,
    AngularMargin,
    CombinedMargin,
    ElasticMargin,
    MagFaceMargin,
    SphereFaceMargin,
)
from amsoftmax_kernels.sharded.shards import local_part

from .cases import FLOAT64, Case, relative
from .ranks import Ranks

Formula = Callable[[Tensor, Tensor], Tensor]  # cosine [B], feature norm [B] -> ψ [B]
CASE = Case("", "", own=0.6)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The heads' centres are alike in each run."""
    torch.manual_seed(0)


def linear(m: float) -> Formula:
    return lambda t, a: torch.where(t.arccos() + m > math.pi, t - m * math.sin(m), (t.arccos() + m).cos())


def straight_through(formula: Formula) -> Formula:
    return lambda t, a: t + (formula(t, a) - t).detach()


def sphereface(m: int, lambda_: float) -> Formula:
    def formula(t: Tensor, a: Tensor) -> Tensor:
        theta = t.arccos()
        k = (theta * m / math.pi).floor().detach()
        return (lambda_ * t + (-1) ** k * (m * theta).cos() - 2 * k) / (1 + lambda_)

    return formula


def adaface(t: Tensor, a: Tensor) -> Tensor:
    """With the running means after one batch, from 20 and 100, by a hundredth."""
    norm = a.detach().clamp(0.001, 100)
    mean, deviation = 0.99 * 20 + 0.01 * norm.mean(), 0.99 * 100 + 0.01 * norm.std()
    quality = ((norm - mean) / (deviation + 0.001) * 0.333).clamp(-1, 1)
    angle = (t.clamp(-0.999, 0.999).arccos() - 0.4 * quality).clamp(0.001, math.pi - 0.001)
    return angle.cos() - (0.4 + 0.4 * quality)


def magface(t: Tensor, a: Tensor) -> Tensor:
    return (t.arccos() + 0.45 + 0.35 * (a.clamp(10, 110) - 10) / 100).cos()


def easy(formula: Formula) -> Formula:
    return lambda t, a: torch.where(t > 0, formula(t, a), t)


def elastic(kind: str) -> Formula:
    twin = ElasticMargin(0.3, 0.1, "additive")

    def formula(t: Tensor, a: Tensor) -> Tensor:
        twin.calls.zero_()
        margin = -twin(torch.zeros_like(t), torch.zeros(len(t)), a)
        return t - margin if kind == "additive" else (t.arccos() + margin).cos()

    return formula


def arcface(t: Tensor, a: Tensor) -> Tensor:
    return (t.arccos() + 0.5).cos()


MARGINS: list[tuple[str, Callable[[], nn.Module], Formula]] = [
    ("only above", lambda: AdditiveMargin(0.35, only_above=True), lambda t, a: torch.where(t > 0.35, t - 0.35, t)),
    ("arcface", AngularMargin, arcface),
    ("arcface, linear", lambda: AngularMargin(1.2, beyond="linear"), linear(1.2)),
    ("arcface, easy", lambda: AngularMargin(beyond="easy"), easy(arcface)),
    ("arcface, straight", lambda: AngularMargin(gradient="straight_through"), straight_through(arcface)),
    ("combined", lambda: CombinedMargin(0.9, 0.4, 0.15), lambda t, a: (0.9 * t.arccos() + 0.4).cos() - 0.15),
    (
        "combined, straight, linear",
        lambda: CombinedMargin(1.0, 0.3, 0.2, beyond="linear", gradient="straight_through"),
        straight_through(lambda t, a: linear(0.3)(t, a) - 0.2),
    ),
    ("sphereface 2", lambda: SphereFaceMargin(2), sphereface(2, 1000 / 1.12)),
    ("sphereface 3", lambda: SphereFaceMargin(3, base=0, minimum=0), sphereface(3, 0)),
    ("sphereface 4", lambda: SphereFaceMargin(4, base=0), sphereface(4, 5)),
    ("adaface", AdaFaceMargin, adaface),
    ("magface", MagFaceMargin, magface),
    ("magface, easy", lambda: MagFaceMargin(beyond="easy"), easy(magface)),
    ("elastic", lambda: ElasticMargin(0.3, 0.1), elastic("angular")),
    ("elastic, additive", lambda: ElasticMargin(0.3, 0.1, "additive"), elastic("additive")),
]
every_margin = pytest.mark.parametrize("make, formula", [each[1:] for each in MARGINS], ids=[each[0] for each in MARGINS])


def rows(B: int = 201) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines over (-1, 1), labels, and norms within MagFace's bounds and out of them."""
    cosine = torch.linspace(-0.995, 0.995, B, dtype=torch.float64).requires_grad_()
    norm = torch.linspace(3, 130, B, dtype=torch.float64)[torch.randperm(B, generator=torch.Generator().manual_seed(0))]
    return cosine, torch.arange(B), norm.requires_grad_()


@every_margin
def test_value_and_gradient_are_the_formulas(make: Callable[[], nn.Module], formula: Formula) -> None:
    cosine, labels, norm = rows()
    results = []
    for psi in (make()(cosine, labels, norm), formula(cosine, norm)):
        gradients = torch.autograd.grad(psi.square().sum(), (cosine, norm), materialize_grads=True, allow_unused=True)
        results.append((psi.detach(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert (results[0][1] != 0).float().mean() > 0.9


@every_margin
def test_gradcheck(make: Callable[[], nn.Module], formula: Formula) -> None:
    margin = make()
    if getattr(margin, "gradient", "exact") != "exact":
        pytest.skip("its gradient is not the formula's, by definition")
    margin.eval()  # alike in each call
    cosine, labels, norm = rows(12)
    if not isinstance(margin, MagFaceMargin):
        norm = norm.detach()
    assert torch.autograd.gradcheck(lambda *inputs: margin(inputs[0], labels, inputs[1]), (cosine, norm))


@every_margin
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_at_one_and_past_it(make: Callable[[], nn.Module], formula: Formula, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).eps
    cosine = torch.tensor([1, -1, 1 - tiny, tiny - 1, 1 + 2 * tiny, -1 - 2 * tiny, 0], dtype=dtype, requires_grad=True)
    norm = torch.linspace(5, 60, 7, dtype=dtype).requires_grad_()
    psi = make()(cosine, torch.arange(7), norm)
    expected = formula(cosine.detach().clamp(-1, 1), norm.detach())
    torch.testing.assert_close(psi.detach(), expected, rtol=0, atol=1e3 * tiny if dtype == torch.float64 else 1e-5)
    gradients = torch.autograd.grad(psi.sum(), (cosine, norm), materialize_grads=True, allow_unused=True)
    assert all(gradient.isfinite().all() and gradient.abs().max() < 5e3 for gradient in gradients)


@every_margin
@pytest.mark.parametrize("normalize_features", [True, False])
@pytest.mark.usefixtures("small_chunks")
def test_in_the_loss(make: Callable[[], nn.Module], formula: Formula, normalize_features: bool) -> None:
    """Against logits written out with the margin applied in their place; an ignored row among them counts nowhere."""
    features, weight, labels, _ = CASE.tensors()
    features, keep = features * 5, torch.arange(CASE.B) != 3
    ignoring = torch.where(keep, labels, -100)
    x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = ak.am_softmax_loss(x, w, ignoring, margin=make(), normalize_features=normalize_features)
    ours = (loss.detach(), *torch.autograd.grad(loss, (x, w)))

    x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
    cosine, norm, each = normalize(x) @ normalize(w).T, x.norm(dim=1), torch.arange(CASE.B)
    psi = cosine[each, labels]
    # AdaFace's statistics are of the rows that count; Elastic draws for all.
    counted = keep if isinstance(make(), AdaFaceMargin) else torch.ones_like(keep)
    logits = cosine.index_put((each[counted], labels[counted]), formula(psi[counted], norm[counted]))
    scale = 30 if normalize_features else norm[:, None]
    loss = cross_entropy((scale * logits)[keep], labels[keep])
    theirs = (loss.detach(), *torch.autograd.grad(loss, (x, w)))
    assert max(map(relative, ours, theirs)) < FLOAT64


def learnt(head: nn.Module, features: Tensor, labels: Tensor, steps: int = 2) -> list[Tensor]:
    """Losses and gradients of some steps in which nothing changes but the margin."""
    results = []
    for _ in range(steps):
        x = features.detach().requires_grad_()
        loss = head(x, labels)
        results += [loss.detach(), *torch.autograd.grad(loss, (x, head.weight))]
        if hasattr(head.margin, "step"):
            head.margin.step()
    return results


STATEFUL = [SphereFaceMargin, AdaFaceMargin, ElasticMargin]
FEW = pytest.mark.parametrize("make", [AngularMargin, MagFaceMargin, *STATEFUL], ids=lambda make: make.__name__)


@FEW
def test_compiled_whole(make: Callable[[], nn.Module]) -> None:
    head = ak.AMSoftmaxLoss(CASE.D, CASE.C, margin=make())
    features, _, labels, _ = CASE.tensors(torch.float32)
    features, twin = features * 10, copy.deepcopy(head)
    expected = learnt(twin, features, labels)
    torch._dynamo.reset()
    module = torch.compile(head, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, learnt(module, features, labels), expected))
    assert all(map(torch.equal, head.state_dict().values(), twin.state_dict().values()))


@FEW
def test_under_autocast_the_margin_is_computed_in_float32(make: Callable[[], nn.Module]) -> None:
    head = ak.AMSoftmaxLoss(CASE.D, CASE.C, margin=make())
    seen: list[torch.dtype] = []
    head.margin.register_forward_hook(lambda module, inputs, psi: seen.append(psi.dtype))
    features, _, labels, _ = CASE.tensors(torch.float32)
    expected = learnt(copy.deepcopy(head), features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        results = learnt(head, features, labels)
    assert set(seen) == {torch.float32}
    assert all(relative(ours, theirs) < 0.02 for ours, theirs in zip(results, expected, strict=True))  # bfloat16: 0.4 %


@pytest.mark.parametrize("make", STATEFUL, ids=lambda make: make.__name__)
def test_goes_on_from_its_state(make: Callable[[], nn.Module]) -> None:
    head = ak.AMSoftmaxLoss(CASE.D, CASE.C, margin=make(), dtype=torch.float64)
    features, _, labels, _ = CASE.tensors()
    first = learnt(head, features, labels, 3)
    assert not torch.equal(first[0], first[3]) and not torch.equal(first[3], first[6])
    other = ak.AMSoftmaxLoss(CASE.D, CASE.C, margin=make(), dtype=torch.float64)
    other.load_state_dict(head.state_dict())
    assert all(map(torch.equal, learnt(other, features, labels), learnt(head, features, labels)))


@pytest.mark.parametrize("make", [AdaFaceMargin, ElasticMargin], ids=lambda make: make.__name__)
def test_a_recomputed_call_does_not_count(make: Callable[[], nn.Module]) -> None:
    head = ak.AMSoftmaxLoss(CASE.D, CASE.C, margin=make(), dtype=torch.float64)
    features, _, labels, _ = CASE.tensors()
    results = []
    for checkpointed in (True, False):
        module, x = copy.deepcopy(head), features.clone().requires_grad_()
        loss = checkpoint(module, x, labels, use_reentrant=False) if checkpointed else module(x, labels)
        loss.backward()
        results.append((x.grad, module.weight.grad, *module.margin.buffers()))
    assert all(map(torch.equal, *results))


def shard_steps(make: Callable[[], nn.Module], sizes: tuple[int, ...]) -> tuple[list[Tensor], dict[str, Tensor], list[int]]:
    """A rank's losses and gradients, and the margin's state, over its own rows of the batch."""
    head = ak.ShardedAMSoftmaxLoss(CASE.D, CASE.C, margin=make(), dtype=torch.float64)
    features, weight, labels, _ = CASE.tensors()
    head.set_centres(weight)
    labels[5] = -100
    rank = torch.distributed.get_rank()
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    results = []
    for _ in range(3):
        x = features[mine].clone().requires_grad_()
        loss = head(x, labels[mine])
        grads = torch.autograd.grad(loss, (x, head.weight))
        results += [loss.detach(), grads[0] / len(sizes), local_part(grads[1])]
        if hasattr(head.margin, "step"):
            head.margin.step()
    return results, dict(head.margin.state_dict()), [mine.start, mine.stop, head.shards.start, head.shards.stop]


@FEW
def test_on_two_ranks(ranks: Ranks, make: Callable[[], nn.Module]) -> None:
    """Losses, gradients and the margin's state are those of one process on the whole batch, on every rank."""
    head = ak.AMSoftmaxLoss(CASE.D, CASE.C, margin=make(), dtype=torch.float64)
    features, weight, labels, _ = CASE.tensors()
    head.set_centres(weight)
    labels[5] = -100
    expected = learnt(head, features, labels, 3)
    for results, state, (start, stop, first, last) in ranks.run(2, shard_steps, make, (CASE.B - 7, 7)):
        for step in range(3):
            loss, by_x, by_weight = expected[3 * step : 3 * step + 3]
            theirs = (loss, by_x[start:stop], by_weight[first:last])
            assert max(map(relative, results[3 * step : 3 * step + 3], theirs)) < FLOAT64
        assert all(torch.allclose(state[name], value, rtol=1e-7) for name, value in head.margin.state_dict().items())


def test_opcheck() -> None:
    state = torch.tensor([20.0], dtype=torch.float64), torch.tensor([100.0], dtype=torch.float64)
    means = torch.rand(5), torch.tensor([True, True, False, True, True]), *state, 0.25
    torch.library.opcheck(torch.ops.amsoftmax_kernels.running_means, means)
    torch.library.opcheck(torch.ops.amsoftmax_kernels.normal_draws, (torch.rand(5), torch.tensor(3), torch.tensor(1)))


@pytest.mark.gpu
@FEW
def test_its_state_is_where_the_head_is(make: Callable[[], nn.Module]) -> None:
    head = ak.AMSoftmaxLoss(CASE.D, CASE.C, margin=make(), device="cuda")
    features, _, labels, _ = CASE.tensors(torch.float32)
    assert all(buffer.is_cuda for buffer in head.margin.buffers())
    on_cpu = copy.deepcopy(head).cpu()
    expected = learnt(on_cpu, features, labels)
    results = learnt(head, features.cuda(), labels.cuda())
    assert all(relative(ours.cpu(), theirs) < 1e-4 for ours, theirs in zip(results, expected, strict=True))


def test_adaface_counts_what_it_should() -> None:
    margin = AdaFaceMargin(t_alpha=0.5)

    def call(*norms: float) -> tuple[float, float]:
        norm = torch.tensor(norms)
        margin(torch.full_like(norm, 0.5), torch.ones(len(norm), dtype=torch.int64), norm)
        return margin.mean.item(), margin.deviation.item()

    assert call() == (20, 100)  # an empty batch
    assert call(10.0) == (15, 100)  # one row has no deviation
    assert call(math.nan, 25.0) == (20, 100)
    assert call(10.0, 30.0) == pytest.approx((20, 50 + math.sqrt(200) / 2))
    margin.half().eval()
    assert margin.mean.dtype == torch.float64
    assert call(50.0, 60.0) == pytest.approx((20, 50 + math.sqrt(200) / 2), rel=1e-3)  # not in evaluation


def test_elastic_draws_are_normal_and_its_own() -> None:
    B = 20_000
    zeros, labels, ones = torch.zeros(B), torch.zeros(B, dtype=torch.int64), torch.ones(B)
    margin = ElasticMargin(0.35, 0.05, "additive")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = -margin(zeros, labels, ones), -margin(zeros, labels, ones)
    assert torch.equal(torch.get_rng_state(), before)
    for draws in (first, second):
        assert draws.mean().item() == pytest.approx(0.35, abs=4 * 0.05 / B**0.5)
        assert draws.std().item() == pytest.approx(0.05, rel=4 / (2 * B) ** 0.5)
        within = ((draws - 0.35).abs() < 0.05).double().mean().item()
        assert within == pytest.approx(math.erf(0.5**0.5), abs=4 * (0.22 / B) ** 0.5)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 4 / B**0.5
    other = ElasticMargin(0.35, 0.05, "additive", seed=1)
    assert not torch.equal(-other(zeros, labels, ones), first)
    assert torch.equal(margin.eval()(zeros, labels, ones), torch.full((B,), -0.35))


def test_sphereface_anneals_as_its_authors_do() -> None:
    margin = SphereFaceMargin()
    for step in range(1, 50):
        assert margin.lambda_.item() == pytest.approx(max(5, 1000 / (1 + 0.12 * step)))
        margin.step()
    margin.steps.fill_(1_000_000)
    assert margin.lambda_.item() == 5


@pytest.mark.parametrize("m1, m2", [(1.0, 0.5), (1.3, 0.4), (2.0, 0.0)])
def test_linear_beyond_pi_never_rises(m1: float, m2: float) -> None:
    theta = torch.linspace(0, math.pi, 1001, dtype=torch.float64)
    psi = CombinedMargin(m1, m2, 0.1, beyond="linear")(theta.cos(), theta, theta)
    assert psi.diff().max() <= 1e-12


def test_magfaces_regularizer() -> None:
    margin = MagFaceMargin(lambda_g=20)
    features = (torch.randn(8, 4, dtype=torch.float64) * torch.tensor([[1.0], [20.0]]).repeat(4, 1)).requires_grad_()
    ours = margin.regularizer(features)
    norm = features.norm(dim=1).clamp(10, 110)
    theirs = 20 * (norm / 110**2 + 1 / norm).mean()
    results = [(each.detach(), *torch.autograd.grad(each, features)) for each in (ours, theirs)]
    assert max(map(relative, *results)) < 1e-14 and results[0][1].any()
    half = margin.regularizer(features.detach().bfloat16())
    assert half.dtype == torch.float32 and relative(half.double(), theirs.detach()) < 0.01


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: AngularMargin(28.6), ValueError, "margin must be an angle .* in radians .* but it is 28.6"),
        (lambda: AngularMargin("0.5"), TypeError, "margin must be a float"),
        (lambda: AngularMargin(beyond="hard"), ValueError, "beyond must be one of 'cos', 'linear', 'easy'"),
        (lambda: AngularMargin(gradient="none"), ValueError, "gradient must be one of"),
        (lambda: CombinedMargin(0, 0.5, 0.0), ValueError, "m1 must be positive"),
        (lambda: CombinedMargin(1, 0.5, 30.0), ValueError, "m3 is taken off a cosine"),
        (lambda: SphereFaceMargin(5), ValueError, "m must be one of 2, 3, 4"),
        (lambda: SphereFaceMargin(4, gamma=-1), ValueError, "gamma must be at least 0"),
        (lambda: AdaFaceMargin(t_alpha=1.5), ValueError, "t_alpha must be in"),
        (lambda: MagFaceMargin(20, 10), ValueError, "upper must be finite and larger than lower"),
        (lambda: ElasticMargin(kind="arc"), ValueError, "kind must be one of"),
        (lambda: ElasticMargin(seed=-1), ValueError, "seed must be in"),
        (lambda: AdditiveMargin(0.35, only_above=1), TypeError, "only_above must be a bool"),  # type: ignore[arg-type]
    ],
)
def test_arguments(make: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
