"""From the rows' losses to what the caller asked for."""

from __future__ import annotations

from torch import Tensor


def reduce_rows(rows: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Mean (over the rows not ignored; 0 if there is none), sum, or ``[B]`` rows with 0 where ``labels`` is -1."""
    ignored = labels < 0
    rows = rows.masked_fill(ignored, 0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / (~ignored).sum().clamp(min=1)
