"""Bars of emulated rounds, with a mark where the simulator has them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Values = Mapping[str, Any]


def draw(runs: Sequence[Values], path: Path) -> None:
    """Write the plot: a panel for each group of runs of one model and number of clients."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, list[Values]] = {}
    for run in runs:
        groups.setdefault(run["key"].partition(" | ")[2], []).append(run)
    figure = Figure(figsize=(8, 1.2 + 2.6 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, of_group) in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups.items()):
        axis.barh(range(len(of_group)), [run["emulated"]["round"] for run in of_group], color="tab:blue")
        for number, run in enumerate(of_group):
            axis.plot([run["simulated"]["round"]] * 2, [number - 0.4, number + 0.4], "k", linewidth=1.5)
        axis.set_yticks(range(len(of_group)), [run["way"] for run in of_group], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("seconds of a round (bar: emulated; line: simulated)", fontsize=8)
        axis.set_title(title, loc="left", fontsize=8)
    figure.savefig(path, dpi=80)
