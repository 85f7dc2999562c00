"""The sharded head against one process on the whole batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import amsoftmax_kernels as ak
from amsoftmax_kernels.sharded.shards import local_part

from .cases import FLOAT32, FLOAT64, relative
from .ranks import Ranks, device


@dataclass
class Scenario:
    name: str
    C: int = 101
    D: int = 12
    sizes: tuple[int, ...] = (7, 7, 7)
    replicas: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    labels: str = "random"
    learned: bool = False
    per_class: bool = False
    norm: float = 1.0
    dtype: torch.dtype = torch.float64
    backend: str | None = None
    equal_batches: bool = False

    @property
    def subcentres(self) -> int:
        count: int = self.options.get("subcentres", 1)
        return count

    @property
    def tolerance(self) -> float:
        return FLOAT64 if self.dtype == torch.float64 else FLOAT32

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float | Tensor, float | Tensor]:
        """features, weight, labels and upstream gradient of all ranks' rows, scale and margin."""
        generator = torch.Generator().manual_seed(len(self.name))
        B, K = sum(self.sizes), self.subcentres
        weight = torch.randn(self.C * K, self.D, generator=generator, dtype=torch.float64)
        labels = torch.randint(self.C, (B,), generator=generator)
        if self.labels == "first shard":
            labels = labels % max(self.C // len(self.sizes), 1)
        if self.labels == "ignored":
            labels[::3] = -100
        features = torch.randn(B, self.D, generator=generator, dtype=torch.float64) * self.norm
        features[: B // 2] += weight[labels[: B // 2].clamp(0) * K] * self.norm  # some near their centres
        upstream = torch.randn(B, generator=generator, dtype=torch.float64)
        scale: float | Tensor = self.options.get("scale", 30.0)
        margin: float | Tensor = self.options.get("margin", 0.35)
        if self.learned:
            scale = torch.tensor(scale, dtype=torch.float64)
        if self.per_class:
            margin = torch.rand(self.C, generator=generator, dtype=torch.float64) * 0.5
        return (
            features.to(self.dtype), weight.to(self.dtype), labels, upstream.to(self.dtype), scale, margin
        )  # fmt: skip


class NormMargin(nn.Module):
    """A margin that uses the norm and has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, cosine: Tensor, labels: Tensor, feature_norm: Tensor) -> Tensor:
        return cosine - self.amount * (feature_norm / feature_norm.mean()).tanh()


SCENARIOS = [
    Scenario("plain"),
    Scenario("two ranks", sizes=(5, 5)),
    Scenario("equal batches promised", equal_batches=True),
    Scenario("uneven", sizes=(3, 11, 6)),
    Scenario("an empty batch", sizes=(4, 0, 9)),
    Scenario("no rows at all", sizes=(0, 0)),
    Scenario("a rank with no class", C=5, sizes=(4, 4, 4, 4)),
    Scenario("one class", C=1, sizes=(3, 2)),
    Scenario("one shard has all targets", labels="first shard"),
    Scenario("ignored rows", labels="ignored"),
    Scenario("learned scale", learned=True),
    Scenario("learned scale, a rank with no class", learned=True, C=5, sizes=(4, 4, 4, 4)),
    Scenario("margins per class", per_class=True),
    Scenario("scale 1000", options={"scale": 1000.0}),
    Scenario("scale 1000, a rank with no class", options={"scale": 1000.0}, C=5, sizes=(4, 4, 4, 4)),
    Scenario("without feature normalization", options={"normalize_features": False}, norm=8.0),
    Scenario("without feature normalization, long", options={"normalize_features": False}, norm=500.0),
    Scenario(
        "no normalization, a rank with no class", options={"normalize_features": False}, C=5, sizes=(4, 4, 4, 4), norm=8.0
    ),
    Scenario("margin of norm", options={"margin": NormMargin}),
    Scenario("margin of norm, no normalization", options={"margin": NormMargin, "normalize_features": False}, norm=4.0),
    Scenario("filter", options={"interclass_filter": 0.2}),
    Scenario("nothing kept", options={"save_bytes": 0}),
    Scenario("sub-centres", options={"subcentres": 3}),
    Scenario("sub-centres, a rank with no class", C=5, sizes=(4, 4, 4, 4), options={"subcentres": 2, "scale": 100.0}),
    Scenario("replicas, sub-centres", sizes=(3, 5, 2, 6), replicas=2, labels="ignored", options={"subcentres": 3}),
    Scenario("smoothing", learned=True, labels="ignored", options={"label_smoothing": 0.1}),
    Scenario("smoothing, a rank with no class", C=5, sizes=(4, 4, 0, 4), options={"label_smoothing": 0.2}),
    Scenario(
        "replicas, smoothing",
        sizes=(3, 5, 2, 6),
        replicas=2,
        norm=8.0,
        options={"label_smoothing": 0.1, "normalize_features": False},
    ),
    Scenario("sum", options={"reduction": "sum"}),
    Scenario("none", options={"reduction": "none"}, sizes=(3, 8, 1)),
    Scenario("replicas", sizes=(3, 5, 2, 6), replicas=2),
    Scenario("replicas, one of them empty", sizes=(3, 5, 0, 0), replicas=2),
    Scenario("replicas, learned scale", sizes=(3, 5, 2, 6), replicas=2, learned=True, labels="ignored"),
    Scenario("replicas, scale 1000", sizes=(3, 5, 2, 6), replicas=2, options={"scale": 1000.0}),
    Scenario("replicas, margin of norm", sizes=(3, 5, 2, 6), replicas=2, options={"margin": NormMargin}),
    Scenario("replicas, none", sizes=(3, 5, 2, 6), replicas=2, options={"reduction": "none"}),
    Scenario("float32", dtype=torch.float32),
    Scenario("triton", dtype=torch.float32, backend="triton"),
    Scenario("triton, scale 1000", dtype=torch.float32, backend="triton", options={"scale": 100.0}, sizes=(2, 7)),
    Scenario("triton, sub-centres", dtype=torch.float32, backend="triton", options={"subcentres": 3}, sizes=(2, 7)),
    Scenario("triton, nothing kept", dtype=torch.float32, backend="triton", options={"save_bytes": 0}, sizes=(2, 7)),
]


def of_rank(scenario: Scenario) -> slice:
    rank = dist.get_rank()
    start = sum(scenario.sizes[:rank])
    return slice(start, start + scenario.sizes[rank])


def make_head(scenario: Scenario, weight: Tensor, scale: Any, margin: Any, **more: Any) -> ak.ShardedAMSoftmaxLoss:
    options = {k: v for k, v in scenario.options.items() if k not in ("scale", "margin")}
    mesh = None
    if scenario.replicas > 1:
        mesh = init_device_mesh(device().type, (scenario.replicas, len(scenario.sizes) // scenario.replicas))
    head = ak.ShardedAMSoftmaxLoss(
        scenario.D, scenario.C, nn.Parameter(scale.clone()) if isinstance(scale, Tensor) else scale,
        nn.Parameter(margin.clone()) if isinstance(margin, Tensor) else margin,
        mesh=mesh, dtype=scenario.dtype, device=device(), backend=scenario.backend, equal_batches=scenario.equal_batches,
        **options, **more,
    )  # fmt: skip
    with torch.no_grad():
        local, K = local_part(head.weight), scenario.subcentres
        local.copy_(weight[head.shards.start * K : head.shards.stop * K].view(local.shape))
    return head.to(device())


def sharded_step(scenario: Scenario) -> dict[str, Any]:
    features, weight, labels, upstream, scale, margin = scenario.tensors()
    margin = margin() if isinstance(margin, type) else margin
    head = make_head(scenario, weight, scale, margin)
    mine = of_rank(scenario)
    x = features[mine].to(device()).requires_grad_()
    loss, predictions = head(x, labels[mine].to(device()), return_predictions=True)
    # What each rank makes of its own rows is averaged over ranks.
    total = (loss * upstream[mine].to(device())).sum() * len(scenario.sizes) if loss.dim() else loss * 1.5
    total.backward()
    result = {"loss": loss.detach(), "predictions": predictions, "features": x.grad / len(scenario.sizes)}
    K = scenario.subcentres
    result["weight"] = head.weight.grad.full_tensor().view(-1, scenario.D)
    assert isinstance(head.weight, DTensor)
    assert tuple(head.weight.shape) == (scenario.C, *([] if K == 1 else [K]), scenario.D)
    for name, parameter in head.named_parameters():
        if name != "weight":
            result[name] = parameter.grad
    return {name: tensor.cpu() for name, tensor in result.items()}


def whole_step(scenario: Scenario) -> dict[str, Tensor]:
    features, weight, labels, upstream, scale, margin = scenario.tensors()
    margin = margin() if isinstance(margin, type) else margin
    options = {k: v for k, v in scenario.options.items() if k not in ("scale", "margin", "save_bytes")}
    x, w = features.double().requires_grad_(), weight.double().requires_grad_()
    leaves = {"scale": scale, "margin": margin}
    leaves = {k: v.double().requires_grad_() for k, v in leaves.items() if isinstance(v, Tensor)}
    loss, predictions = ak.am_softmax_loss(
        x, w, labels, backend="reference", return_predictions=True,
        **{"scale": scale, "margin": margin, **leaves}, **options,
    )  # fmt: skip
    ((loss * upstream).sum() if loss.dim() else loss * 1.5).backward()
    if isinstance(margin, nn.Module):
        leaves["margin.amount"] = margin.amount
    return {"loss": loss.detach(), "predictions": predictions, "features": x.grad, "weight": w.grad,
            **{k: v.grad for k, v in leaves.items()}}  # fmt: skip


def assemble(scenario: Scenario, results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' results as one process's, once those that must be alike are seen to be."""
    together = {}
    for name in results[0]:
        parts = [each[name] for each in results]
        if name in ("features", "predictions") or (name == "loss" and parts[0].dim()):
            together[name] = torch.cat(parts)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
            together[name] = parts[0]
    return together


def assert_alike(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if name == "predictions":
            assert torch.equal(actual[name], value)
            continue
        error = relative(actual[name], value)
        # The exact gradient can be zero: one class.
        assert error <= tolerance or (value - actual[name]).abs().max() <= tolerance * 1e-3, f"{name}: {error}"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_equals_one_process(ranks: Ranks, scenario: Scenario) -> None:
    if scenario.backend == "triton" and (ranks.backend == "gloo") == torch.cuda.is_available():
        pytest.skip("Triton serves CPU tensors in its interpreter alone, which is for machines without a GPU")
    results = ranks.run(len(scenario.sizes), sharded_step, scenario)
    assert_alike(assemble(scenario, results), whole_step(scenario), scenario.tolerance)
