"""The monitor of the reporting rank: progress, event file, round log and report behind one interface."""

from pathlib import Path
from typing import TextIO

from fedspeed.data.row_counts import DataReport, RowTable
from fedspeed.monitor.comparison import Comparison, comparison_text
from fedspeed.monitor.config import MonitorConfig
from fedspeed.monitor.metrics.metric import LOSSES, NOTHING
from fedspeed.monitor.progress import NotesOnly, Progress
from fedspeed.monitor.records import MissingUpdates, RoundRecord, Summary, lost_rounds, lost_rounds_text
from fedspeed.monitor.report import CLIPPED, SKIPPED, Facts, missing_text, write_report
from fedspeed.monitor.round_log import RoundLog
from fedspeed.monitor.stdout import JsonLines, NoJson
from fedspeed.monitor.tensorboard import TensorBoardWriter
from fedspeed.monitor.visibility import shows_everything, visible
from fedspeed.units import loss_text, seconds_text


class Monitor:
    """Shows and records the progress and results of a run, as far as the routing mode allows.

    Args:
        folder: folder of the run, for `rounds.jsonl`, `tensorboard/`, `report.md`, `report.png`,
            `comparison.png` and `summary.json`.
        total_rounds: rounds of the whole run, including those before a restart.
        json_out: the stream that `claim_stdout` has returned, or None without `--json`.
        resume_round: the last finished round that is kept; 0 for a fresh start.
        config_text: the resolved configuration.
        data: counts of the rows; without those of single clients in masked modes.
        hides: the information that transforms of updates hide (monitor.metrics.metric.REVEALABLE).
        progress_stream: the stream of the progress line; None: stderr.
    """

    def __init__(
        self,
        folder: Path,
        config: MonitorConfig,
        routing_mode: str,
        total_rounds: int,
        *,
        json_out: TextIO | None = None,
        resume_round: int = 0,
        config_text: str = "",
        data: DataReport | None = None,
        hides: frozenset[str] = NOTHING,
        progress_stream: TextIO | None = None,
    ):
        self._folder = Path(folder)
        self._config = config
        self._routing_mode = routing_mode
        self._hides = hides
        self._config_text = config_text
        self._data = data
        self._log = RoundLog(self._folder / "rounds.jsonl", resume_round)
        self._records = list(self._log.read())
        self._lost = lost_rounds(self._records, resume_round) if resume_round else ()
        self._events: TensorBoardWriter | None = None
        if config.tensorboard:
            events = self._folder / "tensorboard"
            self._events = TensorBoardWriter(events, resume_round, routing_mode, config_text)
        self._json: JsonLines | NoJson = JsonLines(json_out) if json_out else NoJson()
        self._progress: Progress | NotesOnly
        if config.progress:
            self._progress = Progress(total_rounds, progress_stream, resume_round)
        else:
            self._progress = NotesOnly(progress_stream)
        if self._lost:
            pronoun = "them" if len(self._lost) > 1 else "it"
            self._progress.note(
                f"fedspeed: {self._folder / 'rounds.jsonl'}: {lost_rounds_text(self._lost)}; "
                f"the report lacks {pronoun}, the trained state does not"
            )
        if data is not None:
            self._progress.note(f"fedspeed: {data.table.line()}")
            for note in data.notes:
                self._progress.note(f"fedspeed: {note}")

    @property
    def row_table(self) -> RowTable | None:
        """The counts of the rows, if this run counted them."""
        return self._data.table if self._data else None

    @property
    def records(self) -> tuple[RoundRecord, ...]:
        """Return the visible records of all finished rounds, including those before a restart, for
        `summarise`.
        """
        return tuple(self._records)

    @property
    def absent(self) -> tuple[int, ...]:
        """Return the rounds before this start whose records are lost."""
        return self._lost

    def step(self, round_number: int, local_step: int, local_steps: int, loss: float | None = None) -> None:
        """Show that this rank has finished `local_step` (from 1) of `local_steps`.

        The loss is that of this rank alone, so it is shown only in `plain`, if no transform of updates hides
        losses.
        """
        shown = loss if shows_everything(self._routing_mode) and LOSSES not in self._hides else None
        self._progress.step(round_number, local_step, local_steps, shown)

    def round(self, record: RoundRecord) -> None:
        """Log a finished round, then show it."""
        record = visible(record, self._routing_mode)
        self._log.append(record)
        self._records.append(record)
        if self._events:
            self._events.round(record)
        self._json.write("round", record.to_json())
        if record.missing_count:
            gap = MissingUpdates(record.round, record.missing_count, record.missing)
            self._progress.note(f"missing in {missing_text(gap)}")
        if record.skipped:
            self._progress.note(f"fedspeed: round {record.round} is skipped: {SKIPPED}")
        if record.clipped:
            self._progress.note(
                f"fedspeed: round {record.round}: {record.clipped} values of the updates "
                f"counted for less than they should: {CLIPPED}"
            )
        self._progress.round(record)

    def finish(self, summary: Summary, facts: Facts, comparison: Comparison | None = None) -> Path:
        """Write the report, print a final line and close everything. Return the path of the report."""
        summary = visible(summary, self._routing_mode)
        self.close()
        path = write_report(
            self._folder,
            self._records,
            summary,
            self._config_text,
            facts,
            routing_mode=self._routing_mode,
            comparison=comparison,
            plot=self._config.plot,
            data=self._data,
        )
        self._json.write("summary", summary.to_json())
        if comparison and shows_everything(self._routing_mode):
            self._progress.note(f"on the held-out rows of all clients:\n{comparison_text(comparison)}")
        self._progress.note(_final_line(summary, path))
        return path

    def close(self) -> None:
        """Close the progress line and the event file, for a run that ends without `finish`. May be called
        twice.
        """
        self._progress.close()
        if self._events:
            self._events.close()
            self._events = None


class NoMonitor:
    """The monitor of a rank that does not report: it does nothing."""

    records: tuple[RoundRecord, ...] = ()
    absent: tuple[int, ...] = ()
    row_table: RowTable | None = None

    def step(self, round_number: int, local_step: int, local_steps: int, loss: float | None = None) -> None:
        """Ignore a step."""

    def round(self, record: RoundRecord) -> None:
        """Ignore a round."""

    def finish(self, summary: Summary, facts: Facts, comparison: Comparison | None = None) -> None:
        """Ignore the end of the run."""

    def close(self) -> None:
        """Do nothing."""


def _final_line(summary: Summary, path: Path) -> str:
    rounds = f"{summary.rounds} of {summary.total_rounds} rounds"
    parts = [f"{summary.status}: {rounds} in {seconds_text(summary.seconds)}"]
    if summary.first_val_loss is not None and summary.last_val_loss is not None:
        losses = f"{loss_text(summary.first_val_loss)} -> {loss_text(summary.last_val_loss)}"
        parts.append(f"held-out loss {losses}")
    if summary.best_round == 0 and summary.rounds:
        parts.append("no round beat the start")
    elif summary.best_round is not None:
        parts.append(f"best {loss_text(summary.best_val_loss)} in round {summary.best_round}")
    if summary.missing_count:
        parts.append(f"{summary.missing_count} update{'s' if summary.missing_count > 1 else ''} missing")
    if summary.skipped:
        parts.append(f"{summary.skipped:.0f} round{'s' if summary.skipped > 1 else ''} skipped")
    return f"{', '.join(parts)}; report: {path}"
