"""The fork server: import once, fork ranks on command, report how each of them ended.

Server and supervisor exchange JSON over one connection; nothing is unpickled. Commands are {"start": [changes
to the environment, one per rank]} and {"signal": number}. If the connection ends, the server kills its ranks
and ends. Messages to the supervisor are {"ready": true} after the imports, {"rank", "pid", "code"} when a
rank has ended, and {"failed", "code", "threads"} if the server cannot serve.
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
from types import FrameType
from typing import Any

from fedspeed.cluster.failures import record_failure
from fedspeed.cluster.once_per_host import report_error
from fedspeed.cluster.processes import die_with_parent
from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, FedSpeedError

_POLL_S = 0.02
# How a rank reacts to these signals until it installs handlers of its own. The server blocks them: the
# supervisor decides what the ranks receive, and a signal to the whole process group must not end the server
# before the ranks. A signal to a rank that still has them blocked stays pending.
_HANDLERS: dict[signal.Signals, Callable[[int, FrameType | None], Any] | signal.Handlers] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGUSR1: signal.SIG_IGN,
}

Target = Callable[[dict[str, str]], int]


def send_message(connection: Connection, **fields: object) -> None:
    """Send a message; do nothing if the other side is gone, which the next read reports."""
    with suppress(OSError):
        connection.send_bytes(json.dumps(fields).encode())


def receive_message(connection: Connection) -> dict | None:
    """Receive a message and return it; None: the other side is gone."""
    try:
        return json.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return None


def fork_process(main: Callable[[], int], parent_end: Connection) -> int:
    """Fork a process that runs `main` and is killed if this one dies; return its pid.

    It ends with the exit code that `main` returns, or with 1 and a traceback if `main` raises. No atexit
    function runs in it, and no exception leaves it: the stack below belongs to the parent.

    Args:
        parent_end: the parent's end of the connection to the new process, which closes its copy of it.
            Otherwise the new process would not notice the end of its parent.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = EXIT_FAILED
    try:
        parent_end.close()
        die_with_parent(parent)
        code = main()
    except BaseException:  # noqa: BLE001 - the parent's stack lies below
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def serve(supervisor: Connection, env: Mapping[str, str], preload: Callable[[], None], target: Target) -> int:
    """Serve until `supervisor` ends; return the exit code. The ranks end with this process.

    Args:
        supervisor: the connection to it.
        env: environment of `preload` and of the ranks. Libraries read the size of their thread pools from it
            when they are imported.
        preload: imports what all ranks need.
        target: runs in each rank, whose environment is already set, and returns the rank's exit code.
    """
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLERS)
    try:
        # numpy's OpenBLAS would start its threads on import, and threads do not survive a fork.
        _set_environment({"OPENBLAS_NUM_THREADS": "1", **env})
        gc.disable()
        preload()
        if threads := _other_threads():
            text = f"threads are running after the imports ({', '.join(threads)})"
            send_message(supervisor, failed=text, code=EXIT_FAILED, threads=True)
            return EXIT_FAILED
        # Imported objects are exempt from garbage collection: collecting in a rank would write to the shared
        # memory pages and so copy them. To collect before would take half a second, and find next to nothing.
        gc.freeze()
        gc.enable()
        send_message(supervisor, ready=True)
        _Server(supervisor, env, target).run()
        return EXIT_OK
    except FedSpeedError as error:
        report_error(error, env)
        send_message(supervisor, failed=str(error), code=error.exit_code, threads=False)
        return error.exit_code
    except BaseException as error:
        send_message(supervisor, failed=f"{type(error).__name__}: {error}", code=EXIT_FAILED, threads=False)
        raise


class _Server:
    """Executes the supervisor's commands and reports ranks that have ended."""

    def __init__(self, supervisor: Connection, env: Mapping[str, str], target: Target):
        self._supervisor = supervisor
        self._env = env
        self._target = target
        # By rank. Ranks that are not reaped keep their pids, so none can belong to another process.
        self._pids: dict[int, int] = {}

    def run(self) -> None:
        """Execute commands until the supervisor is gone, then kill the ranks that are left."""
        while True:
            if self._supervisor.poll(_POLL_S):
                command = receive_message(self._supervisor)
                if command is None:
                    self._signal(signal.SIGKILL)
                    return
                self._execute(command)
            self._reap()

    def _execute(self, command: dict) -> None:
        for rank, changes in enumerate(command.get("start", [])):
            main = partial(_run_rank, self._target, {**self._env, **changes})
            self._pids[rank] = fork_process(main, self._supervisor)
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
                send_message(self._supervisor, rank=rank, pid=pid, code=os.waitstatus_to_exitcode(status))


def _run_rank(target: Target, env: dict[str, str]) -> int:
    """Run `target` as a forked rank; return the exit code."""
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
    """Return the names of this process's threads except the main one; none where there is no /proc.

    A fork would lose them, but not the locks that they hold.
    """
    others = [entry for entry in Path("/proc/self/task").glob("*") if entry.name != str(os.getpid())]
    return [(entry / "comm").read_text(encoding="utf-8").strip() for entry in others]
