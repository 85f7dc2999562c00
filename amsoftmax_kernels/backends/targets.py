"""The targets' exact part in plain PyTorch: each row beside its own centre, and where the targets fall in a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .norms import row_norms


@dataclass
class TargetPair:
    """Each row's feature and its own centre, normalized in float64, for an exact target."""

    x: Tensor  # [B, D] x̂, zero where the row is ignored
    x_norm: Tensor  # [B] ‖x‖
    x_inverse: Tensor  # [B] 1/‖x‖
    w: Tensor  # [B, D] ŵ_y; another class's where the target is absent
    w_inverse: Tensor  # [B] 1/‖w_y‖
    cosine: Tensor  # [B] t, 0 where the target is absent
    absent: Tensor  # [B] bool: no target in this shard

    @classmethod
    def of(cls, features: Tensor, weight: Tensor, labels: Tensor) -> TargetPair:
        ignored = labels < 0
        absent = ignored | (labels >= weight.shape[0])
        x, x_norm, x_inverse = unit_rows(features.to(torch.float64, copy=True).masked_fill_(ignored[:, None], 0))
        w, _, w_inverse = unit_rows(weight.index_select(0, labels.clamp(0, weight.shape[0] - 1)).to(torch.float64))
        cosine = (x * w).sum(1).masked_fill_(absent, 0)
        return cls(x, x_norm, x_inverse, w, w_inverse, cosine, absent)

    def grad_features(self, grad_cosine: Tensor, rows: Tensor, row_coefficient: Tensor, x_coefficient: Tensor) -> Tensor:
        """``rows`` and x̂ by their coefficients, plus ∂t/∂x = (ŵ − t x̂)/‖x‖ by the gradient of t: ``[B, D]``, in ``rows``."""
        g = self._of_targets(grad_cosine) * self.x_inverse
        rows *= row_coefficient[:, None]
        rows.addcmul_(self.w, g[:, None])
        return rows.addcmul_(self.x, (x_coefficient - g * self.cosine)[:, None])

    def grad_weight(self, grad_cosine: Tensor) -> Tensor:
        """∂t/∂w_y = (x̂ − t ŵ_y)/‖w_y‖ times the gradient of t: ``[B, D]``."""
        g = self._of_targets(grad_cosine) * self.w_inverse
        rows = self.x * g[:, None]
        return rows.addcmul_(self.w, (g * self.cosine)[:, None], value=-1)

    def _of_targets(self, grad_cosine: Tensor) -> Tensor:
        return grad_cosine.double().masked_fill(self.absent, 0)


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows normalized, 0 where they count as zero, their norms and the norms' inverses."""
    norm, inverse = row_norms(rows)
    return rows * inverse[:, None], norm, inverse


class Targets:
    """Where the targets fall in each chunk's panel. Sums in the order of the rows, so the same bits each time."""

    def __init__(self, labels: Tensor, num_classes: int, chunk: int, subcentres: int) -> None:
        self.labels, self.chunk, self.subcentres = labels, chunk, subcentres
        self.on_cpu = labels.device.type == "cpu"
        # On a CPU, of each chunk that has a target: the rows, and their classes in the chunk.
        self.parts: dict[int, tuple[Tensor, Tensor]] = {}
        if not self.on_cpu:
            return
        ordered, order = labels.sort(stable=True)
        inside = (ordered >= 0) & (ordered < num_classes)
        ordered, order = ordered[inside], order[inside]
        chunks, counts = (ordered // chunk).unique_consecutive(return_counts=True)
        sizes = counts.tolist()
        parts = zip(order.split(sizes), (ordered % chunk).split(sizes), strict=True)
        self.parts = dict(zip(chunks.tolist(), parts, strict=True))

    def mask_(self, panel: Tensor, index: int, value: float) -> None:
        """Set each target's entry of a chunk's panel ``[chunk, B]``; with sub-centres those of its whole class."""
        if self.on_cpu:
            if index in self.parts:
                rows, classes = self.parts[index]
                for place in self._places(classes):
                    panel[place, rows] = value
            return
        # Without reading the labels back: every column writes one entry, itself where its target is elsewhere.
        inside, classes = self._inside(panel, index)
        for place in self._places(classes):
            current = panel.gather(0, place[None])
            panel.scatter_(0, place[None], torch.where(inside, value, current))

    def _places(self, centres: Tensor) -> Iterator[Tensor]:
        """The first centre of each one's class, the second, and so on."""
        if self.subcentres == 1:
            yield centres
            return
        first = centres - centres % self.subcentres
        for place in range(self.subcentres):
            yield first + place

    def add_(self, grad: Tensor, index: int, target_rows: Tensor) -> None:
        """Add each row of ``target_rows [B, D]`` to its class in a chunk's ``grad [chunk, D]``."""
        if self.on_cpu:
            if index in self.parts:
                rows, classes = self.parts[index]
                grad.index_add_(0, classes, target_rows[rows])
            return
        inside, classes = self._inside(grad, index)
        # index_put_ sorts on a GPU; index_add_ would add in no fixed order.
        grad.index_put_((classes,), target_rows.masked_fill(~inside[:, None], 0), accumulate=True)

    def _inside(self, panel: Tensor, index: int) -> tuple[Tensor, Tensor]:
        local = self.labels - index * self.chunk
        return (local >= 0) & (local < panel.shape[0]), local.clamp(0, panel.shape[0] - 1)
