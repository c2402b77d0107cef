"""Bars of memory and of an epoch's hours, for each model and method, from the values of the JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedspeed.planner.hardware import GIB

Values = Mapping[str, Any]
BEST = "same rows, its best micro-batch"
TASK = "code generation"


def draw(values: Values, path: Path) -> None:
    """Write the plot: device memory and hours of an epoch of one task; hatched where it does not fit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [case for case in values["cases"] if case["task"] == TASK]
    figure = Figure(figsize=(12, 3.2 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), 2, squeeze=False)
    for (memory, hours), case in zip(axes, cases, strict=True):
        rows = [row for row in case["methods"] if row["variant"] in ("", BEST) and "refused" not in row]
        _bars(memory, rows, [row["device_bytes"] / GIB for row in rows], "GiB of the fullest card")
        _bars(hours, rows, [row["epoch_h"] for row in rows], "hours of an epoch")
        memory.set_title(case["model"].rpartition("/")[2], loc="left", fontsize=9)
    figure.suptitle(
        f"Simulated, {TASK}, {values['hostfile']}: same rows and adapter (hatched: does not fit)", fontsize=10
    )
    figure.savefig(path, dpi=80)


def _bars(axis: Any, rows: Sequence[Values], lengths: Sequence[float], label: str) -> None:
    names = [row["method"] for row in rows]
    colours = ["tab:blue" if name.startswith("fedspeed") else "tab:grey" for name in names]
    bars = axis.barh(range(len(rows)), lengths, color=colours)
    for bar, row in zip(bars, rows, strict=True):
        bar.set_hatch("" if row["fits"] else "//")
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(label, fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
