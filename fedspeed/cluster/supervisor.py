"""The supervisor of local ranks: start them, watch them, and start them again from the journal if one is
lost.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, Self

from fedspeed.cluster.devices import rank_devices
from fedspeed.cluster.discover import PORT_FILE_VARIABLE
from fedspeed.cluster.failures import FAILURE_VARIABLE, recorded_failures
from fedspeed.cluster.once_per_host import ONCE_VARIABLE
from fedspeed.cluster.worker_group import RankExit, WorkerGroup
from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, EXIT_USAGE
from fedspeed.log import LOG

_POLL_S = 0.05
_MAX_LINE = 300

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class StopLevel(IntEnum):
    """How the ranks were asked to stop, in order of urgency."""

    NONE = 0
    FINISH = 1  # finish the round
    END = 2  # end soon: another rank is lost
    KILL = 3


@dataclass
class Signals:
    """Signals that request an end, recorded instead of obeyed while the context is entered."""

    received: list[int] = field(default_factory=list)
    _previous: dict[int, Handler] = field(default_factory=dict)

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


@dataclass
class Supervisor:
    """Runs a group of ranks, attempt by attempt.

    Attributes:
        workers: starts and signals the ranks.
        ranks: their number.
        folder: a temporary folder for the files that ranks share.
        signals: that this process has received.
        finish_s: seconds that ranks have to finish their round after a signal.
        end_s: seconds that they have to end once another rank is lost.
        starts, restarts: how often all ranks were started, and started again.
        stop_requested: whether the ranks were asked to finish because of a signal.
        started: time of the last start, in seconds since 1970.
        killed: whether a rank of the last attempt died by a signal that this supervisor did not send.
        messages: what was logged.
    """

    workers: WorkerGroup
    ranks: int
    folder: Path
    signals: Signals
    finish_s: float
    end_s: float
    starts: int = 0
    restarts: int = 0
    stop_requested: bool = False
    started: float = field(default_factory=time.time)
    killed: bool = False
    messages: list[str] = field(default_factory=list)

    def log(self, text: str) -> None:
        """Log a message and keep it."""
        LOG.info(text)
        self.messages.append(text)

    def run(self, max_restarts: int, last_round: Callable[[], int] | None) -> int:
        """Run attempts until one ends well or no other is worthwhile; return the exit code.

        Args:
            max_restarts: how many restarts are allowed without a newly finished round; 0: none at all.
            last_round: returns the number of the last round in the journal. None: there is no journal to
                resume from, and so a single attempt.
        """
        if last_round is None:
            return self._attempt()
        used = 0
        journaled = last_round()
        failures: frozenset[str] = frozenset()
        while True:
            code = self._attempt()
            if code in (EXIT_OK, EXIT_USAGE) or self.signals.received:
                return code
            journaled_before = journaled
            failures_before = failures
            journaled = last_round()
            failures = self._failures()
            if journaled == journaled_before and (repeated := failures & failures_before):
                self.log(
                    f"not starting again: {_first_line(min(repeated))} ended this attempt as it ended the "
                    "one before it, and would end every other; its traceback stands above. Mend its cause, "
                    "and the same command goes on from the journal"
                )
                return EXIT_FAILED
            if max_restarts and journaled > journaled_before:
                self._restart(f"round {journaled} was finished since the last start")
            elif used < max_restarts:
                used += 1
                self._restart(f"restart {used} of {max_restarts} without a new round")
            else:
                mended = ", once the cause of the traceback above is mended" if failures else ""
                self.log(
                    f"no restart is left (cluster.max_restarts={max_restarts}); the same command resumes "
                    f"from the journal{mended}"
                )
                return code

    def _restart(self, reason: str) -> None:
        self.log(f"starting all ranks again from the journal ({reason})")
        self.restarts += 1
        self.started = time.time()

    def _failures(self) -> frozenset[str]:
        """Return the exceptions that ended the last attempt.

        None if a rank was killed: exceptions of the others may only be a consequence of that.
        """
        return frozenset() if self.killed else recorded_failures(self._failure_path(self.starts - 1))

    def _failure_path(self, start: int) -> Path:
        return self.folder / f"fault-{start}"

    def _attempt(self) -> int:
        """Start all ranks, watch them until the last one has ended, and return the attempt's exit code."""
        self.workers.start(self._rank_envs())
        self.killed = False
        running = self.ranks
        exits: list[RankExit] = []
        failed: list[RankExit] = []
        level = StopLevel.NONE
        deadline = float("inf")
        while running:
            new = self.workers.poll()
            exits += new
            by_signal = any(exited.code < 0 and exited.code != -signal.SIGTERM for exited in new)
            self.killed |= level < StopLevel.KILL and by_signal
            running -= len(new)
            if level < StopLevel.END and (failed := [e for e in new if not _is_expected(e.code, level)]):
                self._end_others(failed, running)
                level = StopLevel.END
                deadline = time.monotonic() + self.end_s
            elif self.signals.received and level < StopLevel.FINISH:
                self._request_finish()
                level = StopLevel.FINISH
                deadline = time.monotonic() + self.finish_s
            urgent = len(self.signals.received) > 1 and level < StopLevel.KILL
            if time.monotonic() >= deadline or urgent:
                if level is StopLevel.KILL:
                    self.log(f"{running} of {self.ranks} ranks do not even react to SIGKILL")
                    self.workers.close()
                    break
                self.workers.send_signal(signal.SIGKILL)
                level = StopLevel.KILL
                deadline = time.monotonic() + self.end_s
            elif running:
                time.sleep(_POLL_S)
        self.starts += 1
        return attempt_exit_code(failed or exits)

    def _end_others(self, failed: list[RankExit], running: int) -> None:
        """Log which ranks have failed, and ask the others to end."""
        others = f"; ending the other {running}" if running else ""
        for text in dict.fromkeys(str(exited) for exited in failed if exited.code != EXIT_USAGE):
            self.log(text + others)
        self.workers.send_signal(signal.SIGTERM)

    def _request_finish(self) -> None:
        """Ask the ranks to end, because of a signal; those of a run finish its round if they can."""
        self.stop_requested = True
        name = signal.Signals(self.signals.received[0]).name
        self.log(
            f"asked to end by {name}: the ranks have {self.finish_s:g} s to end (once more ends them at once)"
        )
        self.workers.send_signal(signal.SIGTERM)

    def _rank_envs(self) -> list[dict[str, str]]:
        """Return what each rank's environment has in addition to the common one."""
        shared = {
            PORT_FILE_VARIABLE: str(self.folder / f"meeting-{self.starts}"),
            ONCE_VARIABLE: str(self.folder / f"said-{self.starts}"),
            FAILURE_VARIABLE: str(self._failure_path(self.starts)),
            "FEDSPEED_RESTARTS": str(self.starts),
        }
        return [
            {**shared, **rank_devices(os.environ, rank), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(self.ranks)
        ]


def attempt_exit_code(exits: Sequence[RankExit]) -> int:
    """Return the exit code of an attempt from the exits that decide it.

    Bad input, a killed rank and a failure come first, in this order: the other exits may be consequences.
    """
    codes = {exited.code for exited in exits}
    if EXIT_USAGE in codes:
        return EXIT_USAGE
    if any(code < 0 for code in codes):
        return EXIT_RESUMABLE
    if codes - {EXIT_OK, EXIT_RESUMABLE}:
        return EXIT_FAILED
    return EXIT_RESUMABLE if EXIT_RESUMABLE in codes else EXIT_OK


def _is_expected(code: int, level: StopLevel) -> bool:
    """Return whether a rank may end with this code.

    A rank that was asked to finish may end as preempted, or by SIGTERM before it had a handler for it.
    """
    return code == EXIT_OK or (level is StopLevel.FINISH and code in (EXIT_RESUMABLE, -signal.SIGTERM))


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0][:_MAX_LINE]
