"""CUDA graphs: what a graph replays has the same bits as what is launched one by one; and what each takes.

On a CPU, for the tests, a graph is the function itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import amsoftmax_kernels as ak

from .. import measure
from ..loss.peers import problem
from ..measure import first_line
from .checks import compared_backends, given, not_compiled, release, step_name, take_step

Row = dict[str, Any]
# What a captured step may be given beside sizes.
CAPTURED: tuple[tuple[int, int, int, dict[str, Any]], ...] = (
    (256, 512, 10_516, {}),
    (256, 512, 10_516, {"scale": 200.0, "interclass_filter": 0.2}),
    (256, 512, 10_516, {"normalize_features": False, "return_predictions": True}),
    (256, 512, 10_516, {"scale": "on the device", "margin": "one a class"}),
    (1024, 512, 93_431, {}),
)
HEAD = (256, 512, 10_516)
GRAPHED, REDUCED, TRAINED = "make_graphed_callables", "torch.compile, reduce-overhead", "captured training step"
SECONDS = 0.5  # of timing a way


def graphs(device: torch.device, captured: Any = CAPTURED, head: tuple[int, int, int] = HEAD) -> Iterator[Row]:
    """Both passes captured, with every option; then the three ways that the documentation names."""
    for B, D, C, options in captured:
        for name in compared_backends(device):
            for save_bytes in (1 << 62, 0):
                row = {"backend": name, "B": B, "D": D, "C": C, "kept": save_bytes > 0, **options}
                refused = not_compiled.get(step_name(name, D, "bfloat16", options))
                if refused is not None:
                    yield row | {"ok": None, "skipped": f"does not compile: {refused}"}
                    continue
                try:
                    row |= _passes(name, B, D, C, options, save_bytes, device)
                except Exception as error:  # the others' rows are wanted all the same
                    row |= {"ok": False, "error": first_line(error)}
                yield row
        release(device)
    B, D, C = head
    for name in compared_backends(device):
        for way, of in ((GRAPHED, _graphed), (REDUCED, _reduced), (TRAINED, _trained)):
            row = {"backend": name, "way": way, "B": B, "D": D, "C": C}
            refused = not_compiled.get(f"{name} {way}")
            if refused is not None:
                yield row | {"ok": None, "skipped": f"does not compile: {refused}"}
                continue
            try:
                row |= of(name, B, D, C, device)
            except Exception as error:
                row |= {"ok": False, "error": first_line(error)}
            yield row
            release(device)


def capture(
    function: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[Callable[[], Any], tuple[Tensor, ...]]:
    """A graph's replay and the tensors that it writes, after three calls on another stream, as capturing wants."""
    if device.type != "cuda":
        for _ in range(3):
            function()
        results = tuple(each.detach().clone() for each in function())
        return lambda: [old.copy_(new.detach()) for old, new in zip(results, function(), strict=True)], results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results


def _autocast(device: torch.device) -> torch.autocast:
    """A graph must not hold what autocast has cached."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def _passes(name: str, B: int, D: int, C: int, options: Row, save_bytes: int, device: torch.device) -> Row:
    tensors, how = problem(B, D, C, device), given(options, C, device)

    def both() -> tuple[Tensor, ...]:
        with _autocast(device):
            return take_step(*tensors, name, save_bytes, how)

    expected = both()
    replay, results = capture(both, device)
    for each in results:
        each.fill_(float("nan"))
    replay()
    return {"ok": all(map(torch.equal, results, expected)), **_times({"launched": both, "graph": replay}, device)}


def _times(ways: dict[str, Callable[[], Any]], device: torch.device) -> Row:
    return {f"{name}_s": each.median for name, each in measure.interleaved(ways, device, SECONDS).items()}


class Head:
    """A head with its inputs: ways to take its step, each a function that returns loss and gradients."""

    def __init__(self, backend: str, B: int, D: int, C: int, device: torch.device) -> None:
        self.device = device
        self.features, weight, self.labels = problem(B, D, C, device)
        self.module = ak.AMSoftmaxLoss(D, C, backend=backend, device=device)
        with torch.no_grad():
            self.module.weight.copy_(weight)

    def launched(self) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: self._step(self.module, self.module.weight)

    def graphed(self) -> Callable[[], tuple[Tensor, ...]]:
        module = copy.deepcopy(self.module)  # which is changed
        call: Any = module
        if self.device.type == "cuda":
            with _autocast(self.device):
                call = torch.cuda.make_graphed_callables(module, (self.features.detach().requires_grad_(), self.labels))
        return lambda: self._step(call, module.weight)

    def reduced(self) -> Callable[[], tuple[Tensor, ...]]:
        if self.device.type != "cuda":
            compiled: Any = torch.compile(self.module, fullgraph=True, backend="eager")
        else:
            compiled = torch.compile(self.module, fullgraph=True, mode="reduce-overhead")

        def step() -> tuple[Tensor, ...]:
            torch.compiler.cudagraph_mark_step_begin()
            return tuple(each.clone() for each in self._step(compiled, self.module.weight))  # the next step overwrites them

        return step

    def _step(self, module: Callable[..., Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        self.features.grad = weight.grad = None
        with _autocast(self.device):
            loss = module(self.features, self.labels)
        loss.backward()
        assert self.features.grad is not None and weight.grad is not None
        return loss.detach(), self.features.grad, weight.grad


def _graphed(name: str, B: int, D: int, C: int, device: torch.device) -> Row:
    head = Head(name, B, D, C, device)
    return _compared({"launched": head.launched(), "graph": head.graphed()}, device)


def _reduced(name: str, B: int, D: int, C: int, device: torch.device) -> Row:
    torch._dynamo.reset()
    head, counters = Head(name, B, D, C, device), torch._dynamo.utils.counters["inductor"]
    before = counters["cudagraph_skips"]
    row = _compared({"launched": head.launched(), "graph": head.reduced()}, device, warm_ups=4)
    # PyTorch leaves out the graph where it finds a reason, and only logs it.
    return row | {"graphs_left_out": counters["cudagraph_skips"] - before}


def _compared(ways: dict[str, Callable[[], tuple[Tensor, ...]]], device: torch.device, warm_ups: int = 1) -> Row:
    results = []
    for way in ways.values():
        for _ in range(warm_ups):
            way()
        results.append([each.clone() for each in way()])
    return {"ok": all(map(torch.equal, *results)), **_times(ways, device)}


class Training:
    """A backbone, a head and an optimizer on one batch that stays in its place."""

    def __init__(self, backbone: nn.Module, backend: str, D: int, C: int, inputs: Tensor) -> None:
        self.backbone, self.inputs, device = backbone, inputs, inputs.device
        self.head = ak.AMSoftmaxLoss(D, C, backend=backend, device=device)
        self.labels = torch.arange(len(inputs), device=device) % C
        self.parameters = [*backbone.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.01, momentum=0.9)

    def launched(self) -> tuple[Tensor, ...]:
        """One step; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with _autocast(self.inputs.device):
            loss = self.head(self.backbone(self.inputs), self.labels)
        loss.backward()
        self.optimizer.step()
        return (loss.detach(),)

    def captured(self) -> Callable[[], tuple[Tensor, ...]]:
        """The same as a graph, after the three steps that capturing takes."""
        if self.inputs.device.type != "cuda":
            for _ in range(3):
                self.launched()
            return self.launched
        replay, results = capture(self.launched, self.inputs.device)

        def step() -> tuple[Tensor, ...]:
            replay()
            return results

        return step


def _trained(name: str, B: int, D: int, C: int, device: torch.device) -> Row:
    trainings = []
    for _ in range(2):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(64, 256), nn.PReLU(), nn.Linear(256, D)).to(device)
        trainings.append(Training(backbone, name, D, C, torch.randn(B, 64, device=device)))
    launched, replayed = trainings
    replay = replayed.captured()
    for _ in range(3):
        launched.launched()
    for _ in range(3):
        launched.launched()
        replay()
    same = all(map(torch.equal, launched.parameters, replayed.parameters))
    return {"ok": same, **_times({"launched": launched.launched, "graph": replay}, device)}
