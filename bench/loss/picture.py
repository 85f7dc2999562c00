"""The picture of a sweep: time and peak memory of a step against the number of classes.

python -m bench.loss.picture LOSS.json PICTURE.png    # of a recorded result: the README's
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def draw(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Draw the rows of the shape (B, D) that has the most of them; whether matplotlib is there to do it.

    Args:
        rows: each with ``B``, ``D``, ``C``, ``peer``, ``median_s``, ``mm_floor_s`` and ``peak_bytes``, which is the peak
            above inputs and gradients, or None.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global state
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shapes = [(row["B"], row["D"]) for row in rows]
    B, D = max(shapes, key=shapes.count)
    rows = sorted((row for row in rows if (row["B"], row["D"]) == (B, D)), key=lambda row: row["C"])
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    times, memory = figure.subplots(1, 2)
    for peer in dict.fromkeys(row["peer"] for row in rows):
        mine = [row for row in rows if row["peer"] == peer]
        times.plot([row["C"] for row in mine], [1e3 * row["median_s"] for row in mine], marker="o", label=peer)
        measured = [row for row in mine if row["peak_bytes"]]
        megabytes = [max(row["peak_bytes"], 1e5) / 1e6 for row in measured]  # a page more or less is nothing
        memory.plot([row["C"] for row in measured], megabytes, marker="o", label=peer)
    floor = {row["C"]: 1e3 * row["mm_floor_s"] for row in rows}
    times.plot(list(floor), list(floor.values()), "--", color="black", label="floor: three products by torch.mm")
    times.set(ylabel="forward and backward, ms", title="time of a step")
    memory.set(ylabel="MB", title="peak memory above inputs and gradients")
    for axes in (times, memory):
        axes.set(xscale="log", yscale="log", xlabel="classes C")
        axes.grid(True, which="both", alpha=0.25)
    times.legend(fontsize=8)
    figure.suptitle(f"AM-Softmax loss, B = {B}, D = {D}, {title}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def draw_report(path: Path, report: dict[str, Any]) -> bool:
    """:func:`draw` what `python -m bench loss` has written."""
    rows = []
    for row in report["results"]:
        if "median_s" in row:
            peak = row["peak_bytes"] and row["peak_bytes"]["above_inputs_and_gradients"]
            floor = 6 * row["B"] * row["D"] * row["C"] / row["rates"]["torch.mm"]
            rows.append({**row, "peak_bytes": peak, "mm_floor_s": floor})
    facts = report["machine"]
    where = f"{facts.get('gpu', facts['cpu'])}, {facts['threads']} threads, torch {facts['torch']}"
    return bool(rows) and draw(path, rows, f"{report['dtype']}\n{where}")


if __name__ == "__main__":
    recorded, drawn = map(Path, sys.argv[1:])
    if not draw_report(drawn, json.loads(recorded.read_text(encoding="utf-8"))):
        raise SystemExit("no picture: matplotlib is not installed, or nothing was timed")
