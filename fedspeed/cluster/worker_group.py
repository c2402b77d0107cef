"""The local ranks as a group of processes: start, watch, signal and end them, in one of two ways.

`SpawnedGroup` starts a new interpreter per rank. `ForkedGroup` asks a fork server, which imports the heavy
libraries once, forks the ranks from itself and ends: they share its memory pages. A CUDA context does not
survive a fork, so the fork server is for machines without GPUs.

All processes die with their parent (PR_SET_PDEATHSIG) and have process groups other than the supervisor's. So
a Ctrl-C in the terminal reaches the supervisor alone, which decides what to send to the ranks.
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
from fedspeed.cluster.processes import adopt_orphans, die_with_parent, exit_text

_CLOSE_S = 2.0
_POLL_S = 0.001


@dataclass(frozen=True)
class RankExit:
    """The end of a rank.

    `code` is its exit code, or minus the signal that killed it. If another process died and the rank with it,
    `cause` is a sentence about that, and `pid` and `code` are those of the other process.
    """

    rank: int
    pid: int
    code: int
    cause: str = ""

    def __str__(self) -> str:
        if self.cause:
            return self.cause
        return f"rank {self.rank} (pid {self.pid}) {exit_text(self.code)}"


class PreloadFailed(Exception):
    """The fork server cannot serve.

    Attributes:
        code: the exit code to end with.
        threads: whether the reason is that the imports left threads running.
    """

    def __init__(self, text: str, code: int, threads: bool):
        super().__init__(text)
        self.code = code
        self.threads = threads


class WorkerGroup(Protocol):
    """A group of rank processes."""

    def start(self, rank_envs: Sequence[Mapping[str, str]]) -> None:
        """Start one process per entry, in the common environment with these changes.

        All processes started before must have ended.
        """

    def poll(self) -> list[RankExit]:
        """Return the ranks that have ended since the last call, without blocking."""

    def send_signal(self, number: int) -> None:
        """Signal every rank that has not ended; one that has not begun yet never does."""

    def close(self) -> None:
        """Kill what is left, at once."""


class SpawnedGroup:
    """New interpreters, each running `command`; `env` is the environment common to all ranks."""

    def __init__(self, env: Mapping[str, str], command: Sequence[str]):
        self._env = env
        self._command = list(command)
        self._processes: dict[int, subprocess.Popen] = {}

    def start(self, rank_envs: Sequence[Mapping[str, str]]) -> None:
        """Start one process per entry."""
        parent = os.getpid()
        for rank, env in enumerate(rank_envs):
            # preexec_fn is safe here because the supervisor has no threads.
            self._processes[rank] = subprocess.Popen(
                self._command,
                env={**self._env, **env},
                stdin=subprocess.DEVNULL,
                process_group=0,
                preexec_fn=lambda: die_with_parent(parent),
            )

    def poll(self) -> list[RankExit]:
        """Return the ranks that have ended since the last call."""
        exits = [
            RankExit(rank, process.pid, process.returncode)
            for rank, process in self._processes.items()
            if process.poll() is not None
        ]
        for exited in exits:
            del self._processes[exited.rank]
        return exits

    def send_signal(self, number: int) -> None:
        """Signal every rank that has not ended."""
        for process in self._processes.values():
            process.send_signal(number)

    def close(self) -> None:
        """Kill what is left."""
        self.send_signal(signal.SIGKILL)
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_CLOSE_S)
        self._processes.clear()


@dataclass
class _Server:
    """A running fork server and the connection to it.

    Attributes:
        cancelled: the signal for its ranks that came before there were any; 0: none.
    """

    pid: int
    connection: Connection
    cancelled: int = 0


class ForkedGroup:
    """Ranks forked by a fork server, which is started each time anew and ends once it has forked them.

    Args:
        env: the environment common to server and ranks.
        preload: run in the server, before it forks.
        target: run in each rank with its environment; returns the exit code.
    """

    def __init__(self, env: Mapping[str, str], preload: Callable[[], None], target: forkserver.Target):
        self._env = env
        self._preload = preload
        self._target = target
        self._server: _Server | None = None  # until the ranks are children of this process
        self._ranks = 0
        self._pids: dict[int, int] = {}  # by rank; not reaped yet, so that no pid belongs to another process

    def start(self, rank_envs: Sequence[Mapping[str, str]]) -> None:
        """Fork one rank per entry."""
        self._ranks = len(rank_envs)
        self._server = self._start_server()
        # Only the differences are sent: whole environments could fill the connection while the server
        # imports.
        forkserver.send_message(self._server.connection, start=[dict(env) for env in rank_envs])

    def poll(self) -> list[RankExit]:
        """Return the ranks that have ended since the last call.

        Raises:
            PreloadFailed: the server cannot serve; it is closed.
        """
        if self._server is not None and self._server.connection.poll():
            message = forkserver.receive_message(self._server.connection)
            if message is None:
                return self._reap_server(self._server)
            if "failed" in message:
                self._end_server(self._server)
                raise PreloadFailed(message["failed"], message["code"], message["threads"])
            self._adopt(self._server, message["pids"])
        exits = []
        for rank, pid in list(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._pids[rank]
                exits.append(RankExit(rank, pid, os.waitstatus_to_exitcode(status)))
        return exits

    def send_signal(self, number: int) -> None:
        """Signal every rank that has not ended.

        A server imports, for minutes on a slow machine, and has no ranks yet: it is ended.
        """
        if self._server is not None:
            self._server.cancelled = int(number)
            os.kill(self._server.pid, signal.SIGKILL)
        for pid in self._pids.values():
            os.kill(pid, number)

    def close(self) -> None:
        """Kill the server and its ranks."""
        if (server := self._server) is not None:
            os.kill(server.pid, signal.SIGKILL)
            message = forkserver.receive_message(server.connection) or {}
            self._adopt(server, message.get("pids", []))
        self.send_signal(signal.SIGKILL)
        for pid in self._pids.values():
            _await_end(pid)
        self._pids.clear()

    def _start_server(self) -> _Server:
        connection, server_end = Pipe()
        main = partial(
            forkserver.serve, server_end, self._env, self._preload, self._target, parent=os.getpid()
        )
        adopt_orphans(True)
        server = _Server(forkserver.fork_process(main, connection), connection)
        server_end.close()
        return server

    def _adopt(self, server: _Server, pids: Sequence[int]) -> None:
        """Become the parent of the ranks: the server, which has forked them, ends."""
        self._pids = dict(enumerate(pids))
        self._end_server(server)
        if server.cancelled:
            self.send_signal(server.cancelled)

    def _end_server(self, server: _Server) -> int:
        """Wait for the server's end, and return its wait status."""
        status = _await_end(server.pid)
        adopt_orphans(False)
        server.connection.close()
        self._server = None
        return status

    def _reap_server(self, server: _Server) -> list[RankExit]:
        """Reap a server that has closed its connection; return the exits of the ranks that ended with it."""
        status = self._end_server(server)
        if server.cancelled:
            return [RankExit(rank, server.pid, -server.cancelled) for rank in range(self._ranks)]
        code = os.waitstatus_to_exitcode(status)
        cause = f"the fork server {exit_text(code)}, and its ranks ended with it"
        return [RankExit(rank, server.pid, code, cause) for rank in range(self._ranks)]


def _await_end(pid: int) -> int:
    """Wait until a child has ended, and return its wait status. It is killed if that takes long, and given up
    if it does not even react to that.
    """
    killed_at = time.monotonic() + _CLOSE_S
    while time.monotonic() < killed_at + _CLOSE_S:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > killed_at:
            os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    return signal.SIGKILL
