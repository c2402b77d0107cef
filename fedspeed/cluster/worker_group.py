"""The local ranks as a group of processes: start, watch, signal and end them, in one of two ways.

`SpawnedGroup` starts a new interpreter per rank. `ForkedGroup` asks a fork server, which has imported the
heavy libraries once and forks the ranks from itself: they share its memory pages, and a restart takes
milliseconds. A CUDA context does not survive a fork, so the fork server is for machines without GPUs.

All processes die with their parent (PR_SET_PDEATHSIG) and have process groups of their own. So a Ctrl-C in
the terminal reaches the supervisor alone, which decides what to send to the ranks.
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
from fedspeed.cluster.processes import die_with_parent, exit_text

_CLOSE_S = 2.0


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
        ready: whether its imports are done.
        cancelled: the signal for its ranks that came before; 0: none.
    """

    pid: int
    connection: Connection
    ready: bool = False
    cancelled: int = 0


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
        self._server: _Server | None = None
        self._running: set[int] = set()

    def start(self, rank_envs: Sequence[Mapping[str, str]]) -> None:
        """Fork one rank per entry."""
        server = self._server or self._start_server()
        self._running = set(range(len(rank_envs)))
        # Only the differences are sent: whole environments could fill the connection while the server
        # imports.
        forkserver.send_message(server.connection, start=[dict(env) for env in rank_envs])

    def poll(self) -> list[RankExit]:
        """Return the ranks that have ended since the last call.

        Raises:
            PreloadFailed: the server cannot serve; it is closed.
        """
        exits = []
        while self._server and self._server.connection.poll():
            message = forkserver.receive_message(self._server.connection)
            if message is None:
                exits += self._reap_server(self._server)
            elif "failed" in message:
                self.close()
                raise PreloadFailed(message["failed"], message["code"], message["threads"])
            elif "ready" in message:
                self._server.ready = True
            else:
                self._running.remove(message["rank"])
                exits.append(RankExit(**message))
        return exits

    def send_signal(self, number: int) -> None:
        """Signal every rank that has not ended.

        A server that imports reads no commands, for minutes on a slow machine, and has no ranks yet: it is
        ended.
        """
        server = self._server
        if server is None:
            return
        if server.ready or server.connection.poll():
            forkserver.send_message(server.connection, signal=int(number))
        else:
            server.cancelled = int(number)
            os.kill(server.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the server, which kills its ranks."""
        if not self._server:
            return
        # The server kills its ranks and ends when its connection ends.
        self._server.connection.close()
        deadline = time.monotonic() + _CLOSE_S
        while not os.waitpid(self._server.pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(self._server.pid, signal.SIGKILL)
                os.waitpid(self._server.pid, 0)
                break
            time.sleep(0.01)
        self._server = None

    def _start_server(self) -> _Server:
        connection, server_end = Pipe()
        main = partial(forkserver.serve, server_end, self._env, self._preload, self._target)
        self._server = _Server(forkserver.fork_process(main, connection), connection)
        server_end.close()
        return self._server

    def _reap_server(self, server: _Server) -> list[RankExit]:
        """Reap a server that has closed its connection; return the exits of the ranks that ended with it."""
        pid, status = os.waitpid(server.pid, 0)
        server.connection.close()
        self._server = None
        if server.cancelled:
            return [RankExit(rank, pid, -server.cancelled) for rank in sorted(self._running)]
        code = os.waitstatus_to_exitcode(status)
        cause = f"the fork server {exit_text(code)}, and its ranks ended with it"
        return [RankExit(rank, pid, code, cause) for rank in sorted(self._running)]
