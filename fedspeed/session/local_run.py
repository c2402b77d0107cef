"""The supervisor of a run on one machine: it starts the ranks and reports what they could not report."""

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
from fedspeed.session.client_ranks import with_client_ranks
from fedspeed.session.components import preload
from fedspeed.session.ending import Ending, complete_ending, gaps, ranks_ending, summary_ending
from fedspeed.session.exporting import export_kind
from fedspeed.session.input_digests import check_inputs, rows_without_libraries
from fedspeed.session.numeric_type import with_original_dtype
from fedspeed.session.reporting import STOP_REQUEST_FILE
from fedspeed.session.request import FRESH_VARIABLE, RunRequest
from fedspeed.session.resume import RunLock, check_best, end_reason, journal_entry, journal_of

REPORT_S = 15.0  # for the survivors of a lost rank to identify it and to write the report


def supervise(
    request: RunRequest, launch: Launch, argv: Sequence[str], rank: Callable[[dict[str, str]], int]
) -> Ending:
    """Start the local ranks, watch them, and restart them from the journal when one is lost.

    Args:
        argv: arguments for ranks that are started as processes.
        rank: the function that a forked rank runs, given its environment.

    Raises:
        FedSpeedError: the run cannot be resumed.
    """
    request = with_original_dtype(request)
    config = request.config
    hosts = local_hosts(launch, config.cluster.local_ranks, config.data.clients, server=config.has_server)
    if config.model.dtype != "auto":  # else there is no earlier start to compare with
        request, _ = with_client_ranks(request, hosts)
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
    topology = topology_of(config, hosts)
    ranks = len(topology.ranks)
    choose_accelerator(os.environ)
    for text in oversubscription_notes(ranks - len(topology.server)):
        LOG.info(text)
    run = run_local(
        argv,
        ranks,
        {**os.environ, **({FRESH_VARIABLE: "1"} if request.fresh else {})},
        config.cluster.max_restarts,
        journal.newest,
        preload=preload,
        target=rank,
        servers=0 if launch.hostfile else len(topology.server),
        finish_s=config.cluster.finish_s,
        end_s=REPORT_S,
    )
    if run.exit_code == EXIT_OK:
        return _reported_ending(request)
    if run.exit_code == EXIT_USAGE:  # the ranks have reported what is wrong
        return Ending(status="failed", exit_code=EXIT_USAGE)
    mode = config.routing.resolved(len(topology.contributors)).mode
    return _report_killed(request, run, ranks, mode)


def complete(request: RunRequest, entry: Entry) -> Summary | None:
    """Return the summary of a run that is complete; None if something is left to do.

    A run may have been killed after its last journal entry, or its export may have been deleted.

    Args:
        entry: the newest entry of its journal.
    """
    end = end_reason(entry.round, entry.stale, request.config.federation)
    if not end or not (request.folder / export_kind(request.config)).is_dir():
        return None
    summary = summary_file.read_summary(request.folder)
    return summary if summary is not None and summary.status == end else None


def _move_aside(request: RunRequest) -> None:
    """Move an earlier run of the same name aside, unless another process works on it."""
    lock = RunLock()
    lock.take(request.folder)
    request.move_aside()
    lock.release()


def _reported_ending(request: RunRequest) -> Ending:
    """Return the ending that ranks with exit code 0 have written into the summary."""
    summary = summary_file.read_summary(request.folder)
    if summary is None:
        return Ending(
            status="failed",
            exit_code=EXIT_FAILED,
            note=f"{request.folder}: the ranks have ended with exit code 0, but wrote no "
            f"{summary_file.NAME}; look at their output, and start again: the run resumes from its journal",
        )
    return summary_ending(summary)


def _report_killed(request: RunRequest, run: LocalRun, ranks: int, routing_mode: str) -> Ending:
    """Write the report of a run whose reporting rank was killed, from what the supervisor knows.

    A report that a rank has written itself is kept, because it knows more.

    Args:
        ranks: number of local ranks. routing_mode: routing.mode, resolved.
    """
    config = request.config
    folder = request.folder
    request_file = folder / STOP_REQUEST_FILE
    where = [request_file.read_text()] if _is_of_this_start(request_file, run) else []
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
    except OSError as error:  # the cause of the failure, such as a full disk, may prevent the report too
        LOG.info(f"the report could not be written: {error}")
        return ending
    LOG.info(f"report: {path}")
    return ending


def _is_of_this_start(file: Path, run: LocalRun) -> bool:
    """Return whether a file exists and was written after the last start of the ranks."""
    return file.is_file() and file.stat().st_mtime >= run.started
