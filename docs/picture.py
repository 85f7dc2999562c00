"""Draws the README's picture, time and memory of a step against the number of classes, from a recorded benchmark.

python docs/picture.py [RESULTS.json [PICTURE.png]]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "bench" / "results" / "loss-amd-epyc-2026-11-26.json"
PICTURE = ROOT / "docs" / "classes.png"
# The name that a result has, the one that a reader knows, colour and width.
SERIES = {
    "ours": ("amsoftmax_kernels", "tab:blue", 2.4),
    "ours, save_bytes=0": ("amsoftmax_kernels, save_bytes=0", "tab:cyan", 2.4),
    "torch.compile": ("torch.compile of PyTorch operations", "tab:orange", 1.4),
    "eager PyTorch": ("PyTorch operations", "tab:red", 1.4),
    "CosFaceLoss": ("pytorch-metric-learning, CosFaceLoss", "tab:purple", 1.4),
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Two panels that share the classes' axis: milliseconds, and megabytes above inputs and gradients."""
    first = report["results"][0]
    rows = [row for row in report["results"] if (row["B"], row["D"]) == (first["B"], first["D"]) and "median_s" in row]
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for name, (label, colour, width) in SERIES.items():
        mine = [row for row in rows if row["peer"] == name]
        style = {"label": label, "color": colour, "linewidth": width, "marker": "o", "markersize": 4}
        time.plot([row["C"] for row in mine], [row["median_s"] * 1e3 for row in mine], **style)
        known = [(row["C"], row["peak_bytes"]["above_inputs_and_gradients"] / 1e6) for row in mine if row["peak_bytes"]]
        memory.plot(*zip(*known, strict=True), **style)
    for axes, title in ((time, "forward and backward, ms"), (memory, "peak memory above inputs and gradients, MB")):
        axes.set(xscale="log", yscale="log", xlabel="classes", title=title)
        axes.grid(True, which="major", alpha=0.3)
    machine = report["machine"]
    figure.suptitle(
        f"A batch of {first['B']}, {first['D']} dimensions, {report['dtype']}: {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, {machine['date']}",
        fontsize=10,
    )
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    recorded, picture = ([Path(each) for each in sys.argv[1:]] + [RECORDED, PICTURE][len(sys.argv) - 1 :])[:2]
    draw(json.loads(recorded.read_text(encoding="utf-8")), picture)
