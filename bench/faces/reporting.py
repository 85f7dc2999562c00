"""What the face benchmark writes: the summary over seeds, faces.json, the table and the picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import machine
from .training import LOSSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAR_GRID = np.logspace(-4, 0, 81)
METRICS = {"eer": "EER", "vr@far=1e-2": "VR@FAR=1%", "vr@far=1e-3": "VR@FAR=0.1%", "rank1": "rank-1"}


def label(loss: str, margin: float | None) -> str:
    """How a loss is called in the table and the legend."""
    return f"am-softmax m={margin:.2f}" if loss == "am-softmax" else loss


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds by loss, and the paired difference to softmax by seed."""
    groups: dict[tuple[str, float | None], dict[int, dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["loss"], result["margin"]), {})[result["seed"]] = result
    baseline = groups.get(("softmax", None), {})
    rows = []
    order = sorted(groups, key=lambda key: (LOSSES.index(key[0]), key[1] or 0.0))
    for loss, margin in order:
        group = groups[loss, margin]
        row: dict[str, Any] = {"loss": loss, "margin": margin, "num_seeds": len(group)}
        for metric in METRICS:
            both = [(group[s][metric], baseline[s][metric]) for s in group if s in baseline]
            values = _known(result[metric] for result in group.values())
            paired = _known(None if None in pair else pair[0] - pair[1] for pair in both)
            row[metric] = {"mean": float(values.mean()) if values.size else None, "std": _deviation(values)}
            if loss != "softmax" and paired.size:
                error = _deviation(paired)
                row[metric]["minus_softmax"] = float(paired.mean())
                row[metric]["minus_softmax_stderr"] = None if error is None else error / paired.size**0.5
        rates = zip(*(result["roc"] for result in group.values()), strict=True)
        row["tar"] = [None if None in each else float(np.mean(each)) for each in rates]
        rows.append(row)
    return rows


def _known(values: Iterable[float | None]) -> NDArray[np.float64]:
    """Those that there are: a rate is None where there are too few impostor pairs."""
    return np.array([value for value in values if value is not None], np.float64)


def _deviation(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1)) if values.size > 1 else None


def report_of(results: list[dict[str, Any]], num_runs: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The contents of faces.json."""
    return {
        "complete": len(results) == num_runs,
        "machine": machine.describe(),
        "settings": settings,
        "summary": [{k: v for k, v in row.items() if k != "tar"} for row in summarize(results)],
        "results": [{k: v for k, v in result.items() if k != "roc"} for result in results],
        "roc": {
            "far": FAR_GRID.tolist(),
            "curves": [{k: row[k] for k in ("loss", "margin", "tar")} for row in summarize(results)],
        },
    }


def table_cells(summary: list[dict[str, Any]]) -> list[list[str]]:
    """The table as text, in percent: a heading row, then mean +- standard deviation over seeds by loss."""
    rows = [["loss", *METRICS.values(), "VR@FAR=1% - softmax"]]
    for row in summary:
        cells = [label(row["loss"], row["margin"])]
        for metric in METRICS:
            value = row[metric]
            if value["mean"] is None:
                cells.append("no rate")
                continue
            deviation = "" if value["std"] is None else f" \N{PLUS-MINUS SIGN}{100 * value['std']:.1f}"
            cells.append(f"{100 * value['mean']:.1f}{deviation}")
        value = row["vr@far=1e-2"]
        if "minus_softmax" not in value:
            cells.append("")
        else:
            error = value["minus_softmax_stderr"]
            error_text = "" if error is None else f" (se {100 * error:.1f})"
            cells.append(f"{100 * value['minus_softmax']:+.1f}{error_text}")
        rows.append(cells)
    return rows


def table_text(summary: list[dict[str, Any]]) -> str:
    """The table for a terminal."""
    rows = table_cells(summary)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    seeds = sorted({row["num_seeds"] for row in summary})
    lines.append(
        f"percent, mean and standard deviation over {' to '.join(map(str, seeds))} seeds; "
        "the last column is the paired difference and its standard error"
    )
    if max(seeds) < 8:
        lines.append("so few seeds cannot rank losses: the full run has 8")
    return "\n".join(lines)


def picture(report: dict[str, Any]) -> Figure:
    """ROC curves, averaged over seeds at equal FAR, beside the table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global pyplot state
    from matplotlib.figure import Figure

    summary, settings = report["summary"], report["settings"]
    figure = Figure(figsize=(17, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.55])

    far = np.array(report["roc"]["far"])
    # Below one impostor pair the curve would only repeat the rate at FAR 0.
    visible = far >= 1 / min(result["impostor_pairs"] for result in report["results"])
    shades = iter(np.linspace(0.15, 0.85, max(1, sum(row["loss"] == "am-softmax" for row in summary))))
    for curve in report["roc"]["curves"]:
        style: dict[str, Any] = {
            "softmax": {"color": "black", "ls": "--"},
            "norm-softmax": {"color": "tab:gray"},
        }.get(curve["loss"], {})
        if not style:
            import matplotlib

            style = {"color": matplotlib.colormaps["plasma"](next(shades))}
        left.plot(
            far[visible],
            np.array(curve["tar"], np.float64)[visible],
            label=label(curve["loss"], curve["margin"]),
            **style,
        )
    left.set_xscale("log")
    left.set(xlabel="false acceptance rate", ylabel="true acceptance rate", xlim=(far[visible][0], 1))
    left.set_title(f"ROC on people not seen in training, mean over {summary[0]['num_seeds']} seeds")
    left.grid(alpha=0.3, which="both")
    left.legend(loc="lower right")

    right.axis("off")
    cells = table_cells(summary)
    table = right.table(cells[1:], colLabels=cells[0], loc="upper center", cellLoc="right", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    for row in range(len(cells)):
        table[row, 0].set_text_props(ha="left")
    table.auto_set_column_width(list(range(len(cells[0]))))
    table.scale(1, 1.7)
    right.set_title(
        f"{settings['data']}: {settings['train_people']} people to train on, "
        f"{settings['test_people']} others to verify; s = {settings['scale']:g}, {settings['steps']} steps\n"
        "percent, mean and standard deviation over seeds; last column: paired difference (standard error)",
        fontsize=10,
    )
    return figure
