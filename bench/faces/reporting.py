"""What the face benchmark writes: the summary over seeds, faces.json, the table and the picture."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import machine
from .arms import BASELINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAR_GRID = np.logspace(-4, 0, 81)
METRICS = {"eer": "EER", "vr@far=1e-2": "VR@FAR=1%", "vr@far=1e-3": "VR@FAR=0.1%", "rank1": "rank-1"}
RANKED = ("vr@far=1e-2", "eer")  # those that rank arms: at FAR = 0.1% a rate is decided by a handful of pairs
TUNED = "vr@far=1e-2"  # what hyper-parameters are chosen by
CLEAR = 2.5  # standard errors; they are on the small side, as the seeds' people overlap
FEWEST_SEEDS = 8


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By arm, in the order in which they came: mean and deviation over seeds, and paired differences to the baselines."""
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["arm"], {})[result["seed"]] = result
    rows = []
    for arm, group in groups.items():
        row: dict[str, Any] = {"arm": arm, "num_seeds": len(group)}
        others = BASELINES[: BASELINES.index(arm)] if arm in BASELINES else BASELINES  # each pair once
        for metric in METRICS:
            values = _known(result[metric] for result in group.values())
            row[metric] = {"mean": float(values.mean()) if values.size else None, "std": _deviation(values)}
            row[metric]["minus"] = {
                other: difference
                for other in others
                if (difference := _difference(group, groups.get(other, {}), metric)) is not None
            }
        rates = zip(*(result["roc"] for result in group.values()), strict=True)
        row["tar"] = [None if None in each else float(np.mean(each)) for each in rates]
        rows.append(row)
    return rows


def _difference(
    group: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], metric: str
) -> dict[str, float | None] | None:
    """Mean and standard error of the differences by seed; None where no seed has both."""
    both = [(group[seed][metric], other[seed][metric]) for seed in group if seed in other]
    paired = _known(None if None in pair else pair[0] - pair[1] for pair in both)
    if not paired.size:
        return None
    deviation = _deviation(paired)
    return {"mean": float(paired.mean()), "stderr": None if deviation is None else deviation / paired.size**0.5}


def _known(values: Iterable[float | None]) -> NDArray[np.float64]:
    """Those that there are: a rate is None where there are too few impostor pairs."""
    return np.array([value for value in values if value is not None], np.float64)


def _deviation(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1)) if values.size > 1 else None


def report_of(results: list[dict[str, Any]], num_runs: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The contents of faces.json."""
    summary = summarize(results)
    return {
        "complete": len(results) == num_runs,
        "machine": machine.describe(),
        "settings": settings,
        "summary": [{k: v for k, v in row.items() if k != "tar"} for row in summary],
        "results": [{k: v for k, v in result.items() if k != "roc"} for result in results],
        "roc": {"far": FAR_GRID.tolist(), "curves": [{k: row[k] for k in ("arm", "tar")} for row in summary]},
    }


def table_cells(summary: list[dict[str, Any]]) -> list[list[str]]:
    """The table as text, in percent: a heading row, then each arm's means and its paired differences."""
    differences = [(metric, other) for other in BASELINES for metric in RANKED if _has(summary, metric, other)]
    rows = [["loss", *METRICS.values(), *(f"{METRICS[metric]} - {other}" for metric, other in differences)]]
    for row in summary:
        cells = [row["arm"]]
        for metric in METRICS:
            mean, deviation = row[metric]["mean"], row[metric]["std"]
            spread = "" if deviation is None else f" \N{PLUS-MINUS SIGN}{100 * deviation:.1f}"
            cells.append("no rate" if mean is None else f"{100 * mean:.1f}{spread}")
        rows.append(cells + [_signed(row[metric]["minus"].get(other)) for metric, other in differences])
    return rows


def _has(summary: list[dict[str, Any]], metric: str, other: str) -> bool:
    return any(other in row[metric]["minus"] for row in summary)


def _signed(difference: dict[str, float | None] | None) -> str:
    if difference is None or difference["mean"] is None:
        return ""
    error = difference["stderr"]
    return f"{100 * difference['mean']:+.1f}" + ("" if error is None else f" (se {100 * error:.1f})")


def verdicts(summary: list[dict[str, Any]]) -> list[str]:
    """In words, by metric and baseline: which arms are better, which worse, and which cannot be told apart from it."""
    lines = []
    for metric, other in ((metric, other) for metric in RANKED for other in BASELINES):
        told: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
        for row in summary:
            difference = row[metric]["minus"].get(other)
            if difference is not None and difference["stderr"] is not None:
                told[_word(difference["mean"], difference["stderr"], metric)].append(row["arm"])
        parts = [f"{word} {other}: {', '.join(arms)}" for word, arms in told.items() if arms]
        if parts:
            lines.append(f"{METRICS[metric]}: {'; '.join(parts)}")
    return [f"by more than {CLEAR:g} standard errors:", *lines] if lines else []


def _word(mean: float, error: float, metric: str) -> str:
    if abs(mean) <= CLEAR * error or mean == 0:
        return "not told apart from"
    return "better than" if (mean < 0) == (metric == "eer") else "worse than"


def table_text(summary: list[dict[str, Any]]) -> str:
    """The table for a terminal, and what it says."""
    rows = table_cells(summary)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    seeds = sorted({row["num_seeds"] for row in summary})
    lines.append(
        f"percent, mean and standard deviation over {' to '.join(map(str, seeds))} seeds; then paired differences and "
        "their standard errors (se)"
    )
    if min(seeds) < FEWEST_SEEDS:
        lines.append(f"so few seeds cannot rank losses: that takes {FEWEST_SEEDS} or more")
    else:
        lines += verdicts(summary)
    return "\n".join(lines)


def best_by_loss(summary: list[dict[str, Any]], losses: dict[str, str]) -> list[str]:
    """Of the arms of each loss, ``losses[arm]``, the one of the largest mean in TUNED."""
    best: dict[str, dict[str, Any]] = {}
    for row in summary:
        loss, mean = losses[row["arm"]], row[TUNED]["mean"]
        if mean is not None and (loss not in best or mean > best[loss][TUNED]["mean"]):
            best[loss] = row
    return [row["arm"] for row in best.values()]


def picture(report: dict[str, Any]) -> Figure:
    """ROC curves, averaged over seeds at equal FAR, beside the table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no global pyplot state
    from matplotlib.figure import Figure

    summary, settings = report["summary"], report["settings"]
    figure = Figure(figsize=(21, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    _draw_curves(left, report)
    left.set_title(f"ROC on people not seen in training, mean over {summary[0]['num_seeds']} seeds")

    right.axis("off")
    cells = table_cells(summary)
    table = right.table(cells[1:], colLabels=cells[0], loc="upper center", cellLoc="right", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for row in range(len(cells)):
        table[row, 0].set_text_props(ha="left")
    table.auto_set_column_width(list(range(len(cells[0]))))
    table.scale(1, 1.5)
    right.set_title(
        f"{settings['data']}: {settings['train_people']} people to train on, "
        f"{settings['test_people']} others to verify; {settings['steps']} steps\n"
        "percent, mean and standard deviation over seeds; then paired differences (standard error)",
        fontsize=10,
    )
    return figure


def _draw_curves(axes: Any, report: dict[str, Any]) -> None:
    """One curve an arm: AM-Softmax's margins in shades of one colour map, the others dashed or dotted."""
    import matplotlib

    far = np.array(report["roc"]["far"])
    # Below one impostor pair the curve would only repeat the rate at FAR 0.
    visible = far >= 1 / min(result["impostor_pairs"] for result in report["results"])
    curves = report["roc"]["curves"]
    margins = [curve["arm"] for curve in curves if re.fullmatch(r"am-softmax-[\d.]+", curve["arm"])]
    shades = dict(zip(margins, np.linspace(0.15, 0.85, len(margins)), strict=True))
    for index, curve in enumerate(curves):
        arm = curve["arm"]
        style = (
            {"color": matplotlib.colormaps["plasma"](shades[arm])}
            if arm in shades
            else {"color": "black" if arm == "softmax" else f"C{index % 10}", "ls": "--" if index < 10 else ":"}
        )
        axes.plot(far[visible], np.array(curve["tar"], np.float64)[visible], label=arm, **style)
    axes.set_xscale("log")
    axes.set(xlabel="false acceptance rate", ylabel="true acceptance rate", xlim=(far[visible][0], 1))
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right", fontsize=8)
