"""What the fused decomposition asks of whoever writes its kernels, in Triton or in C++."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from . import Forward, Problem, Upstream
from .update import Update


class Rows(NamedTuple):
    """What the kernels are given of each row of the batch."""

    x_hat: Tensor  # [B, width] in the compute dtype
    factor: Tensor  # [B] log2(e)·s, or log2(e)·‖x‖ without normalize_features
    cosine: Tensor  # [B] t, exact
    norm: Tensor  # [B]
    shift: Tensor | None  # [B] taken off log2(e)·logit; None: no row needs one


class Cosines(NamedTuple):
    """What the cosine kernel makes of a chunk of classes; None leaves it out."""

    terms: Tensor | None = None  # [B, chunk] E
    z: Tensor | None = None  # [streams, B] float64, parts of its row sums
    best: Tensor | None = None  # [streams, B] float32, the largest cosines of a negative
    best_class: Tensor | None = None  # [streams, B] int64


class Factored(NamedTuple):
    """What the backward pass's products take of each row."""

    x_factored: Tensor  # [B, width] a∘x̂ in the dtype of E
    x_hat: Tensor | None  # [B, width] and
    factor: Tensor | None  # [B] as in Rows, where E is computed again


class Grads(NamedTuple):
    """Where the backward pass puts its results; None where one is not needed."""

    features: Tensor | None  # [B, D]
    weight: Tensor | None  # [C, D], complete but for the targets' part
    scale: Tensor | None  # [B] float64, parts of the scale's gradient


class TargetParts(NamedTuple):
    """The targets' part of dw, class by class."""

    slots: Tensor  # [C] int32: the row of ``rows`` that has a class's part, -1 where it has none
    rows: Tensor  # [B, D] float32


class Kernels(Protocol):
    """What a backend launches, on tensors of one device: each call is one kernel, on the current stream.

    ``s`` is the scale: a number, or a 0-d float32 tensor on the device; ‖x‖ takes its place without normalize_features.
    Operands have D padded to ``width``. x̂ and ŵ are in the compute dtype, E and a∘x̂ in the panel's.
    """

    def streams(self, problem: Problem, classes: int) -> int:
        """Parts of a row's sum that :meth:`cosine_exp` leaves: one of each program that shares the row's classes."""

    def prepare_rows(self, problem: Problem, s: float | Tensor, rows: Rows) -> None:
        """Write all of ``rows``, the shift as 0."""

    def prepare_centres(self, weight: Tensor, w_hat: Tensor, inverse_norm: Tensor) -> None:
        """Write ŵ and 1/‖w‖ of a chunk's centres ``weight [N, D]``."""

    def cosine_exp(self, problem: Problem, start: int, rows: Rows, w_hat: Tensor, out: Cosines) -> None:
        """Piece 2 of a step on the classes from ``start``, of which ``w_hat`` has the normalized centres.

        With ``best`` alone it serves for the rows' shifts: rows whose scale needs none are skipped, classes may be left out.
        """

    def reduce_sums(self, z_parts: Tensor, labels: Tensor, z: Tensor) -> None: ...

    def reduce_best(self, best_parts: Tensor, class_parts: Tensor, best: Tensor, best_class: Tensor) -> None: ...

    def reduce_shift(self, best_parts: Tensor, class_parts: Tensor, factor: Tensor, shift: Tensor) -> None: ...

    def additive_margin(
        self, problem: Problem, z_parts: Tensor, out: Forward, s: float | Tensor, margin: float, mean: bool
    ) -> None:  # fmt: skip
        """Write the loss and its derivatives of z's parts: :meth:`reduce_sums`, then
        :func:`amsoftmax_kernels.backends.margin.additive_margin`."""

    def factor_rows(self, problem: Problem, norm: Tensor, row_factor: Tensor, s: float | Tensor, out: Factored) -> None: ...

    def grad_centres(self, terms: Tensor, x_factored: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor) -> bool:
        """The gradient of a chunk's centres at once, Eᵀ(a∘x̂) through the normalization, if there is a kernel for it here;
        else False, and nothing is done."""

    def finish_centres(self, grad_unit: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor) -> None:
        """From the gradient by ŵ to that of the centres; ``grad`` may be ``grad_unit``."""

    def update_centres(
        self, grad: Tensor, weight: Tensor, inverse_norm: Tensor, parts: TargetParts, start: int, update: Update,
        whole: bool, out: Tensor | None,
    ) -> None:  # fmt: skip
        """From the gradient by ŵ of the classes from ``start`` on to their step; weight, 1/‖w‖ and slots are theirs.

        With ``out`` their whole gradient is left there, and no step is taken; ``whole``: it is what ``grad`` has.
        """

    def finish_rows(self, problem: Problem, saved: Forward, s: float | Tensor, upstream: Upstream, grads: Grads) -> None:
        """dx, the targets' part of dw, and the parts of the scale's gradient."""
