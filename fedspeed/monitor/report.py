"""The report of a run: `report.md`, `report.png`, where models are compared `comparison.png`, and
`summary.json` for programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from fedspeed.data.row_counts import DataReport
from fedspeed.data.usage import PromptFormat, fenced, snippet
from fedspeed.errors import EXIT_RESUMABLE
from fedspeed.files import write_atomically
from fedspeed.monitor import plots
from fedspeed.monitor.records import MissingUpdates, RoundRecord, Summary, lost_rounds_text
from fedspeed.monitor.summary_file import write_summary
from fedspeed.monitor.tables import (
    clients_table,
    escape_cell,
    results_table,
    rounds_section,
    table,
    time_section,
)
from fedspeed.monitor.trace import read_spans
from fedspeed.monitor.visibility import shows_everything, visible
from fedspeed.units import bytes_text, seconds_text

CLIPPED = (
    "a participant told a wrong size of its update, and what was beyond the sizes that all told was cut off"
)


@dataclass(frozen=True)
class Export:
    """What the run leaves behind. `folder` is absolute, or relative to the folder the reader stands in;
    `base` is a folder or hub name; `dtype` is the run's numeric type as torch calls it, in which the result
    computes what the run has computed; `prompt` is the format of the rows, `drawn` says that the base's
    weights are in no file, and `others` are the folders of the run's other models.
    """

    kind: Literal["adapter", "model"]
    folder: str
    base: str
    round: int  # 0: the start
    dtype: str = "float32"
    prompt: PromptFormat | None = None
    drawn: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What ran, and on what.

    Args:
        run: rows of "what ran", in order; holds nothing about single hosts or clients.
        hosts: one row per host, column -> text; in masked modes only their number is shown.
        export: None if nothing was exported.
        resume_command: what continues the run after a loss or a preemption.
        predicted: what the planner expected; None where it does not know the execution or the machine.
    """

    run: dict[str, str] = field(default_factory=dict)
    hosts: tuple[dict[str, str], ...] = ()
    export: Export | None = None
    resume_command: str = "the same command"
    predicted: "Predicted | None" = None


class Predicted(NamedTuple):
    device_bytes: int  # most that tensors take on the fullest device
    step_s: float | None  # of a local step on the slowest rank; None: how fast the machine is is not known


class ComparisonRow(NamedTuple):
    name: str
    held_out_loss: float
    accuracy: float | None  # share in [0, 1]; None: not measured


@dataclass(frozen=True)
class Comparison:
    """Models side by side on the same held-out items. `federated` names the row that is the result of the
    run.
    """

    rows: tuple[ComparisonRow, ...]
    federated: str = "federated"


def write_report(
    folder: Path,
    records: Sequence[RoundRecord],
    summary: Summary,
    config_text: str,
    facts: Facts,
    *,
    routing_mode: str,
    comparison: Comparison | None = None,
    plot: bool = True,
    data: DataReport | None = None,
) -> Path:
    """Write the report into `folder` and return the path of `report.md`. Each file is replaced as a whole,
    `summary.json` last: where it is, all are.

    In masked modes it shows counts and sums only; a comparison, which has a row per client, is left out
    there.
    """
    folder = Path(folder)
    records = [visible(record, routing_mode) for record in records]
    summary = visible(summary, routing_mode)
    if not shows_everything(routing_mode):
        comparison = None
    spans = read_spans(folder) if plot and shows_everything(routing_mode) else {}
    if spans:
        write_atomically(folder / "timeline.png", plots.png(plots.timeline_figure(spans)))
    text = report_text(
        folder.name,
        records,
        summary,
        config_text,
        facts,
        routing_mode=routing_mode,
        comparison=comparison,
        plot=plot,
        timeline=bool(spans),
        data=data,
    )
    write_atomically(folder / "report.md", text.encode())
    if plot and _trained(records):
        write_atomically(folder / "report.png", plots.png(plots.run_figure(records, summary, folder.name)))
    if plot and comparison:
        write_atomically(folder / "comparison.png", plots.png(plots.comparison_figure(comparison)))
    write_summary(folder, summary)
    return folder / "report.md"


def report_text(
    name: str,
    records: Sequence[RoundRecord],
    summary: Summary,
    config_text: str,
    facts: Facts,
    *,
    routing_mode: str,
    comparison: Comparison | None,
    plot: bool,
    timeline: bool = False,
    data: DataReport | None = None,
) -> str:
    """The Markdown of the report. `records` and `summary` are what `visible` leaves of them."""
    sections = [
        f"# Run `{name}`: {summary.status}",
        _status(summary, facts),
        "## Result\n\n" + results_table(summary),
    ]
    if comparison:
        sections.append(_comparison_section(comparison, plot))
    sections.append("## Use it\n\n" + _usage(facts.export))
    if plot and _trained(records):
        sections.append("## Curves\n\n![losses, time per round and speed over the rounds](report.png)")
    sections.append("## What ran\n\n" + _what_ran(facts, routing_mode))
    if data:
        sections.append("## Rows\n\n" + _rows_section(data))
    if records:
        sections.append("## Rounds\n\n" + rounds_section(records, summary))
        sections.append("## Where the time went\n\n" + time_section(records))
    if timeline:
        sections.append(
            "## What ranks did when\n\n![a row for each rank](timeline.png)\n\n"
            "Of the first rounds; all of it is in the files of `trace/`, "
            "for https://ui.perfetto.dev."
        )
    if facts.predicted and summary.device_bytes:
        sections.append("## Predicted and measured\n\n" + _prediction(facts.predicted, summary))
    if any(record.per_client for record in records):
        sections.append("## Clients\n\n" + clients_table(records))
    sections.append("## Missing updates and restarts\n\n" + _failures(summary))
    sections.append(_configuration(config_text))
    return "\n\n".join(sections) + "\n"


def missing_text(gap: MissingUpdates) -> str:
    """`round 3: 2 updates (clients 1 and 4)`, without the clients where they may not be known."""
    text = f"round {gap.round}: {_count(gap.count, 'update')}"
    if not gap.clients:
        return text
    names = [str(client) for client in gap.clients]
    if len(names) == 1:
        return f"{text} (client {names[0]})"
    return f"{text} (clients {', '.join(names[:-1])} and {names[-1]})"


def _trained(records: Sequence[RoundRecord]) -> bool:
    """Whether there is anything to draw."""
    return any(record.round for record in records)


def _status(summary: Summary, facts: Facts) -> str:
    rounds = f"{summary.rounds} of {summary.total_rounds} rounds"
    took = f"in {seconds_text(summary.seconds)}"
    head = {
        "finished": f"**Finished**: {rounds} {took}.",
        "early stop": f"**Stopped early**, as configured: {rounds} {took}.",
        "preempted": f"**PREEMPTED** after {rounds} {took}: the scheduler asked the run to end.",
        "failed": f"**FAILED** after {rounds} {took}.",
    }[summary.status]
    lines = [head]
    if summary.reason:
        lines.append(_sentence(summary.reason))
    if summary.missing:
        verb = "is" if summary.missing_count == 1 else "are"
        lines.append(
            f"**{_count(summary.missing_count, 'update')} {verb} missing** from the result: "
            "see [below](#missing-updates-and-restarts)."
        )
    if summary.clipped:
        values = _count(summary.clipped, "value")
        lines.append(f"**{values} of the updates counted for less than they should**: {CLIPPED}.")
    if summary.absent:
        text = lost_rounds_text(summary.absent)
        lines.append(
            f"{text[0].upper()}{text[1:]} from `rounds.jsonl`: the numbers below are without "
            f"{'them' if len(summary.absent) > 1 else 'it'}."
        )
    if summary.exit_code:
        lines.append(f"Exit code {summary.exit_code}.")
    if summary.exit_code == EXIT_RESUMABLE:
        lines.append(f"To continue from the last finished round: {facts.resume_command}.")
    return "\n".join(f"> {line}  " for line in lines).rstrip()


def comparison_text(comparison: Comparison) -> str:
    """The comparison as lines for a terminal."""
    wide = max(len(row.name) for row in comparison.rows)
    lines = []
    for row in comparison.rows:
        accuracy = "" if row.accuracy is None else f"  right answers {100 * row.accuracy:5.1f} %"
        lines.append(f"  {row.name:<{wide}}  held-out loss {row.held_out_loss:7.4f}{accuracy}")
    return "\n".join(lines)


def _comparison_section(comparison: Comparison, plot: bool) -> str:
    rows = []
    for row in comparison.rows:
        accuracy = "-" if row.accuracy is None else f"{100 * row.accuracy:.1f} %"
        cells = (row.name, f"{row.held_out_loss:.4f}", accuracy)
        mark = "**" if row.name == comparison.federated else ""
        rows.append(tuple(f"{mark}{escape_cell(content)}{mark}" for content in cells))
    text = (
        "## Federated against alone\n\nAll models answer the same held-out items, those of every client.\n\n"
    )
    text += table(("model", "held-out loss", "accuracy"), rows, right=(1, 2), escape=False)
    return text + ("\n\n![held-out loss and accuracy of each model](comparison.png)" if plot else "")


def _usage(export: Export | None) -> str:
    if export is None:
        return "Nothing was exported."
    whence = f"round {export.round}" if export.round else "the start, which no round beat,"
    key, what = ("model.base", "Hugging Face") if export.kind == "model" else ("adapter.start_from", "PEFT")
    code = snippet(export.kind, export.folder, export.base, export.dtype, export.prompt)
    text = f"The {export.kind} of {whence} is an ordinary {what} folder"
    is_usable = not export.drawn or export.kind != "adapter"
    if not is_usable:
        text += (
            ". The base's weights were drawn at random and are in no file, "
            "so that only a run with the same seed can use it."
        )
    else:
        text += f":\n\n{fenced(code, 'python')}"
    if export.prompt:
        asked = f"`fedspeed chat {export.folder}` asks it in a terminal. " if is_usable else ""
        text += f"\n\n{asked}The prompt:\n\n{export.prompt.to_markdown()}"
    if export.others:
        named = ", ".join(f"`{folder}/`" for folder in export.others)
        text += (
            f"\n\nThat is what all clients have in common. Other models of the run: {named}, in the "
            "run's folder; a client's own on the host of the client."
        )
    return f"{text}\n\nTo train on from it: `{key}={export.folder}`."


def _what_ran(facts: Facts, routing_mode: str) -> str:
    text = table(("", ""), [*facts.run.items(), ("routing mode", routing_mode)])
    if not facts.hosts:
        return text
    if not shows_everything(routing_mode):
        return (
            f"{text}\n\n{len(facts.hosts)} hosts; "
            "in this routing mode a report does not describe them one by one."
        )
    columns = list(dict.fromkeys(column for host in facts.hosts for column in host))
    rows = [[host.get(column, "-") for column in columns] for host in facts.hosts]
    return f"{text}\n\n{table(columns, rows)}"


def _rows_section(data: DataReport) -> str:
    """What of the clients' text was trained on and evaluated with."""
    parts = [*(f"> {note}." for note in data.notes), f"{data.table.line()}."]
    if data.table.clients and data.table.total.harmed:
        rows = [(client, of.rows, of.kept, of.cut, of.lost) for client, of in enumerate(data.table.clients)]
        parts.append(table(("client", "rows", "kept", "of them cut", "lost"), rows, right=range(5)))
    return "\n\n".join(parts)


def _prediction(predicted: Predicted, summary: Summary) -> str:
    """The planner's numbers beside those of the run."""
    rows = [
        (
            "device memory of the fullest rank",
            bytes_text(predicted.device_bytes),
            bytes_text(summary.device_bytes),
            _off(predicted.device_bytes, summary.device_bytes),
        )
    ]
    if predicted.step_s is not None and summary.step_s:
        rows.append((
            "a local step of the slowest rank",
            f"{predicted.step_s:.3f} s",
            f"{summary.step_s:.3f} s",
            _off(predicted.step_s, summary.step_s),
        ))
    legend = (
        "For the longest row of the reporting rank's clients; see docs/planner.md. "
        "Tensors only: driver and libraries are not in it."
    )
    return f"{legend}\n\n{table(('', 'predicted', 'measured', 'off by'), rows, right=(1, 2, 3))}"


def _off(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.0f} %"


def _failures(summary: Summary) -> str:
    restarts = f"{_count(summary.restarts, 'restart')}."
    if not summary.missing:
        return f"Every update of every finished round arrived. {restarts}"
    gaps = (f"- {missing_text(gap)}" for gap in summary.missing)
    return "\n".join(["These updates are not in the result:\n", *gaps, f"\n{restarts}"])


def _configuration(config_text: str) -> str:
    fence = "~~~"
    while fence in config_text:  # a fence ends at the first run of tildes that is as long
        fence += "~"
    block = f"{fence}yaml\n{config_text.rstrip()}\n{fence}"
    heading = "## Configuration\n\n<details><summary>the resolved configuration</summary>"
    return f"{heading}\n\n{block}\n\n</details>"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else text + "."
