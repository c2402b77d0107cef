"""The figures of a run, and their rendering as PNG.

Figures are built without pyplot, so no display is needed and no global state is touched.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedspeed.monitor.comparison import Comparison, ComparisonRow
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import Metric
from fedspeed.monitor.records import RoundRecord, Summary
from fedspeed.monitor.trace import Span
from fedspeed.units import seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito: distinguishable with any colour vision, and in grey.
BLUE = "#0072B2"
SKY = "#56B4E9"
GREEN = "#009E73"
ORANGE = "#E69F00"
RED = "#D55E00"
GREY = "#BBBBBB"
INK = "#333333"
STAGE_COLOURS = {"compute": BLUE, "gather": SKY, "exchange": ORANGE, "idle": GREY, "other": "#E8E8E8"}
TRACE_COLOURS = {
    "compute": BLUE,
    "load": SKY,
    "gather": SKY,
    "step": GREEN,
    "wait": GREY,
    "idle": GREY,
    "send": ORANGE,
    "exchange": RED,
}
MAX_BARS = 400  # of each rank in a timeline
DPI = 130
FEW_ROUNDS = 5
MANY_ROUNDS = 40


def run_figure(records: Sequence[RoundRecord], summary: Summary, title: str) -> "Figure":
    """Draw the losses with the best round, the time per round by stage, and a chart for each measured metric
    that has one (`Metric.panel`), all over the rounds. At least one round must have been trained.
    """
    from matplotlib.ticker import MaxNLocator

    with_chart = [metric for metric in registry.of_round() if metric.panel]
    charts = [(metric, shown) for metric in with_chart if (shown := _charted(metric, records))]
    figure = new_figure(9.0, 7.8 + 1.8 * len(charts))
    heading = (
        f"{title}: {summary.status}, {summary.rounds} of {summary.total_rounds} rounds "
        f"in {seconds_text(summary.seconds)}"
    )
    figure.suptitle(heading, x=0.015, ha="left", fontsize=13, fontweight="bold", color=INK, parse_math=False)
    heights = [2.2, 1.2, *(0.8 for _ in charts)]
    panels = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
    loss, seconds, *others = panels
    _draw_losses(loss, records, summary)
    _draw_seconds(seconds, [record for record in records if record.round])
    for axes, (metric, shown) in zip(others, charts):
        _draw_chart(axes, metric, shown)
    last = figure.axes[-1]
    last.set_xlabel("round")
    rounds = [record.round for record in records]
    margin = max(0.6, 0.02 * (rounds[-1] - rounds[0]))
    last.set_xlim(rounds[0] - margin, rounds[-1] + margin)
    last.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if len(rounds) <= FEW_ROUNDS:
        last.set_xticks(rounds)  # on a short axis the integer locator would fall back to fractions
    return figure


def comparison_figure(comparison: Comparison) -> "Figure":
    """Draw bars for each row of a comparison: held-out loss, and accuracy if every row has one."""
    rows = comparison.rows
    with_accuracy = all(row.accuracy is not None for row in rows)
    figure = new_figure(9.0, 1.5 + 0.42 * len(rows))
    panels = figure.subplots(1, 1 + with_accuracy, sharey=True, squeeze=False)[0]
    colours = [GREEN if row.name == comparison.federated else GREY for row in rows]
    losses = [row.held_out_loss for row in rows]
    _draw_bars(panels[0], rows, losses, [f"{loss:.3f}" for loss in losses], colours)
    panels[0].set_title("held-out loss (lower is better)", loc="left", fontsize=10, color=INK)
    if with_accuracy:
        percents = [100 * row.accuracy for row in rows if row.accuracy is not None]
        _draw_bars(panels[1], rows, percents, [f"{percent:.1f} %" for percent in percents], colours)
        panels[1].set_title("held-out accuracy (higher is better)", loc="left", fontsize=10, color=INK)
        panels[1].set_xlim(0, 118)
        panels[1].set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        panels[1].tick_params(axis="y", labelleft=False)
    return figure


def timeline_figure(spans: Mapping[int, Sequence[Span]]) -> "Figure":
    """Draw the work of all ranks over time: a row for each rank, a bar for each span, and thin bars below for
    exchanges and sends.

    Args:
        spans: by rank (`trace.read_spans`).
    """
    figure = new_figure(11.0, 1.4 + 0.5 * len(spans))
    axes = figure.subplots()
    until = _legible(spans)
    for row, of_rank in enumerate(spans.values()):
        inside = [span for span in of_rank if span[2] < until]
        detailed = any(kind in ("compute", "wait") for kind, *_ in inside)
        for kind, colour in TRACE_COLOURS.items():
            bars = [
                (begin, min(end, until) - begin)
                for k, name, begin, end in inside
                if (name if k == "stage" and not detailed else k) == kind
            ]
            thin = kind in ("send", "exchange")
            height = (row + 0.34, 0.1) if thin else (row - 0.3, 0.6)
            axes.broken_barh(bars, height, color=colour, linewidth=0)
    axes.set_yticks(range(len(spans)), [f"rank {rank}" for rank in spans])
    axes.invert_yaxis()
    axes.set_xlim(0, until)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}s")
    names: dict[str, list[str]] = {}
    for kind, colour in TRACE_COLOURS.items():
        names.setdefault(colour, []).append(kind)
    handles = [axes.barh([0], [0], color=colour) for colour in names]
    axes.legend(
        handles,
        [", ".join(kinds) for kinds in names.values()],
        frameon=False,
        fontsize=9,
        ncols=len(names),
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    return figure


def _legible(spans: Mapping[int, Sequence[Span]]) -> float:
    """Return the seconds from the start in which no rank has more than MAX_BARS spans."""
    ends = [sorted(begin for _, _, begin, _ in of_rank)[: MAX_BARS + 1] for of_rank in spans.values()]
    last = max((end for of_rank in spans.values() for *_, end in of_rank), default=1.0)
    return min([last, *(begins[-1] for begins in ends if len(begins) > MAX_BARS)]) or 1.0


def png(figure: "Figure") -> bytes:
    """Apply the common style to a figure and render it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=9)
        axes.yaxis.label.set_color(INK)
        axes.xaxis.label.set_color(INK)
        axes.grid(axis="x" if axes.yaxis_inverted() else "y", color="#EEEEEE", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.align_ylabels()
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _draw_losses(axes: "Axes", records: Sequence[RoundRecord], summary: Summary) -> None:
    trained = [record for record in records if record.train_loss is not None]
    held_out = [record for record in records if record.val_loss is not None]
    marker = "o" if len(records) <= MANY_ROUNDS else None
    if trained:
        axes.plot(
            [r.round for r in trained],
            [r.train_loss for r in trained],
            color=ORANGE,
            marker=marker,
            markersize=3.5,
            linewidth=1.4,
            label="training",
        )
    if held_out:
        axes.plot(
            [r.round for r in held_out],
            [r.val_loss for r in held_out],
            color=BLUE,
            marker=marker,
            markersize=4.5,
            linewidth=2.0,
            label="held out",
        )
    if not (trained or held_out):
        axes.text(0.5, 0.5, "losses are hidden", ha="center", color=INK, transform=axes.transAxes)
        axes.set_yticks([])
    _mark_best(axes, summary)
    _mark_gaps(axes, records, summary)
    _mark_divergence(axes, records)
    axes.set_ylabel("loss per answer token")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)


def _mark_best(axes: "Axes", summary: Summary) -> None:
    if summary.best_round is not None and summary.best_val_loss is not None:
        axes.plot(
            [summary.best_round],
            [summary.best_val_loss],
            color=GREEN,
            marker="*",
            markersize=15,
            linestyle="none",
            zorder=5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label=f"best: {summary.best_val_loss:.4f} in round {summary.best_round}",
        )


def _mark_gaps(axes: "Axes", records: Sequence[RoundRecord], summary: Summary) -> None:
    """Mark the rounds that lack an update."""
    first = records[0].round
    last = records[-1].round
    gaps = sorted({gap.round for gap in summary.missing if first <= gap.round <= last})
    for number, round_number in enumerate(gaps):
        axes.axvline(
            round_number,
            color=RED,
            linestyle=":",
            linewidth=1.4,
            zorder=1,
            label=None if number else "an update is missing",
        )


def _mark_divergence(axes: "Axes", records: Sequence[RoundRecord]) -> None:
    """Mark the first round with a loss that is not finite."""
    diverged = [
        r.round
        for r in records
        for loss in (r.train_loss, r.val_loss)
        if loss is not None and not math.isfinite(loss)
    ]
    if diverged:
        axes.axvline(min(diverged), color=RED, linewidth=1.4, label=f"not finite from round {min(diverged)}")


def _draw_seconds(axes: "Axes", records: Sequence[RoundRecord]) -> None:
    rounds = [record.round for record in records]
    floor = [0.0] * len(records)
    width = 0.8 if len(records) <= MANY_ROUNDS else 1.0
    for stage, colour in STAGE_COLOURS.items():  # in the order of the report's table
        values = [getattr(record, f"{stage}_s") for record in records]
        axes.bar(rounds, values, bottom=floor, width=width, color=colour, label=stage, linewidth=0)
        floor = [below + value for below, value in zip(floor, values)]
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}s" if value < 60 else seconds_text(value))
    axes.set_ylabel("time per round")
    _from_zero(axes, floor)
    axes.legend(
        frameon=False,
        fontsize=9,
        ncols=len(STAGE_COLOURS),
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.98),
        handlelength=1.2,
    )


def _charted(metric: Metric, records: Sequence[RoundRecord]) -> list[tuple[int, float]]:
    """Return (round, value) of a metric's points. Round 0 is included for metrics of the evaluation."""
    wanted = [record for record in records if record.round or metric.per == "client" or metric.task]
    return [(r.round, value) for r in wanted if (value := getattr(r, metric.name)) is not None]


def _draw_chart(axes: "Axes", metric: Metric, shown: list[tuple[int, float]]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    marker = "o" if len(shown) <= MANY_ROUNDS else None
    rounds, values = zip(*shown)
    colour = BLUE if metric.unit == "accuracy" else GREEN
    axes.plot(rounds, values, color=colour, linewidth=1.6, marker=marker, markersize=3.5)
    is_share = metric.unit in ("share", "accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0) if is_share else EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.set_ylabel(metric.panel)
    if metric.unit != "loss":
        _from_zero(axes, values)


def _from_zero(axes: "Axes", values: Sequence[float]) -> None:
    """Begin the axis at 0, with a margin above the highest value."""
    axes.set_ylim(0, 1.12 * max(values) or 1.0)


def _draw_bars(
    axes: "Axes",
    rows: Sequence[ComparisonRow],
    values: Sequence[float],
    texts: Sequence[str],
    colours: Sequence[str],
) -> None:
    bars = axes.barh(range(len(rows)), values, color=colours, height=0.68)
    axes.bar_label(bars, labels=texts, padding=4, fontsize=9, color=INK)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], parse_math=False)
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.16)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches, with the common background and layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure
