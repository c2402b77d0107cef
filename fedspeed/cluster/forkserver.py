"""The fork server: import once, fork the ranks on command, and end.

When it ends, its memory is free, and the ranks are children of the supervisor, which adopts them
(`processes.adopt_orphans`). Only then do they begin.

Server and supervisor exchange JSON over one connection; nothing is unpickled. The command is {"start":
[changes to the environment, one per rank]}. Messages to the supervisor are {"pids": [by rank]} when they have
been forked, and {"failed", "code", "threads"} if the server cannot serve. If the server dies before it has
sent that, the ranks end as if by SIGTERM.
"""

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from fedspeed.cluster.failures import record_failure
from fedspeed.cluster.once_per_host import report_error
from fedspeed.cluster.processes import die_with_parent, trim_memory
from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, FedSpeedError

_POLL_S = 0.001
# How a rank reacts to these signals until it installs handlers of its own. The server blocks them, since the
# supervisor decides what to end. A signal to a rank that still has them blocked stays pending.
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
    """Fork a process that runs `main`; return its pid.

    It ends with the exit code that `main` returns, or with 1 and a traceback if `main` raises. No atexit
    function runs in it, and no exception leaves it: the stack below belongs to the parent.

    Args:
        parent_end: the parent's end of the connection to the new process, which closes its copy of it.
            Otherwise the new process would not notice the end of its parent.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = EXIT_FAILED
    try:
        parent_end.close()
        code = main()
    except BaseException:  # noqa: BLE001 - the parent's stack lies below
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def serve(
    supervisor: Connection,
    env: Mapping[str, str],
    preload: Callable[[], None],
    target: Target,
    *,
    parent: int,
) -> int:
    """Import, and fork the ranks when `supervisor` says so; return the exit code.

    Args:
        supervisor: the connection to it.
        env: environment of `preload` and of the ranks. Libraries read the size of their thread pools from it
            when they are imported.
        preload: imports what all ranks need.
        target: runs in each rank, whose environment is already set, and returns the rank's exit code.
        parent: pid of the supervisor. This process, and then the ranks, are killed if it dies.
    """
    die_with_parent(parent)
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
        trim_memory()
        command = receive_message(supervisor)
        if command is None:  # the supervisor is gone
            return EXIT_FAILED
        _fork_ranks(supervisor, parent, [{**env, **changes} for changes in command["start"]], target)
        return EXIT_OK
    except FedSpeedError as error:
        report_error(error, env)
        send_message(supervisor, failed=str(error), code=error.exit_code, threads=False)
        return error.exit_code
    except BaseException as error:
        send_message(supervisor, failed=f"{type(error).__name__}: {error}", code=EXIT_FAILED, threads=False)
        raise


def _fork_ranks(supervisor: Connection, adopter: int, envs: Sequence[dict[str, str]], target: Target) -> None:
    """Fork a rank per environment, report their pids, and let them begin."""
    gate, opener = os.pipe()
    server = os.getpid()

    def main(env: dict[str, str]) -> int:
        os.close(opener)
        _await_adoption(gate, server, adopter)
        return _run_rank(target, env)

    send_message(supervisor, pids=[fork_process(partial(main, env), supervisor) for env in envs])
    os.write(opener, bytes(len(envs)))


def _await_adoption(gate: int, server: int, adopter: int) -> None:
    """Wait until the supervisor knows of this rank and is its parent; end if that cannot come.

    Args:
        gate: a pipe with a byte for each rank that may begin. server, adopter: pids.
    """
    if not os.read(gate, 1):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)
    os.close(gate)
    while os.getppid() == server:  # it ends now
        time.sleep(_POLL_S)
    die_with_parent(adopter)


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
