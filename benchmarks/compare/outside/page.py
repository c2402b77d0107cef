"""The result as a table on the terminal, as a page and as a plot."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.outside.rows import NUMBERS, whole_runs
from benchmarks.compare.outside.task import ALONE, FEDERATION, ROUNDS

Values = Mapping[str, Any]
HEADINGS = {FEDERATION: "Three clients", ALONE: "What one client trains"}
ABOUT = {
    FEDERATION: """\
A federation of three clients, ten local steps a round; FedSpeed has a rank for each client if its row does
not say otherwise. It sums in the clear, as the others do. Flower's and NVFlare's clients evaluate each
aggregate; APPFL's server does, while its clients train on. FedSpeed's single rank computes on two threads and
the plain loop on as many as torch chooses; all other processes compute on one.""",
    ALONE: """\
No federation: the steps of one client, ten between two evaluations, with optimizer state that stays. With
two processes each takes half of every batch. A round is ten steps and the held-out rows.""",
}
NOTES = """\
- Every held-out loss of every round is held against the plain loop's on the same task; *equal* means to
  {tolerance:g}. *wrong*, *failed* and *not compared* rows do not count.
- *a round*: median of rounds 2 to {rounds} of all repetitions (least to most). The other columns are medians
  over the repetitions.
- The number beside a version is that of the packages in its environment.
- "Stock ZeRO-3 offload" of other pages is FedSpeed's stock tier, not accelerate's; here both are side by
  side. ZeRO-3 gathers the base in every step, so that it belongs between the cards of one host.
- RSS is summed over all processes of a run, also those that have left its session; a page that several share
  counts once for each. PSS counts it once.
- *loopback*: bytes sent over the interface of the run's own network namespace, so that nothing else counts.
  Whatever processes exchange in shared memory (Open MPI and Ray on one machine) is not in it.
{network}
- Flower's SuperNodes start a process for every message, its default; each loads PyTorch and the model.
- APPFL runs with its memory optimisation off, which is its fastest mode, and without the library of image
  metrics that it imports and the task does not use.
- accelerate and FedSpeed's stock tier step with torch's AdamW on the offloaded state, and without DeepSpeed's
  operator for inference, which would have to be compiled. accelerate would clip gradients to a norm of 1 by
  itself: its clipping is off, as everywhere here."""
ISOLATED = "- No run could reach another network: its namespace has no interface but the loopback."
SHARED = "- Runs took place in the machine's own network (no root): bytes were not counted."


def text_table(rows: Sequence[Values]) -> str:
    """Return the table for a terminal: medians, with the ratio to the plain loop of the same repetition."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        plain = next((row for row in own if row["reference"]), None)
        lines += [
            "",
            f"medians of {len(own[0]['runs'])}; ratio to the plain loop of the same repetition in brackets",
        ]
        lines.append(
            f"{'system':48} {'first aggregate s':>18} {'s a round':>15} {'command s':>15} {'RSS MB':>15} "
            f"{'PSS MB':>15}  {'loss, round ' + str(ROUNDS)}"
        )
        lines += [_text_row(row, plain) for row in own]
    return "\n".join(lines)


def _text_row(row: Values, plain: Values | None) -> str:
    runs = whole_runs(row)
    if not runs:
        return f"{row['name']:48} failed: {row['runs'][0]['failed']}"
    pairs = _pairs(row, plain)
    cells = []
    for key in ("first_aggregate_s", "round_s", "total_s", "rss_mb", "pss_mb"):
        value = statistics.median(measure_of(run, key) for run in runs)
        ratios = [measure_of(own, key) / measure_of(other, key) for own, other in pairs]
        ratio = f"({statistics.median(ratios):4.2f})" if ratios else ""
        cells.append(f"{value:8.2f} {ratio:>6}")
    text = f"{row['name']:48} {cells[0]:>18} " + " ".join(f"{cell:>15}" for cell in cells[1:])
    return f"{text}  {runs[0]['losses'][-1]:.6f} {row['verdict']}"


def _pairs(row: Values, plain: Values | None) -> list[tuple[Values, Values]]:
    """Return (run, the plain loop's) of each repetition in which neither has failed."""
    both = zip(row["runs"], plain["runs"]) if plain else ()
    return [(own, other) for own, other in both if "failed" not in own and "failed" not in other]


def measure_of(run: Values, key: str) -> float:
    """Return a measure of a run; `round_s` is the mean of its rounds after the first."""
    return statistics.mean(run["rounds_s"]) if key == "round_s" else run[key]


def page(values: Values) -> str:
    """Return the page in Markdown."""
    machine = values["machine"]
    task = values["task"]
    text = [
        "# FedSpeed beside other systems, measured from outside",
        f"\n{values['date']}, {machine['cores']} cores of {machine['processor']}, "
        f"{machine['memory_gib']} GiB,",
        f"torch {machine['torch']}. Repetitions, all systems in turn in each: {values['repeat']}.",
        "\n    python -m fedspeed bench outside\n",
        f"{task['model']}; {task['adapter']};\n{task['optimizer']}, batch {task['batch']} x {task['tokens']} "
        f"tokens, {task['steps']} local steps, {task['rounds']} rounds.",
    ]
    for name, heading in HEADINGS.items():
        rows = [row for row in values["rows"] if row["task"] == name]
        if rows:
            text.append(f"\n## {heading}\n\n{ABOUT[name]}\n\n{_table(rows)}")
    text.append(_left_out(values["left_out"]))
    network = ISOLATED if values["isolated"] else SHARED
    notes = NOTES.format(tolerance=values["tolerance"], rounds=ROUNDS, network=network)
    return "\n".join(text) + f"\n## What to know\n\n{notes}\n"


def _table(rows: Sequence[Values]) -> str:
    lines = [
        "| system | version, packages | first aggregate, s | a round, s | whole command, s | RSS, MB "
        "| PSS, MB | loopback, MB | losses |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    return "\n".join(lines + [_table_row(row) for row in rows])


def _table_row(row: Values) -> str:
    head = f"| {row['name']} | {row['package']} {row['version']}, {row['packages']} "
    if not whole_runs(row):
        return head + "| | | | | | | failed |"
    first, total, rss, pss = (row[key]["median"] for key in NUMBERS)
    seconds = row["round_s"]
    rounds = f"{seconds['median']:.2f} ({seconds['min']:.2f} to {seconds['max']:.2f})"
    sent = f"{row['loopback_mb']['median']:.1f}" if row["loopback_mb"] else ""
    return (
        f"{head}| {first:.1f} | {rounds} | {total:.1f} | {rss:,.0f} | {pss:,.0f} | {sent} | {_losses(row)} |"
    )


def _losses(row: Values) -> str:
    difference = row["largest_difference"]
    last = whole_runs(row)[0]["losses"][-1]
    if row["reference"] or difference is None:
        return f"{last:.6f}, {row['verdict']}"
    return f"{last:.6f}, {row['verdict']} (to {difference:.1e})"


def _left_out(entries: Sequence[Values]) -> str:
    if not entries:
        return ""
    lines = ["\n## What could not run here\n"]
    for entry in entries:
        # The words of a package or of pip are a block of their own: they may be long.
        lines += [
            f"**{entry['system']}**:",
            "",
            *(f"    {line}" for line in entry["reason"].splitlines()),
            "",
        ]
        if entry["elsewhere"]:
            lines += [f"For a GPU: `{entry['elsewhere']}` ([how](../../gpu/README.md)).", ""]
    return "\n".join(lines)


def draw(values: Values, path: Path) -> None:
    """Write the plot: seconds a round and memory of each row; the whiskers are the fastest and the slowest
    round.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in values["rows"] if whole_runs(row)]
    figure = Figure(figsize=(12, 1.5 + 0.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    seconds, memory = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    colours = ["tab:blue" if row["name"].startswith("FedSpeed") else "tab:grey" for row in rows]
    middle = [row["round_s"]["median"] for row in rows]
    below = [row["round_s"]["median"] - row["round_s"]["min"] for row in rows]
    above = [row["round_s"]["max"] - row["round_s"]["median"] for row in rows]
    seconds.barh(places, middle, xerr=(below, above), color=colours)
    seconds.set_xlabel("s a round: median, least and most")
    memory.barh(places, [row["rss_mb"]["median"] for row in rows], color="lightgrey", label="RSS")
    memory.barh(places, [row["pss_mb"]["median"] for row in rows], color=colours, height=0.5, label="PSS")
    memory.set_xlabel("MB of all processes: RSS (wide), PSS (narrow)")
    seconds.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    seconds.invert_yaxis()
    figure.savefig(path, dpi=80)
