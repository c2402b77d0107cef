"""The figure of a split: each client's categories and the lengths of its rows."""

from dataclasses import replace
from typing import TYPE_CHECKING

from fedspeed.data.overview import NO_CATEGORY, SplitOverview
from fedspeed.monitor.plots import GREY, INK, RED, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CATEGORIES = 12  # with a colour and a legend entry of their own; the others are drawn as one
MAX_CLIENTS = 60
OTHERS = "(others)"


def split_figure(overview: SplitOverview, title: str) -> "Figure":
    """Draw the training rows of each of the first clients by category, and the distribution of their token
    lengths with data.max_tokens.
    """
    if len(overview.clients) > MAX_CLIENTS:
        title = f"{title}, the first {MAX_CLIENTS} of {len(overview.clients)}"
        overview = replace(overview, clients=overview.clients[:MAX_CLIENTS])
    figure = new_figure(11.0, 2.2 + 0.42 * len(overview.clients))
    figure.suptitle(title, x=0.015, ha="left", fontsize=13, fontweight="bold", color=INK, parse_math=False)
    rows, lengths = figure.subplots(1, 2, sharey=True)
    _draw_categories(rows, overview)
    _draw_lengths(lengths, overview)
    names = [f"client {client.client}" for client in overview.clients]
    rows.set_yticks(range(len(names)), names)
    rows.invert_yaxis()
    lengths.tick_params(axis="y", labelleft=False)
    return figure


def _draw_categories(axes: "Axes", overview: SplitOverview) -> None:
    from matplotlib import colormaps

    totals: dict[str, int] = {}
    for client in overview.clients:
        for name, count in client.categories.items():
            totals[name] = totals.get(name, 0) + count
    shown = sorted(totals, key=lambda name: -totals[name])[:MAX_CATEGORIES]
    bars = {name: [client.categories.get(name, 0) for client in overview.clients] for name in shown}
    if len(totals) > len(shown):
        sums = zip(*bars.values())
        bars[OTHERS] = [client.train - sum(counts) for client, counts in zip(overview.clients, sums)]
    left = [0] * len(overview.clients)
    for number, (name, counts) in enumerate(bars.items()):
        colour = GREY if name == OTHERS else colormaps["tab20"](number)
        axes.barh(range(len(counts)), counts, left=left, height=0.68, color=colour, label=name)
        left = [start + count for start, count in zip(left, counts)]
    if set(totals) == {NO_CATEGORY}:
        axes.set_title("training rows", loc="left", fontsize=10, color=INK)
        return
    axes.set_title("training rows by category", loc="left", fontsize=10, color=INK)
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.legend(
        handles, labels, frameon=False, fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.08)
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_lengths(axes: "Axes", overview: SplitOverview) -> None:
    lengths = [client.lengths for client in overview.clients]
    axes.boxplot(
        lengths,
        positions=range(len(lengths)),
        orientation="horizontal",
        whis=(0, 95),
        widths=0.5,
        manage_ticks=False,
        flierprops={"marker": ".", "markersize": 2, "markeredgecolor": GREY},
        medianprops={"color": INK},
    )
    axes.set_xscale("log")
    longest = max([overview.max_tokens, *(int(lengths[-1]) for lengths in lengths if len(lengths))])
    shortest = min([overview.max_tokens, *(int(lengths[0]) for lengths in lengths if len(lengths))])
    axes.set_xlim(shortest / 1.2, longest * 1.2)
    axes.set_xticks(_ticks(shortest, longest))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(overview.max_tokens, color=RED, linewidth=1.4, linestyle="--")
    axes.set_title(
        f"tokens of a row: quartiles, 95 %, longer ones; data.max_tokens={overview.max_tokens}",
        loc="left",
        fontsize=10,
        color=INK,
    )


def _ticks(shortest: int, longest: int) -> list[int]:
    """Return round numbers of tokens (1, 2 and 5 times powers of ten) from `shortest` to `longest`, at least
    one.
    """
    steps = [step * 10**power for power in range(8) for step in (1, 2, 5)]
    return [step for step in steps if shortest / 1.2 <= step <= longest * 1.2] or [longest]
