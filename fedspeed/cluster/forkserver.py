"""The fork server: imports once, forks ranks on command, reports how each of them ended.

It and its supervisor exchange JSON over one connection, as bytes that nobody unpickles. Commands are
{"start": [changes to the environment, one a rank]} and {"signal": number}; where the connection ends, the
ranks are killed and the server ends. News are {"rank", "pid", "code"} of a rank that has ended, and
{"failed", "code", "threads"} where the server cannot serve.
"""

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from fedspeed.cluster.failures import record_failure
from fedspeed.cluster.once import report_error
from fedspeed.cluster.processes import die_with
from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, FedSpeedError

_POLL_S = 0.02
# What a rank does with these signals until it says otherwise. The server blocks them: the supervisor decides
# what ranks are told, and one for the whole group must not end the server before them. What comes to a rank
# while it still has them blocked waits.
_HANDLERS = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGUSR1: signal.SIG_IGN,
}

Target = Callable[[dict[str, str]], int]


def tell(connection: Connection, **words: object) -> None:
    """Send a message; none is sent where the other side is gone, as whoever reads next is told."""
    with suppress(OSError):
        connection.send_bytes(json.dumps(words).encode())


def hear(connection: Connection) -> dict | None:
    """Take the message that has come and return it; None: the other side is gone."""
    try:
        return json.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return None


def fork(life: Callable[[], int], not_its_own: Connection) -> int:
    """Fork a process that lives `life` and is killed if this one dies; return its pid.

    It ends with the exit code that `life` returns; with 1 and a traceback if that raises. No atexit function
    runs and nothing unwinds into the stack below: both belong to its parent.

    Args:
        not_its_own: an end that is the parent's, which it closes first, so that this end can be missed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = EXIT_FAILED
    try:
        not_its_own.close()
        die_with(parent)
        code = life()
    except BaseException:  # noqa: BLE001 - the parent's stack lies below
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def serve(supervisor: Connection, env: Mapping[str, str], preload: Callable[[], None], target: Target) -> int:
    """Be the server until `supervisor` ends; return the exit code. Ranks end with this process.

    Args:
        env: environment in which `preload` runs, and of the ranks. Libraries size their thread pools by it
            when they are imported.
        target: runs in each rank, with that rank's environment already set; its result is the exit code.
    """
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLERS)
    try:
        # numpy's OpenBLAS would start its threads on import, and threads do not survive a fork.
        _set_environment({"OPENBLAS_NUM_THREADS": "1", **env})
        preload()
        if threads := _other_threads():
            text = f"threads are running after the imports ({', '.join(threads)})"
            tell(supervisor, failed=text, code=EXIT_FAILED, threads=True)
            return EXIT_FAILED
        # Objects of the imports leave the collector's lists: a collection in a rank would write to, and so
        # copy, the shared pages.
        gc.collect()
        gc.freeze()
        _Server(supervisor, env, target).run()
        return EXIT_OK
    except FedSpeedError as error:
        report_error(error, env)
        tell(supervisor, failed=str(error), code=error.exit_code, threads=False)
        return error.exit_code
    except BaseException as error:
        tell(supervisor, failed=f"{type(error).__name__}: {error}", code=EXIT_FAILED, threads=False)
        raise


class _Server:
    def __init__(self, supervisor: Connection, env: Mapping[str, str], target: Target):
        self._supervisor = supervisor
        self._env = env
        self._target = target
        self._pids: dict[int, int] = {}  # by rank; not reaped yet, so none can belong to anybody else

    def run(self) -> None:
        """Obey and report until the supervisor is gone, and kill what is left."""
        while True:
            if self._supervisor.poll(_POLL_S):
                command = hear(self._supervisor)
                if command is None:
                    self._signal(signal.SIGKILL)
                    return
                self._obey(command)
            self._reap()

    def _obey(self, command: dict) -> None:
        for rank, changes in enumerate(command.get("start", [])):
            life = partial(_be_rank, self._target, {**self._env, **changes})
            self._pids[rank] = fork(life, self._supervisor)
        if "signal" in command:
            self._signal(command["signal"])

    def _signal(self, number: int) -> None:
        for pid in self._pids.values():
            os.kill(pid, number)

    def _reap(self) -> None:
        for rank, pid in list(self._pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._pids[rank]
                tell(self._supervisor, rank=rank, pid=pid, code=os.waitstatus_to_exitcode(status))


def _be_rank(target: Target, env: dict[str, str]) -> int:
    """Be a forked rank; return its exit code. The target closes what it opened."""
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLERS)
        _set_environment(env)
        return target(env)
    except FedSpeedError as error:
        report_error(error, env)
        return error.exit_code
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        return EXIT_FAILED if end.code else EXIT_OK
    except KeyboardInterrupt:
        return EXIT_RESUMABLE
    except BaseException as error:
        record_failure(error, env)
        raise


def _set_environment(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def _other_threads() -> list[str]:
    """Name the threads of this process beside the main one, which a fork would lose with the locks they hold;
    none where the system does not tell (/proc).
    """
    others = [entry for entry in Path("/proc/self/task").glob("*") if entry.name != str(os.getpid())]
    return [(entry / "comm").read_text(encoding="utf-8").strip() for entry in others]
