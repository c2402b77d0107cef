"""How one start of a run ends, as one value: from the last round, or from any failure, to the exit code.
Pure.

Whoever ends makes an `Ending`: a rank in its rounds, a rank that fails, the supervisor of local ranks, and a
command that is refused before anything starts. The report, summary.json, stderr and the exit code are made
from it (see "Endings" in docs/architecture.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, FedSpeedError, Preempted
from fedspeed.monitor.records import MissingUpdates, RoundRecord, Status, Summary, finished_rounds, summarise

GOES_ON = "the same command goes on from there"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one start of a run, or a command, has ended.

    Attributes:
        status: as the summary of a run calls it.
        exit_code: of the process.
        reason: what happened; empty for a run that simply finished.
        remedy: what to do about it, where the reason does not say so itself.
        missing: updates of a round that did not finish.
        note: a line for stderr where nothing has failed; empty: there is nothing to be said.
        error: the exception that ended it, None where none did.
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
        """Reason and remedy in one line."""
        return "; ".join(filter(None, (self.reason, self.remedy)))

    @property
    def code_for_supervisor(self) -> int:
        """The exit code of a rank that the supervisor of this machine has started: 0 for a run that has
        finished but lacks updates. The supervisor reads that in the summary, and takes ends with other codes
        for crashes.
        """
        return EXIT_OK if self.status in ("finished", "early stop") else self.exit_code

    def summary(
        self, records: Sequence[RoundRecord], *, rounds: int, restarts: int, absent: tuple[int, ...]
    ) -> Summary:
        """Return the summary of a run that ends like this.

        Args:
            records: of all rounds that finished. rounds: that were asked for. restarts: of all ranks so far.
            absent: rounds that finished, but whose records are lost.
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
    """Return the ending that an exception means: one message and its own exit code for what a user can mend,
    else an unexpected error.
    """
    if not isinstance(error, FedSpeedError):
        return Ending(status="failed", exit_code=EXIT_FAILED, reason=str(error), error=error)
    status = "preempted" if isinstance(error, Preempted) else "failed"
    return Ending(
        status=status, exit_code=error.exit_code, reason=error.reason, remedy=error.remedy, error=error
    )


def with_losses(ending: Ending, names: Sequence[str], missing: tuple[MissingUpdates, ...]) -> Ending:
    """Return an ending that also tells which ranks were lost, as far as its text does not, and what is
    missing of the round that did not finish.
    """
    untold = [name for name in names if name not in ending.text]
    if not untold:
        return replace(ending, missing=missing)
    return replace(ending, reason=f"{ending.text} (lost: {'; '.join(untold)})", remedy="", missing=missing)


def gaps(
    records: Sequence[RoundRecord], absent: tuple[int, ...], clients: Sequence[int], possible: range
) -> tuple[MissingUpdates, ...]:
    """Return what is missing of the round in progress: the updates of the clients given.

    Args:
        possible: numbers of rounds of which something can be missing.
    """
    number = finished_rounds(records, absent) + 1
    if not clients or number not in possible:
        return ()
    return (MissingUpdates(number, len(clients), tuple(clients)),)


def rounds_ending(done: Status, remarks: Sequence[str], lost: str) -> Ending:
    """Return the ending of a run whose rounds are over; its exit code is 0 only if every update counted.

    Args:
        done: why they are over. remarks: what the summary is to say. lost: what did not count (`uncounted`).
    """
    reason = "; ".join(filter(None, (*remarks, lost)))
    return Ending(status=done, exit_code=EXIT_FAILED if lost else EXIT_OK, reason=reason)


def stop_ending(number: int, rounds: int, why: str) -> Ending:
    """Return the ending of a run that was asked to stop after round `number` of so many; `why`: by whom."""
    return Ending(
        status="preempted",
        exit_code=EXIT_RESUMABLE,
        reason=f"{why}; round {number} is in the journal",
        note=f"stopped after round {number} of {rounds} ({why}); {GOES_ON}",
    )


def complete_ending(summary: Summary, *, folder: str, number: int, asked: int) -> Ending:
    """Return the ending of a start that finds its run complete.

    Args:
        summary: of the run. folder: of the run. number: of its last round. asked: rounds that are asked for
            now.
    """
    more = "federation.rounds" if summary.status == "finished" else "federation.patience"
    lost = uncounted(summary.missing_count, summary.clipped)
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
    """Return the ending that the ranks of a run have written down themselves."""
    return Ending(status=summary.status, exit_code=summary.exit_code, reason=summary.reason)


def ranks_ending(
    exit_code: int, stop_requested: bool, said: Sequence[str], missing: tuple[MissingUpdates, ...]
) -> Ending:
    """Return the ending of local ranks that the supervisor has seen end.

    Args:
        said: what the supervisor has said of it. missing: of the round in progress, had nobody asked them to
            end.
    """
    return Ending(
        status="preempted" if stop_requested else "failed",
        exit_code=exit_code,
        reason="; ".join(said),
        missing=() if stop_requested else missing,
    )


def uncounted(lost: int, clipped: int) -> str:
    """Return what did not count, or not fully, in the rounds of a run; empty if all did.

    Args:
        lost: updates that did not count. clipped: values of updates that were beyond what a masked sum
            carries.
    """
    missing = f"{lost} update{'s' if lost > 1 else ''} did not count, see the report" if lost else ""
    return "; ".join(filter(None, (missing, "some updates did not count fully" if clipped else "")))
