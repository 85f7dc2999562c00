"""What the fused decomposition asks of whoever writes its kernels, in Triton or in C++."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from . import Forward, Problem


class RawLabels(NamedTuple):
    """Labels as they were given, of which a kernel makes those that :class:`.Problem` has."""

    labels: Tensor  # [B] of any integer dtype, contiguous
    ignore_index: int
    num_rows: Tensor  # 0-d int64, to be written: those not ignored, at least 1


class Kernels(Protocol):
    """What a backend launches, on tensors of one device: each call is one kernel, on the current stream.

    ``s`` is the scale: a number, or a 0-d float32 tensor on the device; ‖x‖ takes its place without normalize_features.
    Widths are those of the padded rows of operands. x̂, ŵ are in the compute dtype, E and a∘x̂ in the panel's. ``upstream``,
    the gradient of a reduced loss, is a 0-d float32 tensor on the device; None stands for 1.
    """

    def streams(self, problem: Problem, classes: int) -> int:
        """Partial sums of a row that :meth:`cosine_exp` leaves: one or more of each program that shares its classes."""

    def canonical_labels(
        self, labels: Tensor, ignore_index: int, num_classes: int, result: Tensor, count: Tensor
    ) -> None: ...

    def prepare_rows(
        self, problem: Problem, raw: RawLabels | None, s: float | Tensor, x_hat: Tensor, cosine: Tensor, norm: Tensor,
        factor: Tensor, shift: Tensor, w_hat: Tensor | None, inverse_norm: Tensor,
    ) -> None:  # fmt: skip
        """x̂, the target's exact cosine, ‖x‖, log2(e)·s, and a shift of 0; and, with ``w_hat``, all centres as below.

        With ``raw`` the problem's labels, and their number, are written, as by :meth:`canonical_labels`.
        """

    def prepare_centres(self, weight: Tensor, w_hat: Tensor, inverse_norm: Tensor, unless_bounded: Tensor | None) -> None:
        """ŵ and 1/‖w‖ of a chunk; nothing if ``unless_bounded``, the scale on the device, needs no shift."""

    def cosine_exp(
        self, problem: Problem, start: int, x_hat: Tensor, w_hat: Tensor, factor: Tensor, shift: Tensor | None,
        terms: Tensor | None, z: Tensor | None, best: Tensor | None, best_class: Tensor | None, only_unbounded: bool,
    ) -> None:  # fmt: skip
        """Piece 2 on the chunk of classes from ``start``, into whichever of ``terms``, ``z`` and ``best`` are given."""

    def reduce_sums(self, z_parts: Tensor, labels: Tensor, z: Tensor) -> None: ...

    def reduce_best(self, best_parts: Tensor, class_parts: Tensor, best: Tensor, best_class: Tensor) -> None: ...

    def reduce_shift(self, best_parts: Tensor, class_parts: Tensor, factor: Tensor, shift: Tensor) -> None: ...

    def constant_margin(
        self, problem: Problem, saved: Forward, z_parts: Tensor | None, num_rows: Tensor, s: float | Tensor, margin: float,
        reduction: str, loss: Tensor, derivatives: Tensor, x_factored: Tensor | None,
    ) -> None:  # fmt: skip
        """The loss, its derivatives and a∘x̂; given parts of z it also sums them into z."""

    def factor_rows(
        self, problem: Problem, norm: Tensor, row_factor: Tensor, s: float | Tensor, x_factored: Tensor,
        x_hat: Tensor | None, factor: Tensor | None,
    ) -> None:  # fmt: skip
        """a∘x̂; x̂ and its factor again where E is recomputed."""

    def grad_centres(
        self, terms: Tensor, x_factored: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor, upstream: Tensor | None
    ) -> bool:
        """The gradient of a chunk's centres at once, Eᵀ(a∘x̂) through the normalization, if there is a kernel for it here;
        else False, and nothing is done."""

    def parts_beside(self, problem: Problem) -> int:
        """Parts in which :meth:`grad_both` can make E·ŵ, known from dtypes and layouts alone; 0 where it would not pay."""

    def grad_both(
        self, terms: Tensor, x_factored: Tensor, w_hat: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor,
        upstream: Tensor | None, parts: Tensor,
    ) -> bool:  # fmt: skip
        """:meth:`grad_centres` of all classes, and beside it E·ŵ into ``parts`` ``[n, B, width]``, still to be summed."""

    def finish_centres(
        self, grad_unit: Tensor, weight: Tensor, inverse_norm: Tensor, grad: Tensor, upstream: Tensor | None
    ) -> None:
        """The gradient through the normalization, times ``upstream``; ``grad`` may be ``grad_unit``."""

    def finish_rows(
        self, problem: Problem, saved: Forward, s: float | Tensor, row_factor: Tensor, grad_cosine: Tensor,
        grad_norm: Tensor | None, upstream: Tensor | None,
        grad_features: Tensor | None, grad_weight: Tensor | None, grad_scale: Tensor | None,
    ) -> None:  # fmt: skip
        """dx, the targets' part of dw, and parts of the scale's gradient; the vectors are still to be times ``upstream``.

        E·ŵ, the rows saved, may still be in parts.
        """
