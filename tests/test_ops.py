"""The operators under torch.library's own checks, torch.compile, and more than one thread."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

import amsoftmax_kernels as ak
from amsoftmax_kernels import backends
from amsoftmax_kernels.margins import AnnealedAdditiveMargin

from .cases import CASES, CHUNK, relative

PLAIN = CASES[0]
backends.load("chunked")  # which registers its operators


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scale", "normalize", "interclass_filter", "predict"),
    [(30.0, True, math.inf, False), (100.0, True, 0.1, True), (30.0, False, 0.1, False), (30.0, True, 0.1, True)],
)
@pytest.mark.parametrize("save_bytes", [1 << 30, 0, CHUNK * PLAIN.B * 8])
def test_opcheck(
    dtype: torch.dtype,
    scale: float,
    normalize: bool,
    interclass_filter: float,
    predict: bool,
    save_bytes: int,
    small_chunks: None,
) -> None:
    features, weight, labels, upstream = PLAIN.tensors(dtype)
    labels[0], s = -1, torch.tensor(scale, dtype=torch.float64)
    problem = (features, weight, labels, s, 0.0, normalize, dtype, interclass_filter, 1)
    ops = torch.ops.amsoftmax_kernels
    out = ops.chunked_forward(*problem, save_bytes, predict)
    torch.library.opcheck(ops.chunked_forward, (*problem, save_bytes, predict))
    grad = upstream.to(out[0].dtype)
    grads = (
        grad / out[0].clamp(min=1e-3),
        grad,
        None if normalize else grad,
        torch.ones_like(features[0], dtype=grad.dtype),
    )
    for needs in itertools.product((True, False), repeat=3):
        torch.library.opcheck(
            ops.chunked_backward,
            (*problem, *out[1:7], *grads, *needs),
            test_utils="test_faketensor" if sum(needs) == 1 else ("test_schema", "test_faketensor"),
        )
    torch.library.opcheck(ops.chunked_backward, (*problem, *out[1:7], *grads, True, True, True))


def test_the_operators_alone_have_no_gradient() -> None:
    features, weight, labels, _ = PLAIN.tensors()
    scale = torch.tensor(30.0, dtype=torch.float64)
    z = torch.ops.amsoftmax_kernels.chunked_forward(
        features.clone().requires_grad_(), weight, labels, scale, 0.0, True, torch.float64, math.inf, 1, 1 << 30, False
    )[0]
    with pytest.raises(RuntimeError, match="differentiate through am_softmax_loss"):
        z.sum().backward()


def test_opcheck_labels() -> None:
    torch.library.opcheck(torch.ops.amsoftmax_kernels.canonical_labels, (torch.tensor([3, -100, 0]), 5, -100))


def compiled(module: nn.Module, dynamic: bool | None = None) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)


def learnt(head: nn.Module, features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    x = features.detach().requires_grad_()
    loss = head(x, labels)
    parameters = [each for each in head.parameters() if each.requires_grad]
    return (loss.detach(), *torch.autograd.grad(loss, (x, *parameters)))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_features": False},
        {"scale": 100.0, "reduction": "sum"},
        {"scale": nn.Parameter(torch.tensor(30.0))},
        {"margin": AnnealedAdditiveMargin()},
        {"save_bytes": 0},
        {"interclass_filter": 0.1},
    ],
    ids=["plain", "no-fn", "s100", "learned-scale", "annealed", "recomputed", "filtered"],
)
def test_compile_takes_the_whole_module(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    head = ak.AMSoftmaxLoss(PLAIN.D, PLAIN.C, backend=backend, dtype=dtype, **options)
    features, _, labels, _ = PLAIN.tensors(dtype)
    assert all(map(torch.equal, learnt(compiled(head), features, labels), learnt(head, features, labels)))


def test_compile_comes_first() -> None:
    """In a process that has not called the loss yet: the backend is not imported in what is traced."""
    program = """
import torch, amsoftmax_kernels as ak
head = torch.compile(ak.AMSoftmaxLoss(8, 50), fullgraph=True, backend="aot_eager")
x = torch.randn(6, 8, requires_grad=True)
head(x, torch.arange(6)).backward()
assert x.grad.any()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_compiled_step_makes_no_tensor_of_its_scale() -> None:
    """One on the CPU would keep ``torch.compile(mode="reduce-overhead")`` from capturing a CUDA graph."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    head = ak.AMSoftmaxLoss(PLAIN.D, PLAIN.C)
    features, _, labels, _ = PLAIN.tensors(torch.float32)
    torch._dynamo.reset()
    learnt(torch.compile(head, fullgraph=True, backend=aot_autograd(fw_compiler=compiler)), features, labels)
    assert len(graphs) == 2
    assert not {"scalar_tensor", "full", "_tensor_constant0"} & {
        str(node.target).split(".")[-2:][0] for graph in graphs for node in graph.graph.nodes if node.op != "placeholder"
    }
    small = [
        node for graph in graphs for node in graph.graph.nodes if node.op == "placeholder" and not node.meta["val"].dim()
    ]
    assert len(small) <= 2, small  # the number of rows, and the upstream gradient


@pytest.mark.parametrize("transform", ["grad", "jvp", "jacfwd", "vmap"])
def test_compiled_transforms_are_the_error_that_eager_gives(transform: str) -> None:
    features, weight, labels, _ = PLAIN.tensors(torch.float32)

    def loss(x: Tensor) -> Tensor:
        return ak.am_softmax_loss(x, weight, labels)

    def program(x: Tensor) -> Any:
        if transform == "jvp":
            return torch.func.jvp(loss, (x,), (x,))
        if transform == "vmap":
            return torch.func.vmap(loss)(x[None])
        return getattr(torch.func, transform)(loss)(x)

    torch._dynamo.reset()
    for call in (program, torch.compile(program, backend="aot_eager")):
        with pytest.raises(RuntimeError, match="backend='reference'"):
            call(features)


@pytest.mark.parametrize("option", ["scale", "margin"])
def test_a_tensor_that_changes_compiles_once(option: str) -> None:
    """As a number, each value is a constant of the graph."""
    head = ak.AMSoftmaxLoss(PLAIN.D, PLAIN.C, **{option: torch.tensor(0.25)})
    features, _, labels, _ = PLAIN.tensors(torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = torch.compile(head, fullgraph=True, backend=counter)
    losses = []
    for value in (0.25, 0.5, 0.75, 1.0):
        getattr(head, option).fill_(value)
        losses.append(module(features, labels))
        expected = ak.am_softmax_loss(features, head.weight, labels, **{option: value})
        assert relative(losses[-1].detach(), expected.detach()) < 1e-6
    assert counter.frame_count == 1 and len({loss.item() for loss in losses}) == 4


def test_compile_with_predictions() -> None:
    head = ak.AMSoftmaxLoss(PLAIN.D, PLAIN.C)
    features, _, labels, _ = PLAIN.tensors(torch.float32)
    torch._dynamo.reset()
    actual = torch.compile(head, fullgraph=True, backend="aot_eager")(features, labels, return_predictions=True)
    expected = head(features, labels, return_predictions=True)
    assert relative(actual[0], expected[0]) < 5e-6 and torch.equal(actual[1], expected[1])


def test_compile_with_autocast_and_changing_batches() -> None:
    head = ak.AMSoftmaxLoss(PLAIN.D, PLAIN.C)
    features, _, labels, _ = PLAIN.tensors(torch.float32)
    module = compiled(head, dynamic=True)
    for rows in (24, 17, 9):
        with torch.autocast("cpu", torch.bfloat16):
            expected = learnt(head, features[:rows], labels[:rows])
            actual = learnt(module, features[:rows], labels[:rows])
        assert max(map(relative, actual, expected)) < 1e-6


def test_compile_still_refuses_bad_labels() -> None:
    head = ak.AMSoftmaxLoss(PLAIN.D, PLAIN.C)
    features, _, labels, _ = PLAIN.tensors(torch.float32)
    module = compiled(head)
    module(features, labels)
    labels[5] = PLAIN.C
    with pytest.raises(ValueError, match=r"labels\[5\]"):
        module(features, labels)


def test_inductor(tmp_path: Any) -> None:
    """With the default compiler backend too, where there is a C++ compiler."""
    head = nn.Sequential(nn.Linear(PLAIN.D, PLAIN.D))
    loss = ak.AMSoftmaxLoss(PLAIN.D, PLAIN.C)
    features, _, labels, _ = PLAIN.tensors(torch.float32)

    def step(x: Tensor) -> Tensor:
        out: Tensor = loss(head(x), labels)
        return out

    torch._dynamo.reset()
    try:
        value = torch.compile(step, fullgraph=True)(features)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no working C++ compiler: {type(error).__name__}")
    value.backward()
    assert relative(value.detach(), step(features).detach()) < 1e-6 and loss.weight.grad is not None


def test_threads_do_not_disturb_each_other(small_chunks: None) -> None:
    inputs = [PLAIN.tensors(torch.float32, seed=seed)[:3] for seed in range(8)]

    def run(tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x = tensors[0].detach().requires_grad_()
        return torch.autograd.grad(ak.am_softmax_loss(x, *tensors[1:]), x)[0]

    expected = [run(each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(run, inputs * 4), expected * 4))
