"""What only a GPU can decide, timed side by side: in turns, in one process, each way's result compared with the first's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from amsoftmax_kernels.backends import Problem, load
from amsoftmax_kernels.backends.chunking import padded

from .. import measure
from ..loss.peers import problem
from ..measure import first_line
from . import smoke
from .checks import compared_backends, relative_error, release, take_step
from .graphs import Training

Row = dict[str, Any]
Ways = dict[str, Callable[[], Any]]
CHUNKS = ((256, 512, 10_496), (1024, 512, 131_072), (4096, 512, 32_768))  # (B, D, C) of one chunk of classes
STEPS = ((256, 512, 10_516), (1024, 512, 93_431), (1024, 512, 1_000_000))
BACKBONE = (128, 512, 93_431, 112)  # B, D, C, and pixels of an image's side
SLICES = 8  # of C, in the batched product
SECONDS = 0.5  # a way
SAME = 1e-2  # relative: operands are bfloat16, and each way sums in an order of its own


def undecided(
    device: torch.device, chunks: Any = CHUNKS, steps: Any = STEPS, backbone: Any = BACKBONE, make: Any = None
) -> Iterator[Row]:
    """One row a question and shape. ``make`` gives another backbone than a ResNet-50."""
    for B, D, C in chunks:
        yield _row("E·ŵ", (B, D, C), functools.partial(_products, B, D, C, device), device)
    for B, D, C in chunks:
        for name in compared_backends(device):
            if name in smoke.WITHOUT:
                ways = functools.partial(_gradients, name, B, D, C, device)
                yield _row(f"{name}: centres' gradient", (B, D, C), ways, device)
    fused = [name for name in compared_backends(device) if name != "chunked"]
    for B, D, C in steps:
        for save_bytes, kept in ((1 << 62, "kept"), (0, "recomputed")):
            if len(fused) > 1:
                ways = functools.partial(_steps, fused, (B, D, C), save_bytes, device)
                yield _row(f"Triton or C++, E {kept}", (B, D, C), ways, device)
    B, D, C, pixels = backbone
    for name in compared_backends(device):
        training = functools.partial(_under_a_backbone, name, B, D, C, pixels, device, make or resnet50)
        yield _row(f"{name}: a graph under a ResNet-50", (B, D, C), training, device, queued=False)


def _row(
    question: str, shape: tuple[int, int, int], make: Callable[[], Ways], device: torch.device, queued: bool = True
) -> Row:
    row: Row = {"question": question, **dict(zip("BDC", shape, strict=True))}
    try:
        ways = make()
        if len(ways) < 2:
            return row | {"ok": None, "skipped": "there is one way only here"}
        results = [way() for way in ways.values()]
        errors = [max(relative_error(*pair) for pair in zip(each, results[0], strict=True)) for each in results[1:]]
        del results
        times = {name: each.median for name, each in measure.interleaved(ways, device, SECONDS, queued).items()}
        row |= {"ok": max(errors) < SAME, "error": max(errors), "seconds": times}
    except Exception as error:  # the others' rows are wanted all the same
        row |= {"ok": False, "error": first_line(error)}
    release(device)
    return row


def _products(B: int, D: int, C: int, device: torch.device) -> Ways:
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    wide: dict[str, Any] = {"out_dtype": torch.float32} if device.type == "cuda" else {}
    C = -(-C // (16 * SLICES)) * 16 * SLICES
    terms, w_hat = torch.rand(B, C, device=device).to(half), torch.randn(C, D, device=device).to(half)
    slices = terms.unflatten(1, (SLICES, -1)).transpose(0, 1), w_hat.unflatten(0, (SLICES, -1))
    return {
        "mm": lambda: (torch.mm(terms, w_hat, **wide),),
        f"bmm of {SLICES}, sum": lambda: (torch.bmm(*slices, **wide).sum(0),),
    }


def _gradients(name: str, B: int, D: int, C: int, device: torch.device) -> Ways:
    """One kernel against a library's product and the pass after it."""
    backend: Any = load(name)
    features, weight, labels = (each.detach() for each in problem(B, D, C, device))
    given = Problem(features, weight, labels, None, 30.0, True, torch.bfloat16, float("inf"))
    terms, x_factored = torch.rand(B, padded(C), device=device).bfloat16(), features.bfloat16()
    inverse, width = 1 / weight.norm(dim=1), x_factored.shape[1]
    assert width == padded(D), "this D takes columns beside it"

    def at_once(grad: Tensor) -> tuple[Tensor]:
        backend.fused._grad_centres(given, inverse, None, grad, range(C), terms, x_factored)
        return (grad,)

    def apart(grad: Tensor) -> tuple[Tensor]:
        with smoke.without_gradient(name):
            return at_once(grad)

    ways: Ways = {"product and pass": functools.partial(apart, torch.empty_like(weight))}
    if backend.fused.kernels.grad_centres(terms, x_factored, weight, inverse, torch.empty_like(weight)):
        ways["one kernel"] = functools.partial(at_once, torch.empty_like(weight))
    return ways


def _steps(names: list[str], shape: tuple[int, int, int], save_bytes: int, device: torch.device) -> Ways:
    tensors = problem(*shape, device)

    def one(name: str) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return take_step(*tensors, name, save_bytes, {})

    return {name: functools.partial(one, name) for name in names}


def _under_a_backbone(
    name: str, B: int, D: int, C: int, pixels: int, device: torch.device, make: Callable[[int], nn.Module]
) -> Ways:
    """Whole training steps in bfloat16; both ways have taken as many when their losses are compared."""
    ways: Ways = {}
    for how in ("launched", "graph"):
        torch.manual_seed(0)
        network = make(D).to(device)
        training = Training(network, name, D, C, torch.randn(B, 3, pixels, pixels, device=device))
        if how == "launched":
            for _ in range(3):
                training.launched()
        ways[how] = training.launched if how == "launched" else training.captured()
    return ways


def resnet50(D: int) -> nn.Module:
    """torchvision's if it is installed, else the same layers: bottlenecks of 3, 4, 6 and 3, He et al. 2016."""
    if importlib.util.find_spec("torchvision"):
        network: nn.Module = importlib.import_module("torchvision.models").resnet50(num_classes=D)
        return network
    layers: list[nn.Module] = [*_normalized(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers.append(_Bottleneck(channels, width, 2 if block == 0 and width > 64 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, D))


def _normalized(channels: int, out: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out)]


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_normalized(channels, width, 1), nn.ReLU(inplace=True),
            *_normalized(width, width, 3, stride), nn.ReLU(inplace=True), *_normalized(width, 4 * width, 1),
        )  # fmt: skip
        same = stride == 1 and channels == 4 * width
        self.beside = nn.Identity() if same else nn.Sequential(*_normalized(channels, 4 * width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.beside(x))
