"""What the protocols return: counts, rates and thresholds that print as a table, go into JSON and are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .counting import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Curve:
    """Points of a curve: its name, what its axes are, and the points ``x [n]`` and ``y [n]``."""

    def __init__(self, title: str, x_label: str, y_label: str, x: Any, y: Any) -> None:
        self.title, self.x_label, self.y_label = title, x_label, y_label
        self.x: Array = np.asarray(x, np.float64)
        self.y: Array = np.asarray(y, np.float64)


@dataclass
class Result:
    """What all results have.

    Attributes:
        notes: why a rate is NaN, and what else a reader of the figures must know.
    """

    notes: list[str] = field(default_factory=list, kw_only=True)
    curves: list[Curve] = field(default_factory=list, kw_only=True, repr=False)

    def rows(self) -> list[tuple[str, ...]]:
        """The table: a name and one or two values a row."""
        raise NotImplementedError

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def as_json(self) -> dict[str, Any]:
        """Everything but the curves, in plain types: numbers by FAR are by its text, and NaN is null."""
        found = {name: _plain(value) for name, value in vars(self).items() if name not in ("curves", "notes")}
        return {"protocol": type(self).__name__, **found, "notes": list(self.notes)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_key(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _key(key: Any) -> str:
    return ", ".join(map(_key, key)) if isinstance(key, tuple) else f"{key:g}" if isinstance(key, float) else str(key)


def percent(rate: float) -> str:
    return "no rate" if math.isnan(rate) else f"{100 * rate:.3f}%"


def at_threshold(threshold: float) -> str:
    return "" if math.isnan(threshold) else f"at cosine {threshold:.6f}"


def roc(impostors: Array, genuine: Array) -> tuple[Array, Array]:
    """FAR and TAR at the lower edge of each bin of two histograms, from the highest score on."""
    accepted = [np.cumsum(each[::-1]) / max(each.sum(), 1) for each in (impostors, genuine)]
    changed = np.flatnonzero(impostors[::-1] + genuine[::-1])
    return accepted[0][changed], accepted[1][changed]


def figure(results: Result | Mapping[str, Result]) -> Figure:
    """Draw one result, or several by name, in the same axes: needs matplotlib.

    Verification is drawn as TAR against FAR with a logarithmic FAR, identification as its rate against the rank, MegaFace's
    rank-1 against the number of distractors. ``figure(...).savefig("roc.png")`` writes it; no display is needed.

    Args:
        results: of this module's functions.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.

    Example:
        >>> import torch
        >>> from amsoftmax_kernels import evaluation as ev
        >>> people = torch.arange(10).repeat_interleave(4)
        >>> result = ev.verification(torch.eye(10)[people] + 0.1 * torch.randn(40, 10), people, far=0.01)
        >>> ev.figure({"random": result}).savefig("roc.png")
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global pyplot state
    from matplotlib.figure import Figure

    named = results if isinstance(results, Mapping) else {"": results}
    axes: dict[str, list[tuple[str, Curve]]] = {}
    for name, result in named.items():
        for curve in result.curves:
            if len(curve.x):
                axes.setdefault(curve.title, []).append((name, curve))
    if not axes:
        raise ValueError("results must have a curve to draw, but these have none")
    drawn = Figure(figsize=(6.4 * len(axes), 4.8), layout="constrained")
    FigureCanvasAgg(drawn)
    for axis, (title, curves) in zip(drawn.subplots(1, len(axes), squeeze=False)[0], axes.items(), strict=True):
        _draw(axis, title, curves)
    return drawn


def _draw(axis: Any, title: str, curves: Sequence[tuple[str, Curve]]) -> None:
    for name, curve in curves:
        seen = curve.x > 0
        points = len(curve.x) < 20
        axis.plot(curve.x[seen], curve.y[seen], label=name, marker="o" if points else None)
    axis.set_xscale("log")
    axis.set(title=title, xlabel=curves[0][1].x_label, ylabel=curves[0][1].y_label)
    axis.grid(alpha=0.3, which="both")
    if any(name for name, _ in curves):
        axis.legend()
