"""The ending of one start of a run as one value, whatever ended it. Pure.

A rank that finishes its rounds, a rank that fails, the supervisor of local ranks, and a command that is
refused before anything starts each make an `Ending`. The report, summary.json, the message on stderr and the
exit code follow from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, FedSpeedError, Preempted
from fedspeed.monitor.records import MissingUpdates, RoundRecord, Status, Summary, finished_rounds, summarise

RESUME_REMEDY = "the same command goes on from there"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The ending of one start of a run, or of a command.

    Attributes:
        status: as in the summary of a run.
        exit_code: of the process.
        reason: what happened; empty for a run that finished without incident.
        remedy: what the user can do, where the reason does not say it.
        missing: updates that are missing in an unfinished round.
        note: a line for stderr where nothing has failed; may be empty.
        error: the exception that caused it; None where there was none.
    """

    status: Status
    exit_code: int
    reason: str = ""
    remedy: str = ""
    missing: tuple[MissingUpdates, ...] = ()
    note: str = ""
    error: BaseException | None = None

    @property
    def text(self) -> str:
        """Reason and remedy as one line."""
        return "; ".join(filter(None, (self.reason, self.remedy)))

    @property
    def code_for_supervisor(self) -> int:
        """The exit code of a rank that a supervisor has started.

        It is 0 also for a run that has finished with missing updates: the supervisor reads those in the
        summary, and treats other exit codes as crashes.
        """
        return EXIT_OK if self.status in ("finished", "early stop") else self.exit_code

    def summary(
        self, records: Sequence[RoundRecord], *, rounds: int, restarts: int, absent: tuple[int, ...]
    ) -> Summary:
        """Return the summary of a run with this ending.

        Args:
            records: of all finished rounds. rounds: number that was configured. restarts: so far.
            absent: finished rounds whose records are lost.
        """
        return summarise(
            records,
            status=self.status,
            total_rounds=rounds,
            reason=self.text,
            exit_code=self.exit_code,
            restarts=restarts,
            also_missing=self.missing,
            absent=absent,
        )


def error_ending(error: BaseException) -> Ending:
    """Return the ending for an exception: a FedSpeedError has its exit code, all others are unexpected."""
    if not isinstance(error, FedSpeedError):
        return Ending(status="failed", exit_code=EXIT_FAILED, reason=str(error), error=error)
    status: Status = "preempted" if isinstance(error, Preempted) else "failed"
    return Ending(
        status=status, exit_code=error.exit_code, reason=error.reason, remedy=error.remedy, error=error
    )


def with_losses(ending: Ending, names: Sequence[str], missing: tuple[MissingUpdates, ...]) -> Ending:
    """Add the lost ranks, unless the text names them already, and the missing updates to an ending.

    Args:
        names: of the lost ranks. missing: updates of the round that did not finish.
    """
    unnamed = [name for name in names if name not in ending.text]
    if not unnamed:
        return replace(ending, missing=missing)
    return replace(ending, reason=f"{ending.text} (lost: {'; '.join(unnamed)})", remedy="", missing=missing)


def gaps(
    records: Sequence[RoundRecord], absent: tuple[int, ...], clients: Sequence[int], possible: range
) -> tuple[MissingUpdates, ...]:
    """Return the missing updates of the round in progress: those of the lost clients.

    Args:
        clients: the lost ones. possible: numbers of the rounds in which updates can be missing.
    """
    number = finished_rounds(records, absent) + 1
    if not clients or number not in possible:
        return ()
    return (MissingUpdates(number, len(clients), tuple(clients)),)


def status_of(done: str) -> Status:
    """Return the status of a run without further rounds, given the reason in `Progress.done`."""
    return "early stop" if done == "early stop" else "finished"


def rounds_ending(done: str, remarks: Sequence[str], lost: str) -> Ending:
    """Return the ending of a run after its last round; the exit code is 0 only if every update counted.

    Args:
        done: why there are no more rounds. remarks: for the summary. lost: what did not count (`uncounted`).
    """
    reason = "; ".join(filter(None, (*remarks, lost)))
    return Ending(status=status_of(done), exit_code=EXIT_FAILED if lost else EXIT_OK, reason=reason)


def stop_ending(number: int, rounds: int, why: str) -> Ending:
    """Return the ending of a run that stopped early on request.

    Args:
        number: of the last finished round. rounds: number that was configured. why: the reason of the
            request.
    """
    return Ending(
        status="preempted",
        exit_code=EXIT_RESUMABLE,
        reason=f"{why}; round {number} is in the journal",
        note=f"stopped after round {number} of {rounds} ({why}); {RESUME_REMEDY}",
    )


def complete_ending(summary: Summary, *, folder: str, number: int, asked: int) -> Ending:
    """Return the ending of a start whose run is already complete.

    Args:
        summary: of the run. folder: of the run. number: of its last round. asked: federation.rounds now.
    """
    more = "federation.rounds" if summary.status == "finished" else "federation.patience"
    lost = uncounted(summary.missing_count, int(summary.clipped or 0), int(summary.skipped or 0))
    parts = [f"{summary.status}, {number} rounds", lost]
    if asked < number:
        parts.append(f"federation.rounds={asked} asks for fewer, which changes nothing")
    return Ending(
        status=summary.status,
        exit_code=EXIT_FAILED if lost else EXIT_OK,
        reason=lost,
        note=f"{folder} is complete ({'; '.join(filter(None, parts))}): see {folder}/report.md. A larger "
        f"{more} goes on from there, --fresh starts anew.",
    )


def summary_ending(summary: Summary) -> Ending:
    """Return the ending that the ranks of a run have written into its summary."""
    return Ending(status=summary.status, exit_code=summary.exit_code, reason=summary.reason)


def ranks_ending(
    exit_code: int, stop_requested: bool, messages: Sequence[str], missing: tuple[MissingUpdates, ...]
) -> Ending:
    """Return the ending of local ranks, as their supervisor has observed it.

    Args:
        exit_code: of the run. stop_requested: whether the ranks were asked to stop.
        messages: of the supervisor. missing: updates of the round in progress, where no stop was requested.
    """
    return Ending(
        status="preempted" if stop_requested else "failed",
        exit_code=exit_code,
        reason="; ".join(messages),
        missing=() if stop_requested else missing,
    )


def uncounted(lost: int, clipped: int, skipped: int = 0) -> str:
    """Describe the updates that did not count, or not fully, in the rounds of a run; empty if all counted.

    Args:
        lost: number of missing updates. clipped: number of values beyond the range of a masked sum.
        skipped: number of rounds whose updates were discarded.
    """
    sentences = []
    if skipped:
        sentences.append(f"{skipped} round{'s were' if skipped > 1 else ' was'} skipped, see the report")
    if lost:
        sentences.append(f"{lost} update{'s' if lost > 1 else ''} did not count, see the report")
    if clipped:
        sentences.append("some updates did not count fully")
    return "; ".join(sentences)
