"""The network of the face benchmark and its training: everything is the same for every arm but what the arm names."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from amsoftmax_kernels import AMSoftmaxLoss
from amsoftmax_kernels.optim import FusedSGD

from .arms import Arm, make_head, step_margin
from .data import FaceSet


@dataclass(frozen=True)
class Settings:
    """What all arms share; those of an arm are in arms.py."""

    height: int = 56
    width: int = 46
    channels: tuple[int, ...] = (16, 32, 64, 128)
    embedding_dim: int = 128
    dropout: float = 0.5
    steps: int = 200
    batch_size: int = 50
    warmup_share: float = 0.1
    momentum: float = 0.9
    max_shift: float = 0.06
    max_rotation_degrees: float = 6.0
    max_zoom: float = 0.06
    max_contrast: float = 0.2
    max_brightness: float = 0.2


SMALL = Settings(height=28, width=23, channels=(12, 24, 48))  # those of `bench faces`: a run is some 3 s of one core


def embedding_network(settings: Settings) -> nn.Sequential:
    """Convolution blocks, each halving the image, then one linear layer to the embedding."""
    layers: list[nn.Module] = []
    inputs, rows, columns = 1, settings.height, settings.width
    for outputs in settings.channels:
        layers += [
            nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.PReLU(outputs),  # rises with its input, so the pooling may come first: a quarter of the pixels
        ]
        inputs, rows, columns = outputs, (rows + 1) // 2, (columns + 1) // 2
    layers += [
        nn.Flatten(),
        nn.Linear(inputs * rows * columns, settings.embedding_dim, bias=False),
        nn.BatchNorm1d(settings.embedding_dim),
        nn.Dropout(settings.dropout),
    ]
    network = nn.Sequential(*layers)
    # Convolutions on a CPU then take two thirds of the time.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def to_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as float, each shifted and scaled to mean 0 and standard deviation 1."""
    pixels = images.to(torch.float32)
    deviation, mean = torch.std_mean(pixels, dim=(1, 2, 3), keepdim=True)
    return (pixels - mean) / (deviation + 1e-3)


def augment(images: torch.Tensor, settings: Settings, generator: torch.Generator) -> torch.Tensor:
    """Mirror, rotate, zoom, shift, and change the contrast and brightness of each image at random."""
    count = len(images)

    def spread(limit: float, *shape: int) -> torch.Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * limit

    angle, zoom = spread(math.radians(settings.max_rotation_degrees)), 1 + spread(settings.max_zoom)
    shift = 2 * spread(settings.max_shift, 2)  # a share of the image's size; grid coordinates span 2
    mirror = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
    # Grid coordinates run from -1 to 1 on both axes, so a rotation must undo the image's aspect ratio.
    aspect = settings.height / settings.width
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack(
        [
            torch.stack([cosine * mirror, -sine * aspect, shift[:, 0]], dim=1),
            torch.stack([sine / aspect * mirror, cosine, shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast = 1 + spread(settings.max_contrast, 1, 1, 1)
    return moved * contrast + spread(settings.max_brightness, 1, 1, 1)


@dataclass(frozen=True)
class Trained:
    """A trained network and the mean loss of its last tenth of steps."""

    network: nn.Sequential
    train_loss: float
    seconds: float


def optimizers(arm: Arm, network: nn.Module, head: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """SGD with Nesterov's momentum; for bfloat16 centres a FusedSGD of their own, which rounds them stochastically."""
    options: dict[str, Any] = {"momentum": settings.momentum, "weight_decay": arm.weight_decay, "nesterov": True}
    if arm.centres == "bfloat16":
        assert isinstance(head, AMSoftmaxLoss)
        return [
            torch.optim.SGD(network.parameters(), lr=arm.learning_rate, **options),
            FusedSGD(head, lr=arm.learning_rate, **options),
        ]
    return [torch.optim.SGD([*network.parameters(), *head.parameters()], lr=arm.learning_rate, **options)]


def rate_factor(step: int, settings: Settings) -> float:
    """The share of the learning rate in this step: a linear warm-up, then half a cosine down to 0."""
    warmup = max(1, round(settings.steps * settings.warmup_share))
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))


def batches(num_images: int, settings: Settings, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices of each step's images: epochs run on into each other, so that every batch is full."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < settings.batch_size:
            order = torch.cat([order, torch.randperm(num_images, generator=generator)])
        yield order[: settings.batch_size]
        order = order[settings.batch_size :]


def train(
    faces: FaceSet, arm: Arm, seed: int, settings: Settings, report: Callable[[int], None] = lambda step: None
) -> Trained:
    """Train from scratch; the seed alone fixes the weights at the start, the batches and the augmentation."""
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The network comes before the head: it starts from the same weights for every arm.
        network = embedding_network(settings)
        head = make_head(arm, settings.embedding_dim, len(faces.people), settings.steps)
        torch.manual_seed(seed + 1)  # for dropout: the heads may have drawn different amounts
        generator = torch.Generator().manual_seed(seed)  # for the data alone: the same stream for every arm
        used = optimizers(arm, network, head, settings)
        inputs, labels = to_input(faces.images), faces.labels
        losses: list[float] = []
        network.train()
        for step, batch in zip(range(settings.steps), batches(len(inputs), settings, generator), strict=False):
            for optimizer in used:
                optimizer.param_groups[0]["lr"] = arm.learning_rate * rate_factor(step, settings)
                optimizer.zero_grad(set_to_none=True)
            value = head(network(augment(inputs[batch], settings, generator)), labels[batch])
            value.backward()
            for optimizer in used:
                optimizer.step()
            step_margin(head)
            losses.append(float(value.detach()))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"{arm.name} seed {seed}: the loss is {losses[-1]} at step {step}")
            report(step + 1)
    network.eval()
    tail = losses[-max(1, settings.steps // 10) :]
    return Trained(network, sum(tail) / len(tail), time.perf_counter() - start)


@torch.no_grad()
def embed(network: nn.Sequential, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """Embeddings [N, D]: the sum of those of each image and of its mirror image."""
    parts = []
    for chunk in torch.split(images, batch_size):
        inputs = to_input(chunk)
        parts.append(network(inputs) + network(inputs.flip(3)))
    return torch.cat(parts)
