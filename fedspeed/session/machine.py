"""A run on one machine, as its supervisor sees it: starts the ranks, and says what they could not say themselves."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedspeed.checkpoint.journal import Entry
from fedspeed.cluster.devices import choose_accelerator
from fedspeed.cluster.discover import Launch
from fedspeed.cluster.local import crowding, local_hosts, run_local
from fedspeed.cluster.topology import plan
from fedspeed.config.show import render
from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from fedspeed.monitor.records import MissingUpdates, absent_rounds, finished_rounds, summarise
from fedspeed.monitor.round_log import read_rounds
from fedspeed.session.inputs import check_inputs, rows_without_libraries
from fedspeed.session.last_words import ASKED_FILE, export_kind, uncounted
from fedspeed.session.numeric_type import as_begun
from fedspeed.session.order import Order
from fedspeed.session.parts import preload
from fedspeed.session.standing import Claim, check_best, ending, journal_entry, journal_of

LAST_WORDS_S = 15.0  # for the survivors of a lost rank to find out who it was, and to write the report


def supervise(order: Order, launch: Launch, argv: Sequence[str], rank: Callable[[dict[str, str]], int]) -> int:
    """Start the local ranks, watch them, and start them again from the journal when one is lost; returns the exit code.

    Args:
        argv: arguments for ranks that are fresh processes. rank: what a forked one runs, given its environment.
    """
    order = as_begun(order)
    config, folder, journal = order.config, order.folder, journal_of(order)
    if order.fresh and folder.is_dir():
        claim = Claim()
        claim.take(folder)  # not from under a run that is at work
        order.make_room()
        claim.drop()
    entry = journal_entry(journal, order)
    if entry is not None:
        check_inputs(journal, entry, config, rows_without_libraries(config))
    if entry is not None and (end := complete(order, entry)):
        return _say_complete(folder, end, entry.round, config.federation.rounds)
    if entry is not None:
        check_best(journal, entry)
    hosts = local_hosts(launch, config.cluster.local_ranks, config.data.clients)
    ranks = sum(host.slots for host in hosts)
    watch = _Watch()
    choose_accelerator(os.environ)
    for text in crowding(ranks):
        print(f"fedspeed: {text}", file=sys.stderr)
    code = run_local(argv, ranks, dict(os.environ), config.cluster.max_restarts, journal.newest, watch.log,
                     preload=preload, target=rank, finish_s=config.cluster.finish_s, end_s=LAST_WORDS_S)
    if code == EXIT_OK:
        return EXIT_FAILED if uncounted(_records(folder)) else EXIT_OK
    if code != EXIT_USAGE:
        participants = len(plan(hosts, config.data.clients, config.cluster.ranks_per_client).participants)
        _report_killed(order, ranks, config.routing.settled(participants).mode, watch, code)
    return code


def complete(order: Order, entry: Entry) -> str:
    """Why a run is over that also has left what it should, empty while there is something to do: it may have been killed behind its last
    journal entry, or its export may be gone."""
    end = ending(entry.round, entry.stale, order.config.federation)
    return end if end and _is_reported(order.folder, end) and (order.folder / export_kind(order.config)).is_dir() else ""


def _records(folder: Path):
    return read_rounds(folder / "rounds.jsonl")


def _is_reported(folder: Path, end: str) -> bool:
    """Whether the report, the last thing a run writes, tells of this end."""
    report = folder / "report.md"
    return report.is_file() and report.read_text(encoding="utf-8").partition("\n")[0].endswith(f": {end}")


def _say_complete(folder: Path, end: str, number: int, asked: int) -> int:
    more = "federation.rounds" if end == "finished" else "federation.patience"
    lost = uncounted(_records(folder))
    state = f"{end}, {number} rounds" + (f"; {lost}" if lost else "")
    state += f"; federation.rounds={asked} asks for fewer, which changes nothing" if asked < number else ""
    print(f"fedspeed: {folder} is complete ({state}): see {folder / 'report.md'}. A larger {more} goes on from there, --fresh starts anew.",
          file=sys.stderr)
    return EXIT_FAILED if lost else EXIT_OK


class _Watch:
    """What the supervisor said, and when it last started ranks."""

    def __init__(self):
        self.said: list[str] = []
        self.restarts = 0
        self.started = time.time()

    def log(self, text: str) -> None:
        print(f"fedspeed: {text}", file=sys.stderr, flush=True)
        self.said.append(text)
        if text.startswith("starting all ranks again"):
            self.restarts, self.started = self.restarts + 1, time.time()

    @property
    def asked_to_end(self) -> bool:
        return any(text.startswith("asked to end") for text in self.said)


def _report_killed(order: Order, ranks: int, routing_mode: str, watch: _Watch, code: int) -> None:
    """The report of a run whose reporting rank died without a word: what the supervisor knows. A rank's own report knows more."""
    config, folder = order.config, order.folder
    written = folder / "report.md"
    if not folder.is_dir() or (written.exists() and written.stat().st_mtime >= watch.started):
        return
    from fedspeed.monitor.report import Facts, write_report

    asked = folder / ASKED_FILE
    where = [asked.read_text()] if asked.is_file() and asked.stat().st_mtime >= watch.started else []
    records = _records(folder)
    absent = absent_rounds(records, journal_of(order).newest())
    number = finished_rounds(records, absent) + 1
    everyone = tuple(range(config.data.clients))
    gaps = () if watch.asked_to_end or not 0 < number <= config.federation.rounds else (MissingUpdates(number, len(everyone), everyone),)
    summary = summarise(records, status="preempted" if watch.asked_to_end else "failed", total_rounds=config.federation.rounds,
                        reason="; ".join([*watch.said, *where]), exit_code=code, restarts=watch.restarts, also_missing=gaps, absent=absent)
    try:
        path = write_report(folder, records, summary, render(order.loaded, order.deepspeed), Facts(run={"ranks": str(ranks)}),
                            routing_mode=routing_mode, plot=config.monitor.plot)
    except OSError as error:  # what stopped the run may stop its report too
        print(f"fedspeed: the report could not be written: {error}", file=sys.stderr)
        return
    print(f"fedspeed: report: {path}", file=sys.stderr)
