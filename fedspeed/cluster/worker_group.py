"""The local ranks as a group of processes: start, watch, signal, end. Two ways to make them, one contract.

`SpawnedGroup` starts a fresh interpreter per rank. `ForkedGroup` asks a fork server, which has imported the
heavy libraries once and forks the ranks from itself: they share its pages, and a restart takes milliseconds.
A CUDA context does not survive a fork, so the fork server is for machines without GPUs.

All processes die with their parent (PR_SET_PDEATHSIG) and stand in process groups of their own, so that a
Ctrl-C in the terminal reaches the supervisor alone, which decides what the ranks are told.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Protocol

from fedspeed.cluster import forkserver
from fedspeed.cluster.processes import die_with, exit_text

_CLOSE_S = 2.0


@dataclass(frozen=True)
class End:
    """A rank has ended. `code` is its exit code, or minus the signal that killed it. If another process died
    and took it along, `because` says so, and `pid` and `code` are that one's.
    """

    rank: int
    pid: int
    code: int
    because: str = ""

    def __str__(self) -> str:
        if self.because:
            return self.because
        return f"rank {self.rank} (pid {self.pid}) {exit_text(self.code)}"


class PreloadFailed(Exception):
    """The fork server cannot serve. `code` is the exit code to end with; `threads`: it could not because
    imports left threads running.
    """

    def __init__(self, text: str, code: int, threads: bool):
        super().__init__(text)
        self.code = code
        self.threads = threads


class WorkerGroup(Protocol):
    def start(self, rank_envs: Sequence[Mapping[str, str]]) -> None:
        """Starts one process per entry, each in the common environment with these changes; all earlier ones
        must have ended.
        """

    def poll(self) -> list[End]:
        """Ranks that have ended since the last call; never blocks."""

    def send(self, number: int) -> None:
        """Signals every rank that has not ended."""

    def close(self) -> None:
        """Ends everything that is left, at once."""


class SpawnedGroup:
    """Fresh interpreters, each running `command`; `env` is the environment common to all ranks."""

    def __init__(self, env: Mapping[str, str], command: Sequence[str]):
        self._env, self._command = env, list(command)
        self._processes: dict[int, subprocess.Popen] = {}

    def start(self, rank_envs: Sequence[Mapping[str, str]]) -> None:
        parent = os.getpid()
        for rank, env in enumerate(rank_envs):
            self._processes[rank] = subprocess.Popen(
                self._command,
                env={**self._env, **env},
                stdin=subprocess.DEVNULL,
                process_group=0,
                preexec_fn=lambda: die_with(parent),
            )  # noqa: PLW1509 - the supervisor has no threads

    def poll(self) -> list[End]:
        ends = [
            End(rank, process.pid, process.returncode)
            for rank, process in self._processes.items()
            if process.poll() is not None
        ]
        for end in ends:
            del self._processes[end.rank]
        return ends

    def send(self, number: int) -> None:
        for process in self._processes.values():
            process.send_signal(number)

    def close(self) -> None:
        self.send(signal.SIGKILL)
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_CLOSE_S)
        self._processes.clear()


class ForkedGroup:
    """Ranks forked by a fork server, which is started with the first ranks, and anew if it died.

    Args:
        env: the environment common to server and ranks.
        preload: run once, in the server.
        target: run in each rank with its environment; returns the exit code.
    """

    def __init__(self, env: Mapping[str, str], preload: Callable[[], None], target: forkserver.Target):
        self._env = env
        self._preload = preload
        self._target = target
        self._server = 0  # its pid; 0: none
        self._connection: Connection | None = None
        self._running: set[int] = set()

    def start(self, rank_envs: Sequence[Mapping[str, str]]) -> None:
        if not self._server:
            self._connection, its_own = Pipe()
            life = partial(forkserver.serve, its_own, self._env, self._preload, self._target)
            self._server = forkserver.fork(life, self._connection)
            its_own.close()
        self._running = set(range(len(rank_envs)))
        # Only the differences travel: whole environments could fill the connection while the server imports.
        forkserver.tell(self._connection, start=[dict(env) for env in rank_envs])

    def poll(self) -> list[End]:
        ends = []
        while self._server and self._connection.poll():
            news = forkserver.hear(self._connection)
            if news is None:
                ends += self._bury_server()
            elif "failed" in news:
                self.close()
                raise PreloadFailed(news["failed"], news["code"], news["threads"])
            else:
                self._running.remove(news["rank"])
                ends.append(End(**news))
        return ends

    def send(self, number: int) -> None:
        if self._server:
            forkserver.tell(self._connection, signal=int(number))

    def close(self) -> None:
        if not self._server:
            return
        self._connection.close()  # upon which the server kills its ranks and ends
        deadline = time.monotonic() + _CLOSE_S
        while not os.waitpid(self._server, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(self._server, signal.SIGKILL)
                os.waitpid(self._server, 0)
                break
            time.sleep(0.01)
        self._server = 0

    def _bury_server(self) -> list[End]:
        """Reap the server, which is gone from the connection; return the ends of the ranks it took along."""
        pid, status = os.waitpid(self._server, 0)
        self._connection.close()
        self._server = 0
        code = os.waitstatus_to_exitcode(status)
        because = f"the fork server {exit_text(code)}, and its ranks ended with it"
        return [End(rank, pid, code, because) for rank in sorted(self._running)]
