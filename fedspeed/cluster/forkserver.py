"""The fork server: imports once, forks ranks on command, reports how each of them ended.

Commands come as JSON lines on one pipe: {"start": [changes to the environment, one a rank]} and {"signal": number}; when the pipe closes,
the ranks are killed and the server ends. News go out as JSON lines on another: {"rank", "pid"}, {"rank", "code"},
{"failed", "code", "threads"}.
"""

import gc
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from fedspeed.cluster.faults import note_fault
from fedspeed.cluster.once import report
from fedspeed.cluster.processes import die_with
from fedspeed.errors import EXIT_FAILED, EXIT_RESUMABLE, FedSpeedError

_POLL_S = 0.02
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

Target = Callable[[dict[str, str]], int]


def serve(commands: int, news: int, env: Mapping[str, str], preload: Callable[[], None], target: Target) -> NoReturn:
    """Runs in a process of its own until `commands` closes; never returns.

    Args:
        commands, news: file descriptors to read from and to write to.
        env: environment in which `preload` runs, and of the ranks. Libraries size their thread pools by it when they are imported.
        target: runs in each rank, with that rank's environment already set; its result is the exit code.
    """
    # The supervisor decides what ranks are told; a signal for the whole group must not end the server before them.
    for number in _HANDLED:
        signal.signal(number, signal.SIG_IGN)
    try:
        # numpy's OpenBLAS would start its threads on import, and threads do not survive a fork.
        _set_environment({"OPENBLAS_NUM_THREADS": "1", **env})
        preload()
        if threads := _other_threads():
            _say(news, failed=f"threads are running after the imports ({', '.join(threads)})", code=EXIT_FAILED, threads=True)
            os._exit(EXIT_FAILED)
        # Objects of the imports leave the collector's lists: a collection in a rank would write to, and so copy, the shared pages.
        gc.collect()
        gc.freeze()
        _Server(commands, news, env, target).run()
    except FedSpeedError as error:
        report(error, env)
        _say(news, failed=str(error), code=error.exit_code, threads=False)
        os._exit(error.exit_code)
    except BaseException as error:  # noqa: BLE001 - the supervisor's stack lies below; nothing may unwind into it
        traceback.print_exc()
        with suppress(OSError):  # the supervisor may be gone
            _say(news, failed=f"{type(error).__name__}: {error}", code=EXIT_FAILED, threads=False)
    finally:
        os._exit(EXIT_FAILED)  # the ranks end with their parent


class _Server:
    def __init__(self, commands: int, news: int, env: Mapping[str, str], target: Target):
        self._commands, self._news, self._env, self._target = commands, news, env, target
        self._unread = b""
        self._ranks: dict[int, int] = {}

    def run(self) -> NoReturn:
        while True:
            if select.select([self._commands], [], [], _POLL_S)[0]:
                piece = os.read(self._commands, 65536)
                if not piece:
                    self._signal(signal.SIGKILL)
                    os._exit(0)
                *lines, self._unread = (self._unread + piece).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))
            self._reap()

    def _obey(self, command: dict) -> None:
        for rank, changes in enumerate(command.get("start", [])):
            self._fork(rank, {**self._env, **changes})
        if "signal" in command:
            self._signal(command["signal"])

    def _fork(self, rank: int, env: dict[str, str]) -> None:
        parent = os.getpid()
        # A signal that comes before the rank has its own handlers waits, instead of being ignored like the server's.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        pid = os.fork()
        if pid == 0:
            try:
                os.close(self._commands)
                os.close(self._news)
                die_with(parent)
                _be_rank(self._target, env)
            finally:
                os._exit(EXIT_FAILED)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        self._ranks[rank] = pid
        _say(self._news, rank=rank, pid=pid)

    def _signal(self, number: int) -> None:
        # Not reaped yet, so the pid cannot belong to anybody else.
        for pid in self._ranks.values():
            os.kill(pid, number)

    def _reap(self) -> None:
        for rank, pid in list(self._ranks.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._ranks[rank]
                _say(self._news, rank=rank, code=os.waitstatus_to_exitcode(status))


def _be_rank(target: Target, env: dict[str, str]) -> NoReturn:
    """The life of a forked rank. Ends without atexit functions, which belong to the server; the target closes what it opened."""
    code = EXIT_FAILED
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        _set_environment(env)
        code = target(env)
    except FedSpeedError as error:
        report(error, env)
        code = error.exit_code
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else EXIT_FAILED if end.code else 0
    except KeyboardInterrupt:
        code = EXIT_RESUMABLE
    except BaseException as error:  # noqa: BLE001 - the server's stack lies below; nothing may unwind into it
        traceback.print_exc()
        note_fault(error, env)
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _set_environment(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def _other_threads() -> list[str]:
    """Names of the threads of this process beside the main one; a fork would lose them, and whatever locks they hold."""
    folder = Path("/proc/self/task")
    others = [entry for entry in folder.iterdir() if entry.name != str(os.getpid())] if folder.is_dir() else []
    return [(entry / "comm").read_text(encoding="utf-8").strip() for entry in others]


def _say(news: int, **words: object) -> None:
    os.write(news, json.dumps(words).encode() + b"\n")
