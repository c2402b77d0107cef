"""The local ranks as a group of processes: start, watch, signal, end. Two ways to make them, one contract.

`SpawnedGroup` starts a fresh interpreter per rank. `ForkedGroup` asks a fork server, which has imported the
heavy libraries once and forks the ranks from itself: they share its pages, and a restart takes milliseconds.
A CUDA context does not survive a fork, so the fork server is for machines without GPUs.

All processes die with their parent (PR_SET_PDEATHSIG) and stand in process groups of their own, so that a
Ctrl-C in the terminal reaches the supervisor alone, which decides what the ranks are told.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedspeed.cluster import forkserver
from fedspeed.cluster.processes import die_with, how_it_ended
from fedspeed.errors import EXIT_FAILED

_CLOSE_S = 2.0


@dataclass(frozen=True)
class End:
    """A rank has ended. `code` is its exit code, or minus the signal that killed it; `because` names another
    process if that died."""

    rank: int
    pid: int
    code: int
    because: str = ""

    def __str__(self) -> str:
        if self.because:
            return self.because
        return f"rank {self.rank} (pid {self.pid}) {how_it_ended(self.code)}"


class PreloadFailed(Exception):
    """The fork server cannot serve. `code` is the exit code to end with; `threads`: it could not because
    imports left threads running."""

    def __init__(self, text: str, code: int, threads: bool):
        super().__init__(text)
        self.code = code
        self.threads = threads


class WorkerGroup(Protocol):
    def start(self, rank_envs: Sequence[Mapping[str, str]]) -> None:
        """Starts one process per entry, each in the common environment with these changes; all earlier ones
        must have ended."""

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
                self._command, env={**self._env, **env}, stdin=subprocess.DEVNULL, process_group=0,
                preexec_fn=lambda: die_with(parent))  # noqa: PLW1509 - the supervisor has no threads

    def poll(self) -> list[End]:
        ends = [End(rank, process.pid, process.returncode) for rank, process in self._processes.items() if process.poll() is not None]
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

    def __init__(self, env: Mapping[str, str], preload: Callable[[], None], target: Callable[[dict[str, str]], int]):
        self._env, self._preload, self._target = env, preload, target
        self._server = self._server_code = 0
        self._commands = self._news = -1
        self._unread = b""
        self._ranks: dict[int, int] = {}

    def start(self, rank_envs: Sequence[Mapping[str, str]]) -> None:
        if not self._server:
            self._fork_server()
        self._ranks = dict.fromkeys(range(len(rank_envs)), 0)
        # Only the differences travel: a whole environment could fill the pipe while the server still imports.
        self._tell({"start": [dict(env) for env in rank_envs]})

    def poll(self) -> list[End]:
        ends = []
        for line in self._read_news():
            news = json.loads(line)
            if "failed" in news:
                self.close()
                raise PreloadFailed(news["failed"], news["code"], news["threads"])
            if "pid" in news:
                self._ranks[news["rank"]] = news["pid"]
            if "code" in news:
                ends.append(End(news["rank"], self._ranks.pop(news["rank"]), news["code"]))
        if not self._server and self._ranks:
            because = f"the fork server {how_it_ended(self._server_code)}, and its ranks ended with it"
            ends += [End(rank, pid, self._server_code, because) for rank, pid in self._ranks.items()]
            self._ranks.clear()
        return ends

    def send(self, number: int) -> None:
        self._tell({"signal": int(number)})

    def close(self) -> None:
        if self._server:
            os.close(self._commands)
            self._commands = -1
            deadline = time.monotonic() + _CLOSE_S
            while self._server and time.monotonic() < deadline:
                self._read_news()
                time.sleep(0.01)
        if self._server:
            os.kill(self._server, signal.SIGKILL)
            self._reap()
        self._ranks.clear()

    def _fork_server(self) -> None:
        command_end, self._commands = os.pipe()
        self._news, news_end = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(self._commands)
                os.close(self._news)
                die_with(parent)
                os.setpgid(0, 0)
                forkserver.serve(command_end, news_end, self._env, self._preload, self._target)
            finally:
                os._exit(EXIT_FAILED)
        os.close(command_end)
        os.close(news_end)
        os.set_blocking(self._news, False)
        self._server, self._unread = pid, b""

    def _tell(self, command: dict) -> None:
        data = memoryview(json.dumps(command).encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):
            while data and self._server:
                data = data[os.write(self._commands, data):]

    def _read_news(self) -> list[bytes]:
        """Complete lines that have come; notices the end of the server, whose pipe closes with it."""
        while self._server and select.select([self._news], [], [], 0)[0]:
            piece = os.read(self._news, 65536)
            if not piece:
                self._reap()
            self._unread += piece
        *lines, self._unread = self._unread.split(b"\n")
        return lines

    def _reap(self) -> None:
        _, status = os.waitpid(self._server, 0)
        self._server_code = os.waitstatus_to_exitcode(status)
        self._server = 0
        os.close(self._news)
        if self._commands >= 0:
            os.close(self._commands)
