"""The network of the face benchmark and its training: everything is the same for every loss but the loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from amsoftmax_kernels import AMSoftmaxLoss

from .data import FaceSet

LOSSES = ("softmax", "norm-softmax", "am-softmax")


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters, shared by all losses; chosen on seeds 100 to 105, which are not reported."""

    height: int = 56
    width: int = 46
    channels: tuple[int, ...] = (16, 32, 64, 128)
    embedding_dim: int = 128
    dropout: float = 0.5
    steps: int = 200
    batch_size: int = 50
    learning_rate: float = 0.1
    warmup_share: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    scale: float = 30.0
    max_shift: float = 0.06
    max_rotation_degrees: float = 6.0
    max_zoom: float = 0.06
    max_contrast: float = 0.2
    max_brightness: float = 0.2


def embedding_network(settings: Settings) -> nn.Sequential:
    """Convolution blocks, each halving the image, then one linear layer to the embedding."""
    layers: list[nn.Module] = []
    inputs, rows, columns = 1, settings.height, settings.width
    for outputs in settings.channels:
        layers += [
            nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
        inputs, rows, columns = outputs, (rows + 1) // 2, (columns + 1) // 2
    layers += [
        nn.Flatten(),
        nn.Linear(inputs * rows * columns, settings.embedding_dim, bias=False),
        nn.BatchNorm1d(settings.embedding_dim),
        nn.Dropout(settings.dropout),
    ]
    return nn.Sequential(*layers)


class SoftmaxLoss(nn.Module):
    """A linear layer without bias and cross-entropy: the plain softmax loss of the paper's tables."""

    def __init__(self, embedding_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(embedding_dim, num_classes, bias=False)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.classifier(features), labels)


def make_head(loss: str, margin: float | None, num_classes: int, settings: Settings) -> nn.Module:
    """The classification loss by name; norm-softmax is AM-Softmax with margin 0."""
    if loss == "softmax":
        return SoftmaxLoss(settings.embedding_dim, num_classes)
    if loss not in LOSSES or margin is None:
        raise ValueError(f"loss must be one of {LOSSES}, with a margin unless it is softmax, got {loss!r}, {margin}")
    return AMSoftmaxLoss(settings.embedding_dim, num_classes, scale=settings.scale, margin=margin)


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


def train(
    faces: FaceSet,
    loss: str,
    margin: float | None,
    seed: int,
    settings: Settings,
    report: Callable[[int], None] | None = None,
) -> Trained:
    """Train from scratch; the seed alone fixes the weights at the start, the batches and the augmentation."""
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The network comes before the head: it starts from the same weights for every loss.
        network = embedding_network(settings)
        head = make_head(loss, margin, len(faces.people), settings)
        torch.manual_seed(seed + 1)  # for dropout: the heads may have drawn different amounts
        generator = torch.Generator().manual_seed(seed)  # for the data alone: the same stream for every loss
        parameters = [*network.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(
            parameters,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=True,
        )
        inputs, labels = to_input(faces.images), faces.labels
        warmup = max(1, round(settings.steps * settings.warmup_share))
        tail: list[float] = []
        order = torch.empty(0, dtype=torch.long)
        network.train()
        for step in range(settings.steps):
            while len(order) < settings.batch_size:  # epochs run on into each other: every batch is full
                order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
            batch, order = order[: settings.batch_size], order[settings.batch_size :]
            progress = (step - warmup) / max(1, settings.steps - warmup)
            factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
            value = head(network(augment(inputs[batch], settings, generator)), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            if step >= settings.steps - max(1, settings.steps // 10):
                tail.append(float(value.detach()))
            if not math.isfinite(float(value.detach())):
                raise FloatingPointError(f"{loss} {margin} seed {seed}: the loss is {float(value)} at step {step}")
            if report is not None:
                report(step + 1)
    network.eval()
    return Trained(network, sum(tail) / len(tail), time.perf_counter() - start)


@torch.no_grad()
def embed(network: nn.Sequential, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """Embeddings [N, D]: the sum of those of each image and of its mirror image."""
    parts = []
    for chunk in torch.split(images, batch_size):
        inputs = to_input(chunk)
        parts.append(network(inputs) + network(inputs.flip(3)))
    return torch.cat(parts)
