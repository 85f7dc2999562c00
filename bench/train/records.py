"""InsightFace's training records as a source: batches in the order of a permutation an epoch, decoded ahead by threads.

The network is the face benchmark's small one, on greyscale: a run shows that data, head and verification work together.
Whoever trains for accuracy brings a backbone and transforms (docs/from-other-libraries.md has such a script).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from amsoftmax_kernels import evaluation
from amsoftmax_kernels.insightface import RecordDataset, load_bin

from . import synthetic

_BATCH, _ORDER = 0, 3  # streams of random numbers; loop.py has 2
FAR = 1e-3


class Records:
    """The images of a .rec, verified on InsightFace's sets.

    Args:
        path: of the .rec, or of its folder.
        sets: .bin files, such as lfw.bin.
        batch: images a rank and step.
        ranks: how many there are.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is broken, or there are fewer images than a step takes.
    """

    def __init__(self, path: Path, sets: Sequence[Path], batch: int, seed: int, ranks: int, device: torch.device) -> None:
        from ..faces import training

        self.training, self.batch_size, self.seed, self.ranks, self.device = training, batch, seed, ranks, device
        self.data = RecordDataset(path)
        self.num_classes = self.data.num_classes
        self.steps_an_epoch: int | None = len(self.data) // (batch * ranks)
        if self.steps_an_epoch == 0:
            raise ValueError(
                f"--batch {batch} on {ranks} ranks takes more than the {len(self.data)} images of {self.data.path}"
            )
        self.sets = {each.stem: load_bin(each) for each in sets}
        if len(self.sets) != len(sets):
            raise ValueError("--verify must have files of different names")
        self.measures: tuple[str, ...] = tuple(
            f"{measure}/{name}" for name in self.sets for measure in ("accuracy", f"tar@far={FAR:g}")
        )
        width, height = self.data[0][0].size
        self.settings = replace(training.Settings(), height=height, width=width)
        self._threads = ThreadPoolExecutor(torch.get_num_threads())
        self._ahead: tuple[tuple[int, int, int], list[Future[tuple[Tensor, int]]]] | None = None
        self._order: tuple[int, Tensor] | None = None
        self._decoded: dict[str, Tensor] = {}

    def network(self, dim: int) -> nn.Module:
        return self.training.embedding_network(replace(self.settings, embedding_dim=dim))

    def batch(self, size: int, rank: int, step: int) -> tuple[Tensor, Tensor]:
        asked = (size, rank, step)
        futures = self._ahead[1] if self._ahead is not None and self._ahead[0] == asked else self._start(*asked)
        images, labels = zip(*(each.result() for each in futures), strict=True)
        self._ahead = (size, rank, step + 1), self._start(size, rank, step + 1)
        inputs = self.training.to_input(torch.stack(images))
        mirrored = torch.rand(size, generator=synthetic.generator_of(self.seed, _BATCH, rank, step)) < 0.5
        inputs[mirrored] = inputs[mirrored].flip(3)
        return inputs.to(self.device), torch.tensor(labels, device=self.device)

    def _start(self, size: int, rank: int, step: int) -> list[Future[tuple[Tensor, int]]]:
        return [self._threads.submit(self._sample, index) for index in self._chosen(size, rank, step).tolist()]

    def _sample(self, index: int) -> tuple[Tensor, int]:
        encoded, label = self.data.encoded(index)
        return self._grey(encoded), label

    def _chosen(self, size: int, rank: int, step: int) -> Tensor:
        """Which images a batch has: each once an epoch, but for a rest that is less than a step."""
        assert self.steps_an_epoch is not None
        epoch, place = divmod(step, self.steps_an_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = synthetic.generator_of(self.seed, _ORDER, epoch)
            self._order = epoch, torch.randperm(len(self.data), generator=generator)
        start = (place * self.ranks + rank) * self.batch_size
        return self._order[1][start : start + size]

    def _grey(self, encoded: bytes) -> Tensor:
        """``[1, H, W]`` uint8."""
        from PIL import Image

        size = (self.settings.width, self.settings.height)
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
            grey = image.convert("L")
        grey = grey if grey.size == size else grey.resize(size, Image.Resampling.BILINEAR)
        return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(
            1, self.settings.height, self.settings.width
        )

    def verification(self, network: nn.Module) -> dict[str, float]:
        """Accuracy over ten folds and TAR of each set; a set without enough impostor pairs has no TAR."""
        rates: dict[str, float] = {}
        assert isinstance(network, nn.Sequential)
        for name, (images, same) in self.sets.items():
            if name not in self._decoded:
                self._decoded[name] = torch.stack(list(self._threads.map(self._grey, images)))
            embeddings = self.training.embed(network, self._decoded[name].to(self.device))
            found = evaluation.pairs(embeddings[::2], embeddings[1::2], same, far=FAR)
            rates[f"accuracy/{name}"] = found.accuracy
            if not math.isnan(found.tar[FAR]):
                rates[f"tar@far={FAR:g}/{name}"] = found.tar[FAR]
        return rates

    def told(self, rates: dict[str, float]) -> str:
        return ", ".join(f"{name} {100 * rate:.2f}%" for name, rate in rates.items()) or "no --verify"

    def expected(self) -> str:
        sets = ", ".join(f"{name} ({len(same):,} pairs)" for name, (_, same) in self.sets.items()) or "nothing"
        return f"{len(self.data):,} images, {self.steps_an_epoch:,} steps an epoch; verified on {sets}"
