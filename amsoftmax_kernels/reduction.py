"""From the rows' losses to what the caller asked for."""

from __future__ import annotations

from torch import Tensor


def reduce_rows(rows: Tensor, labels: Tensor, num_rows: Tensor, reduction: str) -> Tensor:
    """Mean (over the rows not ignored, ``num_rows``), sum, or ``[B]`` rows with 0 where ``labels`` is -1."""
    rows = rows.masked_fill(labels < 0, 0)
    if reduction == "none":
        return rows
    return rows.sum() / num_rows if reduction == "mean" else rows.sum()
