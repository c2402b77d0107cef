"""A run on one machine, as its supervisor sees it: starts the ranks, and says what they could not say
themselves.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fedspeed.checkpoint.journal import Entry
from fedspeed.cluster.devices import choose_accelerator
from fedspeed.cluster.discover import Launch
from fedspeed.cluster.local import LocalRun, run_local
from fedspeed.cluster.local_ranks import local_hosts, oversubscription_notes
from fedspeed.cluster.topology import topology_of
from fedspeed.config.show import render
from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from fedspeed.log import LOG
from fedspeed.monitor import summary_file
from fedspeed.monitor.records import Summary, lost_rounds
from fedspeed.monitor.report import Facts, write_report
from fedspeed.monitor.round_log import read_rounds
from fedspeed.session.components import preload
from fedspeed.session.ending import Ending, complete_ending, gaps, ranks_ending, summary_ending
from fedspeed.session.exporting import export_kind
from fedspeed.session.inputs import check_inputs, rows_without_libraries
from fedspeed.session.numeric_type import with_original_dtype
from fedspeed.session.reporting import STOP_REQUEST_FILE
from fedspeed.session.request import RunRequest
from fedspeed.session.resume import RunLock, check_best, end_reason, journal_entry, journal_of

REPORT_S = 15.0  # for the survivors of a lost rank to find out who it was, and to write the report


def supervise(
    request: RunRequest, launch: Launch, argv: Sequence[str], rank: Callable[[dict[str, str]], int]
) -> Ending:
    """Start the local ranks, watch them, and start them again from the journal when one is lost; return how
    it ended.

    Args:
        argv: arguments for ranks that are fresh processes. rank: what a forked one runs, given its
            environment.

    Raises:
        FedSpeedError: what the run cannot go on with.
    """
    request = with_original_dtype(request)
    config = request.config
    journal = journal_of(request)
    if request.fresh and request.folder.is_dir():
        _move_aside(request)
    entry = journal_entry(journal, request)
    if entry is not None:
        check_inputs(journal, entry, config, rows_without_libraries(config))
        if summary := complete(request, entry):
            return complete_ending(
                summary, folder=str(request.folder), number=entry.round, asked=config.federation.rounds
            )
        check_best(journal, entry)
    hosts = local_hosts(launch, config.cluster.local_ranks, config.data.clients)
    ranks = sum(host.slots for host in hosts)
    choose_accelerator(os.environ)
    for text in oversubscription_notes(ranks):
        LOG.info(text)
    run = run_local(
        argv,
        ranks,
        dict(os.environ),
        config.cluster.max_restarts,
        journal.newest,
        preload=preload,
        target=rank,
        finish_s=config.cluster.finish_s,
        end_s=REPORT_S,
    )
    if run.exit_code == EXIT_OK:
        return _own_word(request)
    if run.exit_code == EXIT_USAGE:  # the ranks have said what is wrong
        return Ending(status="failed", exit_code=EXIT_USAGE)
    contributors = len(topology_of(config, hosts).contributors)
    return _report_killed(request, run, ranks, config.routing.resolved(contributors).mode)


def complete(request: RunRequest, entry: Entry) -> Summary | None:
    """Return the summary of a run that is over and has left what it should; None while there is something to
    do: it may have been killed behind its last journal entry, or its export may be gone.

    Args:
        entry: the newest of its journal.
    """
    end = end_reason(entry.round, entry.stale, request.config.federation)
    if not end or not (request.folder / export_kind(request.config)).is_dir():
        return None
    summary = summary_file.read_summary(request.folder)
    return summary if summary is not None and summary.status == end else None


def _move_aside(request: RunRequest) -> None:
    """Move an earlier run of the same name aside, not from under a process that is at work on it."""
    claim = RunLock()
    claim.take(request.folder)
    request.move_aside()
    claim.drop()


def _own_word(request: RunRequest) -> Ending:
    """Return how ranks have ended that all ended well, as they have written it down."""
    summary = summary_file.read_summary(request.folder)
    if summary is None:
        return Ending(
            status="failed",
            exit_code=EXIT_FAILED,
            note=f"{request.folder}: the ranks have ended well, but left no {summary_file.NAME}; look at "
            "their output, and start again: the run goes on from its journal",
        )
    return summary_ending(summary)


def _report_killed(request: RunRequest, run: LocalRun, ranks: int, routing_mode: str) -> Ending:
    """Report a run whose reporting rank died without a word: what the supervisor knows. A rank's own report
    knows more, and stays.

    Args:
        ranks: how many there were. routing_mode: with its mode settled.
    """
    config = request.config
    folder = request.folder
    asked = folder / STOP_REQUEST_FILE
    where = [asked.read_text()] if _is_of_this_start(asked, run) else []
    records = read_rounds(folder / "rounds.jsonl")
    absent = lost_rounds(records, journal_of(request).newest())
    missing = gaps(records, absent, range(config.data.clients), range(1, config.federation.rounds + 1))
    ending = ranks_ending(run.exit_code, run.stop_requested, [*run.messages, *where], missing)
    if not folder.is_dir() or _is_of_this_start(folder / summary_file.NAME, run):
        return ending
    summary = ending.summary(records, rounds=config.federation.rounds, restarts=run.restarts, absent=absent)
    try:
        path = write_report(
            folder,
            records,
            summary,
            render(request.loaded, request.deepspeed),
            Facts(run={"ranks": str(ranks)}),
            routing_mode=routing_mode,
            plot=config.monitor.plot,
        )
    except OSError as error:  # what stopped the run may stop its report too
        LOG.info(f"the report could not be written: {error}")
        return ending
    LOG.info(f"report: {path}")
    return ending


def _is_of_this_start(file: Path, run: LocalRun) -> bool:
    """Return whether a file is there that was written since the ranks were started last."""
    return file.is_file() and file.stat().st_mtime >= run.started
