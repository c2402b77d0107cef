"""The plot of a comparison: losses against tokens and against time, memory, and a round by cause."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.compare.measured.records import CAUSES, Bench, Run
from fedspeed.monitor.plots import DPI, INK, STAGE_COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30
STYLES = ("-", "--", ":", "-.")


def draw(bench: Bench, path: Path) -> None:
    """Draw the comparison as PNG; curves are those of the first seed that an arm has finished."""
    figure = new_figure(11.0, 8.0)
    ((by_tokens, by_time), (memory, causes)) = figure.subplots(2, 2)
    arms = {name: title for name, title in bench.setting.arms.items() if bench.of(name)}
    first = {name: next(iter(bench.of(name).values())) for name in arms}
    for number, (name, title) in enumerate(arms.items()):
        run = first[name]
        style = {**line_style(number), "label": title}
        known = [point for point in run.curve if point.loss is not None]
        by_tokens.plot([p.tokens for p in known], [p.loss for p in known], **style)
        by_time.plot([p.seconds for p in known], [p.loss for p in known], **style)
    by_tokens.set_xlabel("answer tokens")
    by_time.set_xlabel("seconds of rounds")
    for axes in (by_tokens, by_time):
        axes.set_ylabel("held-out loss per answer token")
        axes.set_yscale("log")
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
    by_tokens.legend(fontsize=7)
    _bars(memory, {arms[name]: _median_gib(bench, name) for name in arms}, "device memory of a rank [GiB]")
    if bench.setting.cap_gib is not None:
        memory.axvline(bench.setting.cap_gib, color=INK, linestyle="--", linewidth=1)
    _stacked(causes, {arms[name]: first[name] for name in arms})
    figure.savefig(path, dpi=DPI)


def line_style(number: int) -> dict[str, str]:
    """Return colour and dashes of a line, so that neighbours differ in grey too."""
    return {"color": f"C{number % 10}", "linestyle": STYLES[number // 3 % len(STYLES)]}


def _median_gib(bench: Bench, name: str) -> float:
    peaks = [run.device_bytes for run in bench.of(name).values() if run.device_bytes is not None]
    return statistics.median(peaks) / GIB if peaks else 0.0


def _bars(axes: "Axes", values: dict[str, float], label: str) -> None:
    titles = list(values)[::-1]
    axes.barh(titles, [values[title] for title in titles], color=STAGE_COLOURS["compute"])
    axes.set_xlabel(label)
    axes.tick_params(axis="y", labelsize=7)


def _stacked(axes: "Axes", runs: dict[str, Run]) -> None:
    titles = list(runs)[::-1]
    left = [0.0] * len(titles)
    for cause in (*CAUSES, "other"):
        widths = [runs[title].causes[cause] for title in titles]
        axes.barh(titles, widths, left=left, color=STAGE_COLOURS[cause], label=cause)
        left = [a + b for a, b in zip(left, widths)]
    axes.set_xlabel("seconds of a round by cause, mean over ranks")
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=7)
