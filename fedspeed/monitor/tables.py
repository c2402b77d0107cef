"""The tables of a report, as Markdown. Their rows and columns follow from the list of metrics."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedspeed.monitor.clock import STAGES
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import Metric, Value
from fedspeed.monitor.records import ClientRecord, RoundRecord, Summary
from fedspeed.units import loss_text, seconds_text

ESTIMATED = "≈"
ROUNDS_SHOWN = 21  # 20 and the losses before the first


def table(header: Sequence, rows: Iterable[Sequence], right: Iterable[int] = (), escape: bool = True) -> str:
    """Format a Markdown table; the columns with the numbers in `right` are right-aligned."""
    right = set(right)
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    cells = [[escape_cell(str(content)) if escape else content for content in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), rule, *cells])


def escape_cell(text: str) -> str:
    """Escape the text of a cell."""
    return " ".join(text.replace("|", "\\|").split()) or "-"


def results_table(summary: Summary) -> str:
    """Tabulate the results of a run: the losses, and every metric with a title."""
    where = f"round {summary.best_round}" if summary.best_round else "the start"
    best = "-" if summary.best_round is None else f"{loss_text(summary.best_val_loss)} ({where})"
    rows = [
        ("held-out loss, first", loss_text(summary.first_val_loss)),
        ("held-out loss, last", loss_text(summary.last_val_loss)),
        ("held-out loss, best", best),
        ("rounds", f"{summary.rounds} of {summary.total_rounds}"),
    ]
    for metric in registry.of_summary():
        value = getattr(summary, metric.name)
        if metric.title and _has_row(metric, value):
            rows.append((metric.title, metric.text(value)))
    rows += [("missing updates", str(summary.missing_count)), ("restarts", str(summary.restarts))]
    return table(("", ""), rows)


def rounds_to_show(records: Sequence[RoundRecord], best_round: int | None) -> list[RoundRecord]:
    """Select the rounds that a table shows.

    These are all of up to ROUNDS_SHOWN. Of more they are an even selection with the first and the last one,
    the best round, and every round that was skipped, or has a missing or clipped update.
    """
    if len(records) <= ROUNDS_SHOWN:
        return list(records)
    even = {round(index * (len(records) - 1) / (ROUNDS_SHOWN - 1)) for index in range(ROUNDS_SHOWN)}

    def is_shown(index: int, record: RoundRecord) -> bool:
        is_remarkable = bool(record.missing_count or record.clipped or record.skipped)
        return index in even or record.round == best_round or is_remarkable

    return [record for index, record in enumerate(records) if is_shown(index, record)]


def rounds_section(records: Sequence[RoundRecord], summary: Summary) -> str:
    """Tabulate the rounds: a column for every metric that has a heading and was measured."""
    shown = rounds_to_show(records, summary.best_round)
    columns = _measured(registry.of_round(), shown)
    rows = [(record.round, *(_round_cell(metric, record, summary) for metric in columns)) for record in shown]
    header = ("round", *(metric.column for metric in columns))
    text = table(header, rows, right=range(len(header)))
    if any(str(content).startswith(ESTIMATED) for row in rows for content in row):
        text += (
            f"\n\n{ESTIMATED}: the factor error is estimated from random probes, and right to "
            "about 40 % with one adapted matrix, 10 % with 16, 3 % with 200."
        )
    if len(shown) < len(records):
        text += f"\n\n{len(shown)} of {len(records)} rounds; all of them are in `rounds.jsonl`."
    return text


def time_section(records: Sequence[RoundRecord]) -> str:
    """Tabulate the wall time of all rounds by stage."""
    total = sum(record.seconds for record in records)
    rows = []
    for stage in (*STAGES, "other"):
        seconds = sum(getattr(record, f"{stage}_s") for record in records)
        rows.append((stage, seconds_text(seconds), f"{100 * seconds / total:.1f} %" if total else "-"))
    legend = (
        "Mean over the ranks, of the wall time of all rounds. `gather` fetches partitioned weights, "
        "`exchange` moves updates between clients, `idle` waits for others, `other` is evaluation, "
        "data and bookkeeping that no stage accounts for."
    )
    return f"{legend}\n\n{table(('stage', 'time', 'share'), rows, right=(1, 2))}"


def clients_table(records: Sequence[RoundRecord]) -> str:
    """Tabulate the clients over all rounds: sums, and the last measured values of ratios."""
    by_client: dict[int, list[ClientRecord]] = {}
    for record in records:
        for part in record.per_client:
            by_client.setdefault(part.client, []).append(part)
    missing = [client for record in records for client in record.missing]
    counted = [
        part.client
        for record in records
        for part in record.per_client
        if part.local_steps and part.client not in record.missing
    ]
    columns = _measured(registry.of_client(), [part for parts in by_client.values() for part in parts])
    rows = []
    for client in sorted(by_client.keys() | set(missing)):
        parts = by_client.get(client, [])
        rows.append((
            client,
            counted.count(client),
            missing.count(client),
            *(metric.text(_over_rounds(metric, parts)) for metric in columns),
        ))
    headings = (f"last {metric.column}" if metric.reduce == "ratio" else metric.column for metric in columns)
    header = ("client", "updates", "missing", *headings)
    return table(header, rows, right=range(len(header)))


def _has_row(metric: Metric, value: Value) -> bool:
    if value is None:
        return metric.always
    return bool(metric.row_from is None or value >= metric.row_from)


def _measured(metrics: Sequence[Metric], records: Sequence) -> list[Metric]:
    """Return the metrics with a column that were measured in any of the records."""
    return [
        metric
        for metric in metrics
        if metric.column and any(getattr(record, metric.name) is not None for record in records)
    ]


def _round_cell(metric: Metric, record: RoundRecord, summary: Summary) -> str:
    value = getattr(record, metric.name)
    text = CELLS[metric.name](value, record) if metric.name in CELLS else metric.text(value)
    is_best = metric.name == "val_loss" and record.round == summary.best_round
    return f"{text} (best)" if is_best else text


def _received_text(value: Value, record: RoundRecord) -> str:
    skipped = ", skipped" if record.skipped else ""
    return f"{value} of {record.clients}{skipped}" if record.clients else "-"


def _error_text(value: Value, record: RoundRecord) -> str:
    """Format the factor error with its significant digits."""
    if value is None:
        return "-"
    return f"{value:.2e}" if record.factor_error_exact else f"{ESTIMATED}{value:.0e}"


CellText = Callable[[Any, RoundRecord], str]
# Cells of the table of rounds that show more than the value.
CELLS: dict[str, CellText] = {"received": _received_text, "factor_error": _error_text}


def _over_rounds(metric: Metric, parts: Sequence[ClientRecord]) -> Value:
    """Reduce a client's values of all rounds: to the last measured ratio, or to the sum."""
    known = [value for part in parts if (value := getattr(part, metric.name)) is not None]
    if metric.reduce == "ratio":
        return known[-1] if known else None
    return sum(known)
