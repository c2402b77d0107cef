"""`python launch.py` on one machine: starts the ranks, watches them, and starts them again from the journal
when one is lost.

The supervisor imports no torch and runs nothing of the training, so it stays small and outlives whatever
happens to a rank.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Self

from fedspeed.cluster.devices import computing_gpus, rank_devices, usable_cores, visible_gpus
from fedspeed.cluster.discover import MEETING_VARIABLE, Launch
from fedspeed.cluster.failures import FAILURE_VARIABLE, recorded_failures
from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.once import ONCE_VARIABLE
from fedspeed.cluster.worker_group import End, ForkedGroup, PreloadFailed, SpawnedGroup, WorkerGroup
from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, EXIT_USAGE, ConfigError
from fedspeed.log import LOG
from fedspeed.net.ports import RESOLVER_OPTIONS, RESOLVER_VARIABLE

_POLL_S = 0.05
# n threads make a step n to this power faster. Measured from one to two on 4 M parameters: 0.87; it falls
# with more.
_THREADS_SCALE = 0.75
RANKS_PER_CORE = 64
_LONGEST_LINE = 300
# Time for ranks to end when one of them is lost and the round cannot be finished.
END_S = 5.0


def local_rank_count(setting: int | str, clients: int) -> int:
    """How many ranks to start on this machine.

    Args:
        setting: `auto` or a whole number of at least 1. Auto means one rank per GPU, but the same number for
            every client if there are more GPUs than clients; without GPUs what `ranks_on_cores` says.

    Raises:
        ConfigError: the setting is more than `check_rank_count` lets pass.
    """
    if setting == "auto":
        gpus = computing_gpus(os.environ)
        if gpus > clients:
            return gpus - gpus % clients
        return gpus or ranks_on_cores(clients, usable_cores())
    check_rank_count(setting, f"cluster.local_ranks={setting}")
    return setting


def local_hosts(launch: Launch, setting: int | str, clients: int) -> tuple[Host, ...]:
    """The hosts of a run that plain python starts: the hostfile's one, or this machine with as many ranks as
    `local_rank_count` says. Raises as that does.
    """
    return launch.hosts if launch.hostfile else (Host("localhost", local_rank_count(setting, clients)),)


def oversubscription_notes(ranks: int) -> list[str]:
    """A note where this machine is to start more ranks than it has cores, and no GPU. Ranks on GPUs are held
    to `cards.check_cards`.
    """
    cores = usable_cores()
    if computing_gpus(os.environ) or ranks <= cores:
        return []
    return [
        f"{ranks} ranks on {cores} core{'s' if cores > 1 else ''}: they take turns, so that a round is "
        f"not shorter than with {cores}, and memory is needed {ranks} times; set "
        f"cluster.local_ranks={cores} (or auto), or give the hostfile fewer slots"
    ]


def check_rank_count(ranks: int, source: str) -> None:
    """Raises ConfigError if this machine is asked to start so many ranks that it would run out of processes
    before it said so.
    """
    most = RANKS_PER_CORE * usable_cores()
    if ranks > most:
        raise ConfigError(
            f"{source}: {ranks} ranks are too many for one machine of {usable_cores()} "
            f"cores; ask for at most {most}"
        )


def ranks_on_cores(clients: int, cores: int) -> int:
    """The number of ranks with which a round is shortest: each takes its clients in turn, with an equal share
    of the cores.

    Two ranks on two cores would leave one of them idle while the other trains the third of three clients; one
    rank uses both for all.
    """
    possible = range(1, min(clients, cores) + 1)
    return min(possible, key=lambda ranks: -(-clients // ranks) / (cores // ranks) ** _THREADS_SCALE)


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """What has become of local ranks.

    Attributes:
        exit_code: of the whole. 0: all ranks ended well. 2: bad input. 75: a rank was lost and no restart is
            left, or a signal asked to end; the same command resumes. 1: anything else.
        restarts: how often all ranks were started again.
        started: when they were last, in seconds since 1970.
        stop_requested: whether a signal has asked them to.
        messages: what was logged of it.
    """

    exit_code: int
    restarts: int
    started: float
    stop_requested: bool
    messages: tuple[str, ...]


def run_local(
    argv: Sequence[str],
    ranks: int,
    env: Mapping[str, str],
    max_restarts: int,
    progressed: Callable[[], int],
    *,
    preload: Callable[[], None] | None = None,
    target: Callable[[dict[str, str]], int] | None = None,
    finish_s: float = 25.0,
    end_s: float = END_S,
) -> LocalRun:
    """Run `ranks` local ranks to their end.

    A rank that dies ends the others, and all start again from the journal while restarts are left. A restart
    counts only if no round was finished since the start before it. An exception that comes again without a
    new round would come a third time, and ends all. SIGTERM, SIGINT, SIGHUP and SIGUSR1 are passed on as
    SIGTERM, once; a second one ends everything at once.

    Args:
        argv: arguments of the script; fresh processes run the same script as this one, by the same
            interpreter.
        env: environment of the ranks; RANK, WORLD_SIZE and the like are added.
        max_restarts: how many restarts may be spent without a newly finished round; 0: none at all.
        progressed: the last round in the journal.
        preload, target: if both are given and no GPU is visible, ranks are forked from a process that has run
            `preload` once, and run `target(environment)`. Otherwise they are fresh processes.
        finish_s: how long ranks may take to finish after a signal.
        end_s: how long they may take to end once another is lost.
    """
    threads = env.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // ranks))
    common = {
        RESOLVER_VARIABLE: RESOLVER_OPTIONS,
        **env,
        "FEDSPEED_LAUNCH": "local",
        "OMP_NUM_THREADS": threads,
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
    }
    spawned = SpawnedGroup(common, [*_own_command(), *argv])
    forks = preload and target and not visible_gpus(env)
    workers = ForkedGroup(common, preload, target) if forks else spawned
    with _Signals() as signals, tempfile.TemporaryDirectory(prefix="fedspeed-") as folder:
        supervisor = _Supervisor(
            workers, ranks, Path(folder), signals=signals, finish_s=finish_s, end_s=end_s
        )
        try:
            code = supervisor.run(max_restarts, progressed)
        except PreloadFailed as error:
            if error.threads:
                supervisor.log(f"starting each rank as a fresh process, which takes longer: {error}")
                supervisor.workers = spawned
                code = supervisor.run(max_restarts, progressed)
            else:
                supervisor.log(f"the ranks could not be prepared: {error}")
                code = error.code
        finally:
            supervisor.workers.close()
    return LocalRun(
        exit_code=code,
        restarts=supervisor.restarts,
        started=supervisor.started,
        stop_requested=supervisor.stop_requested,
        messages=tuple(supervisor.messages),
    )


class Asked(IntEnum):
    """What the ranks were asked last; the order is that of urgency."""

    NOTHING = 0
    FINISH = 1
    END = 2
    KILL = 3


@dataclass
class _Signals:
    """Counts the wishes to end, instead of ending."""

    received: list[int] = field(default_factory=list)
    _before: dict[int, object] = field(default_factory=dict)

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            self._before[number] = signal.signal(number, lambda received, _: self.received.append(received))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass
class _Supervisor:
    workers: WorkerGroup
    ranks: int
    folder: Path
    signals: _Signals
    finish_s: float
    end_s: float
    starts: int = 0
    restarts: int = 0
    stop_requested: bool = False
    started: float = field(default_factory=time.time)
    killed: bool = False  # whether a rank of the last attempt died by a signal that is not of this supervisor
    messages: list[str] = field(default_factory=list)

    def log(self, text: str) -> None:
        LOG.info(text)
        self.messages.append(text)

    def run(self, max_restarts: int, progressed: Callable[[], int]) -> int:
        spent = 0
        journaled = progressed()
        faults = frozenset()
        while True:
            code = self._attempt()
            if code in (EXIT_OK, EXIT_USAGE) or self.signals.received:
                return code
            before = journaled
            journaled = progressed()
            faults, earlier = self._faults(), faults
            if journaled == before and (again := faults & earlier):
                self.log(
                    f"not starting again: {_first_line(min(again))} ended this attempt as it ended the "
                    "one before it, and would end every other; its traceback stands above. Mend its "
                    "cause, and the same command goes on from the journal"
                )
                return EXIT_FAILED
            if max_restarts and journaled > before:
                self._restart(f"round {journaled} was finished since the last start")
            elif spent < max_restarts:
                spent += 1
                self._restart(f"restart {spent} of {max_restarts} without a new round")
            else:
                mended = ", once the cause of the traceback above is mended" if faults else ""
                self.log(
                    f"no restart is left ({max_restarts} without a new round); the same command resumes "
                    f"from the journal{mended}"
                )
                return code

    def _restart(self, why: str) -> None:
        self.log(f"starting all ranks again from the journal ({why})")
        self.restarts, self.started = self.restarts + 1, time.time()

    def _faults(self) -> frozenset[str]:
        """The exceptions that ended the last attempt; none where a rank was killed, which others' exceptions
        may only follow from.
        """
        return frozenset() if self.killed else recorded_failures(self._fault_path(self.starts - 1))

    def _fault_path(self, start: int) -> Path:
        return self.folder / f"fault-{start}"

    def _attempt(self) -> int:
        """Start all ranks and watch them to the end of the last one; return the exit code of the whole if it
        stopped here.
        """
        self.workers.start(self._rank_envs())
        self.killed = False
        running = self.ranks
        ends = []
        culprits = []
        asked = Asked.NOTHING
        deadline = float("inf")
        while running:
            new = self.workers.poll()
            ends += new
            by_signal = any(end.code < 0 and end.code != -signal.SIGTERM for end in new)
            self.killed |= asked < Asked.KILL and by_signal
            running -= len(new)
            if asked < Asked.END and (culprits := [end for end in new if not _expected(end.code, asked)]):
                asked, deadline = self._end_others(culprits, running)
            elif self.signals.received and asked < Asked.FINISH:
                asked, deadline = self._finish()
            if time.monotonic() >= deadline or (len(self.signals.received) > 1 and asked < Asked.KILL):
                if asked is Asked.KILL:
                    self.log(f"{running} of {self.ranks} ranks do not even react to SIGKILL")
                    self.workers.close()
                    break
                self.workers.send(signal.SIGKILL)
                asked = Asked.KILL
                deadline = time.monotonic() + self.end_s
            elif running:
                time.sleep(_POLL_S)
        self.starts += 1
        return _verdict(culprits or ends)

    def _end_others(self, culprits: list[End], running: int) -> tuple[Asked, float]:
        others = f"; ending the other {running}" if running else ""
        for text in dict.fromkeys(str(end) for end in culprits if end.code != EXIT_USAGE):
            self.log(text + others)
        self.workers.send(signal.SIGTERM)
        return Asked.END, time.monotonic() + self.end_s

    def _finish(self) -> tuple[Asked, float]:
        self.stop_requested = True
        name = signal.Signals(self.signals.received[0]).name
        self.log(
            f"asked to end by {name}: the ranks have {self.finish_s:g} s to finish the round "
            "(once more ends them at once)"
        )
        self.workers.send(signal.SIGTERM)
        return Asked.FINISH, time.monotonic() + self.finish_s

    def _rank_envs(self) -> list[dict[str, str]]:
        shared = {
            MEETING_VARIABLE: str(self.folder / f"meeting-{self.starts}"),
            ONCE_VARIABLE: str(self.folder / f"said-{self.starts}"),
            FAILURE_VARIABLE: str(self._fault_path(self.starts)),
            "FEDSPEED_RESTARTS": str(self.starts),
        }
        return [
            {**shared, **rank_devices(os.environ, rank), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(self.ranks)
        ]


def _expected(code: int, asked: Asked) -> bool:
    """Whether a rank may end like this. One that was asked to finish may also say "preempted", or have had no
    handler yet.
    """
    return code == EXIT_OK or (asked is Asked.FINISH and code in (EXIT_RESUMABLE, -signal.SIGTERM))


def _verdict(ends: Sequence[End]) -> int:
    """The exit code of the whole from the ends that decide it: bad input, a killed rank and a failure tell
    more than their consequences.
    """
    codes = {end.code for end in ends}
    if EXIT_USAGE in codes:
        return EXIT_USAGE
    if any(code < 0 for code in codes):
        return EXIT_RESUMABLE
    if codes - {EXIT_OK, EXIT_RESUMABLE}:
        return EXIT_FAILED
    return EXIT_RESUMABLE if EXIT_RESUMABLE in codes else EXIT_OK


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0][:_LONGEST_LINE]


def _own_command() -> list[str]:
    """How this process was started, up to its own arguments: a script, `-m package`, or a console script."""
    arguments = len(sys.argv) - 1
    return [sys.executable, *sys.orig_argv[1 : len(sys.orig_argv) - arguments]]
