"""The Triton backend's operators, alone, compiled whole, and replayed from CUDA graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import amsoftmax_kernels as ak
from amsoftmax_kernels.backends import Forward

from .cases import BY_NAME, CHUNK, Case, evaluate
from .triton_kernels import DEVICE, MARKS

pytestmark = MARKS
PLAIN = BY_NAME["plain"]


@pytest.mark.parametrize(
    ("normalize", "predict", "save_bytes"),
    [(True, True, 1 << 30), (True, True, CHUNK * PLAIN.B * 4), (True, True, 0), (False, False, 0)],
)
def test_opcheck(normalize: bool, predict: bool, save_bytes: int, short_chunks: None, large_tiles: None) -> None:
    features, weight, labels, upstream = (each.to(DEVICE) for each in PLAIN.tensors(torch.float32))
    problem = (features, weight, labels, None, 30.0, normalize, torch.float32, math.inf, 1)
    ops = torch.ops.amsoftmax_kernels
    for margin in (0.35, None):
        torch.library.opcheck(ops.triton_forward, (*problem, save_bytes, predict, True, margin, margin is not None))
    out = Forward(*ops.triton_forward(*problem, save_bytes, predict, True, None, False))
    saved = (out.shift, out.cosine, out.norm, out.inverse_norm, out.kept, out.rows)
    grad = upstream.float()
    grads = grad / out.z, grad, None if normalize else grad, features[0]
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(ops.triton_backward, (*problem, *saved, *grads, *needs))


def test_compile_takes_the_whole_module() -> None:
    head = ak.AMSoftmaxLoss(PLAIN.D, PLAIN.C, backend="triton", device=DEVICE)
    features, _, labels, _ = (each.to(DEVICE) for each in PLAIN.tensors(torch.float32))
    torch._dynamo.reset()
    results = []
    for module in (head, torch.compile(head, fullgraph=True, backend="aot_eager")):
        x = features.detach().requires_grad_()
        loss = module(x, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, head.weight))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("save_bytes", [None, 0], ids=["kept", "recomputed"])
def test_batches_of_any_size_share_a_compiled_graph(save_bytes: int | None) -> None:
    """Larger than D too, from where on chunks depend on them; labels of another dtype come back as int64."""
    head = ak.AMSoftmaxLoss(16, 40, backend="triton", device=DEVICE, save_bytes=save_bytes)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head, fullgraph=True, backend=counter)
    for B in (20, 24, 28, 36, 44):
        x, labels = torch.randn(B, 16, device=DEVICE), torch.arange(B, dtype=torch.int32, device=DEVICE) % 40
        found, expected = (
            (loss, *torch.autograd.grad(loss, head.weight), predictions)
            for loss, predictions in (module(x, labels, return_predictions=True) for module in (compiled, head))
        )
        assert all(map(torch.equal, found, expected)) and found[-1].dtype == torch.int64
    assert counter.frame_count <= 2


# Given as functions of the device: scales and margins that lie there.
ON_THE_GPU: dict[str, Any] = {
    "plain": dict,
    "device-scale": lambda: {"scale": torch.tensor(30.0, device="cuda", requires_grad=True)},
    "no-fn": lambda: {"normalize_features": False},
    "recomputed": lambda: {"save_bytes": 0},
    "filter": lambda: {"interclass_filter": 0.2},
    "predictions": lambda: {"return_predictions": True, "scale": 200.0},
    "margin-a-class": lambda: {"margin": torch.linspace(0, 0.5, 5000, device="cuda")},
    "margin-object": lambda: {"margin": ak.margins.AnnealedAdditiveMargin(0.1).cuda()},
}


def loss_alone(*tensors: Tensor, **options: Any) -> Tensor:
    out = ak.am_softmax_loss(*tensors, **options)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", list(ON_THE_GPU))
def test_a_cuda_graph_replays_the_step(option: str, dtype: torch.dtype) -> None:
    case, options = Case("", "", B=256, C=5000, D=512), ON_THE_GPU[option]()
    features, weight, labels, _ = (each.cuda() for each in case.tensors(dtype))
    x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = loss_alone(x, w, labels, **options)
        return (loss.detach(), *torch.autograd.grad(loss, (x, w)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for each in captured:
            each.zero_()
        graph.replay()
        assert all(map(torch.equal, captured, expected))


@pytest.mark.gpu
def test_nothing_synchronizes() -> None:
    tensors = [each.cuda() for each in Case("", "", B=256, C=5000, D=512).tensors(torch.float32)]
    for make in ON_THE_GPU.values():
        options = make()
        evaluate(loss_alone, *tensors, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            evaluate(loss_alone, *tensors, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
