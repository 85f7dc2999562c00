"""What is to be reached on an H200, and whether a run of `bench gpu` did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .gpu_peers import HALF_CENTRES

Row = dict[str, Any]
KEPT = {"triton": 0.65, "cuda": 0.8}  # share of three products and the bytes, from 1,024 rows on
RECOMPUTED = {"triton": 0.75, "cuda": 0.75}  # of four products
SMALL, MILLION = (256, 512, 10_516), (1024, 512, 1_000_000)
LAUNCHED_S, REPLAYED_S = 0.15e-3, 0.06e-3
PARTIAL_FC_TIMES, PARTIAL_FC_MEMORY = 3.0, 0.25
CUDA_TIMES = 1.2  # as fast as Triton, the fused kernel, from 1,024 rows on
LIBRARIES = ("CCE", "Liger", "quack")


def targets(stages: dict[str, Any]) -> Iterator[Row]:
    """One row a target that the stages say something of."""
    times = [row for row in _rows(stages, "times") if "median_s" in row]
    for row in times:
        backend, _, how = row["peer"].partition(", ")
        share = {"E kept": KEPT, "recomputed": RECOMPUTED}.get(how, {}).get(backend)
        if share is not None and row["B"] >= 1024 and row["dtype"] == "bfloat16":
            found = row["of_card_floor"]
            yield _row(f"{row['peer']}: share of the floor", row, found, at_least=share)
    shapes = dict.fromkeys((row["B"], row["D"], row["C"], row["dtype"]) for row in times)
    for shape in shapes:
        at = {row["peer"]: row for row in times if (row["B"], row["D"], row["C"], row["dtype"]) == shape}
        ours = [row for name, row in at.items() if name.split(",")[0] in KEPT and not name.endswith("again")]
        half = [row for row in ours if row["peer"].endswith(HALF_CENTRES)]
        ours = [row for row in ours if row not in half]
        if not ours:
            continue
        best = min(ours, key=lambda row: float(row["median_s"]))
        if shape[:3] == SMALL:
            yield _row("ms launched one by one", best, 1e3 * best["median_s"], at_most=1e3 * LAUNCHED_S)
        if shape[:3] == MILLION and "PartialFC algorithm" in at:
            peer = at["PartialFC algorithm"]
            times_as_fast = peer["median_s"] / best["median_s"]
            yield _row("times the PartialFC algorithm's speed", best, times_as_fast, at_least=PARTIAL_FC_TIMES)
            if peer["peak_bytes"]:
                least = best["peak_bytes"] / peer["peak_bytes"]
                yield _row("of the PartialFC algorithm's memory", best, least, at_most=PARTIAL_FC_MEMORY)
        for name, peer in at.items():
            if name.split(",")[0] in LIBRARIES:
                yield _row(f"of the time of {name}", best, best["median_s"] / peer["median_s"], at_most=1.0)
                if half and name.endswith("pre-normalized"):  # which are in bfloat16 too
                    least = min(float(row["median_s"]) for row in half)
                    yield _row(f"of the time of {name}, {HALF_CENTRES}", best, least / peer["median_s"], at_most=1.0)
    for row in _rows(stages, "graph"):
        plain = not {"scale", "margin", "normalize_features"} & row.keys()
        if plain and (row["B"], row["D"], row["C"]) == SMALL and "replay_s" in row and row["backend"] in KEPT:
            name = f"{row['backend']}, E {'kept' if row['kept'] else 'recomputed'}: ms replayed"
            yield _row(name, row, 1e3 * row["replay_s"], at_most=1e3 * REPLAYED_S)
    yield from _fused_kernels(_rows(stages, "profile"))


def _fused_kernels(profiles: list[Row]) -> Iterator[Row]:
    """The C++ cosine kernel's speed, in Triton's."""
    seconds = {
        (row["peer"], row["B"], row["C"]): sum(each["seconds"] for each in row["kernels"] if "cosine" in each["name"])
        for row in profiles
    }
    for row in profiles:
        backend, _, how = row["peer"].partition(", ")
        mine, theirs = (seconds.get((f"{name}, {how}", row["B"], row["C"]), 0.0) for name in ("cuda", "triton"))
        if backend == "cuda" and mine and theirs and row["B"] >= 1024:
            yield _row(f"{row['peer']}: times the speed of Triton's cosine kernel", row, theirs / mine, at_least=CUDA_TIMES)


def _row(target: str, at: Row, found: float, *, at_least: float | None = None, at_most: float | None = None) -> Row:
    row = {"target": target, "B": at["B"], "D": at["D"], "C": at["C"], "found": found}
    if at_least is not None:
        return row | {"at_least": at_least, "met": found >= at_least}
    assert at_most is not None
    return row | {"at_most": at_most, "met": found <= at_most}


def _rows(stages: dict[str, Any], stage: str) -> list[Row]:
    """What a stage left, if it did not break."""
    rows = stages.get(stage, [])
    return rows if isinstance(rows, list) else []
