"""Reports of the reporting rank at the end of a run, and its note of a request to stop."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from fedspeed.cluster.once_per_host import report_error, reported_error
from fedspeed.config.run import RunConfig
from fedspeed.errors import EXIT_RESUMABLE, EXIT_USAGE
from fedspeed.federation.run_progress import Progress
from fedspeed.monitor.comparison import Comparison
from fedspeed.monitor.monitor import Monitor, NoMonitor
from fedspeed.monitor.records import Summary
from fedspeed.monitor.report import Export, Predicted
from fedspeed.session.ending import (
    Ending,
    error_ending,
    gaps,
    rounds_ending,
    stop_ending,
    uncounted,
    with_losses,
)
from fedspeed.session.explain import lost_ranks_error
from fedspeed.session.report_facts import report_facts
from fedspeed.session.request import Job
from fedspeed.units import loss_text

STOP_REQUEST_FILE = ".asked-to-end"  # in a run's folder: a stop was requested, and during what


def finish(
    job: Job,
    progress: Progress,
    monitor: Monitor,
    *,
    exported: Export,
    comparison: Comparison | None,
    predicted: Predicted | None,
) -> Ending:
    """Report a run after its last round.

    Args:
        progress: after the last round. exported: the models. comparison: with each client alone, if asked
            for.
        predicted: memory and time of a step; None where the planner does not model the execution.
    """
    lost = uncounted(
        sum(r.missing_count for r in monitor.records),
        sum(int(r.clipped or 0) for r in monitor.records),
        sum(int(r.skipped or 0) for r in monitor.records),
    )
    ending = rounds_ending(progress.done, [unbeaten(progress, exported.kind)], lost)
    monitor.finish(_summary(job.config, monitor, ending), report_facts(job, exported, predicted), comparison)
    return ending


def stop_early(job: Job, number: int, monitor: Monitor, renewed: bool) -> Ending:
    """Report a run that stops after round `number` although more rounds are left.

    Args:
        renewed: whether it stops for a newer roster, and not because a signal asked it to.
    """
    why = "all sites have a newer roster" if renewed else "asked to end"
    ending = cause_of(stop_ending(number, job.config.federation.rounds, why))
    monitor.finish(_summary(job.config, monitor, ending), report_facts(job, None))
    return ending


def report_failure(job: Job, monitor: Monitor, error: BaseException, lost: Sequence[int]) -> Ending:
    """Report a run that failed, with the updates that are missing in the round in progress.

    Args:
        lost: world ranks that are known to be lost.
    """
    clients = tuple(sorted({c for rank in lost for c in job.topology.placement(rank).clients}))
    missing = gaps(monitor.records, monitor.absent, clients, range(job.config.federation.rounds + 1))
    ending = with_losses(cause_of(error_ending(error)), [job.describe(rank) for rank in lost], missing)
    monitor.finish(_summary(job.config, monitor, ending), report_facts(job, None))
    return ending


def cause_of(ending: Ending) -> Ending:
    """Return the ending of a run whose ranks were asked to end: bad input that another rank has reported,
    after which the supervisor ends all others, or else the request.
    """
    text = reported_error() if ending.status == "preempted" else ""
    return Ending(status="failed", exit_code=EXIT_USAGE, reason=text) if text else ending


def unbeaten(progress: Progress, kind: str) -> str:
    """Return a remark if no round was better than the start; empty if one was, or nothing was evaluated."""
    if not progress.has_best or progress.best_round:
        return ""
    return (
        f"no round beat the start, whose held-out loss is {loss_text(progress.best_loss)}: {kind} holds the "
        f"start, {kind}-last the last round"
    )


def note_stop_request(folder: Path, where: str) -> None:
    """Tell that a run was asked to end in a round, at once: should the round be too long, nobody could say it
    later.

    For a signal's handler: it writes past Python's own streams, whose write may be what the signal has
    interrupted.

    Args:
        where: what the reporter is at; may be empty.
    """
    text = f"asked to end during {where}" if where else "asked to end"
    with contextlib.suppress(OSError):
        os.write(2, f"fedspeed: {text}; this round is finished first, if there is time\n".encode())
        (folder / STOP_REQUEST_FILE).write_text(text)


class ExitWhenStuck:
    """Ends this process if its main thread waits for a lost rank in a call that cannot be interrupted.

    The reporting rank writes its report first. The heartbeat's thread calls it.

    Attributes:
        monitor: of this rank, for the report; None until it is built.
    """

    def __init__(self, job: Job):
        self._job = job
        self.monitor: Monitor | NoMonitor | None = None

    def __call__(self, lost: tuple[int, ...]) -> None:
        try:
            error = lost_ranks_error(self._job, lost)
            report_error(error)
            if isinstance(self.monitor, Monitor):
                report_failure(self._job, self.monitor, error, lost)
        finally:
            os._exit(EXIT_RESUMABLE)


def _summary(config: RunConfig, monitor: Monitor, ending: Ending) -> Summary:
    restarts = int(os.environ.get("FEDSPEED_RESTARTS", "0"))
    return ending.summary(
        monitor.records, rounds=config.federation.rounds, restarts=restarts, absent=monitor.absent
    )
