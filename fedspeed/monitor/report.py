"""The report of a run: `report.md`, `report.png`, `comparison.png` if models are compared, and `summary.json`
for programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from fedspeed.data.prompting import PromptFormat, fenced, snippet
from fedspeed.data.row_counts import DataReport
from fedspeed.errors import EXIT_RESUMABLE
from fedspeed.files import write_atomically
from fedspeed.monitor import plots
from fedspeed.monitor.comparison import Comparison
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
    "a participant reported a wrong size of its update, and what exceeded the reported sizes was cut off"
)
SKIPPED = (
    "these updates had been summed before, over other participants, and a second sum could reveal a single "
    "update; so they were discarded, and the state stayed as it was"
)


@dataclass(frozen=True)
class Export:
    """The exported result of a run.

    Attributes:
        folder: absolute, or relative to the folder that the reader is in.
        base: a folder or a hub name.
        round: the exported round; 0: the start.
        dtype: the run's numeric type, as torch calls it.
        prompt: the format of the rows.
        drawn: whether the base's weights were drawn at random, so that they are in no file.
        others: folders of the run's other models.
    """

    kind: Literal["adapter", "model"]
    folder: str
    base: str
    round: int
    dtype: str = "float32"
    prompt: PromptFormat | None = None
    drawn: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Facts about a run that the records do not contain.

    Attributes:
        run: rows of the section "What ran", in order; nothing about single hosts or clients.
        hosts: one row a host, column -> text; in masked modes only their number is shown.
        export: None if nothing was exported.
        resume_command: the command that continues the run after a failure or a preemption.
        predicted: the planner's prediction; None if it does not model the execution.
        evaluated: what losses and scores are of, where that is not the exported model; else empty.
    """

    run: dict[str, str] = field(default_factory=dict)
    hosts: tuple[dict[str, str], ...] = ()
    export: Export | None = None
    resume_command: str = "the same command"
    predicted: "Predicted | None" = None
    evaluated: str = ""


class Predicted(NamedTuple):
    """The planner's prediction of a run.

    Attributes:
        device_bytes: peak bytes of tensors on the fullest device.
        step_s: seconds of a local step on the slowest rank; None: the speed of the machine is unknown.
    """

    device_bytes: int
    step_s: float | None


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
    """Write the report into `folder` and return the path of `report.md`.

    Each file is replaced as a whole, `summary.json` last: if it exists, all others do. In masked modes the
    report shows counts and sums only, without a comparison, which has a row for each client.
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
    """Return the Markdown of the report. Pass only `records` and a `summary` that outputs may show
    (`visible`).
    """
    sections = [
        f"# Run `{name}`: {summary.status}",
        _status(summary, facts),
        "## Result\n\n" + _results(summary, facts),
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


def _results(summary: Summary, facts: Facts) -> str:
    """Return the table of results, and what was evaluated where that is not what was exported."""
    if not facts.evaluated:
        return results_table(summary)
    return f"{results_table(summary)}\n\nLosses and scores of the rounds are of {facts.evaluated}."


def missing_text(gap: MissingUpdates) -> str:
    """Describe missing updates: `round 3: 2 updates (clients 1 and 4)`, without clients that may not be
    known.
    """
    text = f"round {gap.round}: {_count(gap.count, 'update')}"
    if not gap.clients:
        return text
    names = [str(client) for client in gap.clients]
    if len(names) == 1:
        return f"{text} (client {names[0]})"
    return f"{text} (clients {', '.join(names[:-1])} and {names[-1]})"


def _trained(records: Sequence[RoundRecord]) -> bool:
    """Tell whether any round was trained."""
    return any(record.round for record in records)


def _status(summary: Summary, facts: Facts) -> str:
    rounds = f"{summary.rounds} of {summary.total_rounds} rounds"
    took = f"in {seconds_text(summary.seconds)}"
    head = {
        "finished": f"**Finished**: {rounds} {took}.",
        "early stop": f"**Stopped early**, as configured: {rounds} {took}.",
        "preempted": f"**PREEMPTED** after {rounds} {took}: the run was asked to end.",
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
    if summary.skipped:
        lines.append(f"**{_count(summary.skipped, 'round')} skipped**: {SKIPPED}.")
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
    source = f"round {export.round}" if export.round else "the start, which no round beat,"
    key, library = (
        ("model.base", "Hugging Face") if export.kind == "model" else ("adapter.start_from", "PEFT")
    )
    code = snippet(export.kind, export.folder, export.base, export.dtype, export.prompt)
    text = f"The {export.kind} of {source} is an ordinary {library} folder"
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
            f"{text}\n\n{_count(len(facts.hosts), 'host')}; in this routing mode a report does not describe "
            "single hosts."
        )
    columns = list(dict.fromkeys(column for host in facts.hosts for column in host))
    rows = [[host.get(column, "-") for column in columns] for host in facts.hosts]
    return f"{text}\n\n{table(columns, rows)}"


def _rows_section(data: DataReport) -> str:
    """Describe how much of the clients' text was used for training and evaluation."""
    parts = [*(f"> {note}." for note in data.notes), f"{data.table.line()}."]
    if data.table.clients and data.table.total.harmed:
        rows = [(client, of.rows, of.kept, of.cut, of.lost) for client, of in enumerate(data.table.clients)]
        parts.append(table(("client", "rows", "kept", "of them cut", "lost"), rows, right=range(5)))
    return "\n\n".join(parts)


def _prediction(predicted: Predicted, summary: Summary) -> str:
    """Compare the planner's prediction with the run."""
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
        discarded = "; those of skipped rounds were discarded" if summary.skipped else ""
        return f"Every update of every finished round arrived{discarded}. {restarts}"
    gaps = (f"- {missing_text(gap)}" for gap in summary.missing)
    return "\n".join(["These updates are not in the result:\n", *gaps, f"\n{restarts}"])


def _configuration(config_text: str) -> str:
    fence = "~~~"
    while fence in config_text:  # a fence ends at the first line with as many tildes
        fence += "~"
    block = f"{fence}yaml\n{config_text.rstrip()}\n{fence}"
    heading = "## Configuration\n\n<details><summary>the resolved configuration</summary>"
    return f"{heading}\n\n{block}\n\n</details>"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else text + "."
