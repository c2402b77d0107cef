"""Processes inside the namespaces of another process: finding, entering and signalling them.

All process ids are those of this process's namespace. Everything is read from /proc, without psutil.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.lab.errors import LabError

START_TIMEOUT_S = 120.0


def start_time(pid: int) -> int | None:
    """Return the clock ticks from boot to the start of process `pid`; None if there is no such process. The
    pair of both identifies a process uniquely.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else int(fields[19])


def children(pid: int) -> list[int]:
    """Return the direct children of all threads of `pid`; empty if it has ended."""
    pids: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids += [int(pid) for pid in path.read_text().split()]
        except OSError:  # the thread ended meanwhile
            continue
    return pids


def session_members(session: int) -> list[int]:
    """Return all processes of a session, in any PID namespace."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if (fields := _stat(pid)) is not None and int(fields[3]) == session]


def descend(process: subprocess.Popen, generations: int) -> int | None:
    """Wait for a descendant of `process` where each has a single child, and return its pid; None if `process`
    ended before.

    Args:
        generations: 1: the child; 2: the child of the child.

    Raises:
        LabError: it did not appear within START_TIMEOUT_S.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        pids = [process.pid]
        for _ in range(generations):
            pids = [child for pid in pids for child in children(pid)]
        if pids:
            return pids[0]
        if ended:
            return None
        time.sleep(0.002)
    raise LabError(
        f"`{process.args[0]}` started nothing within {START_TIMEOUT_S:.0f} s; is the machine overloaded?"
    )


def wait_gone(pid: int, started: int, timeout_s: float) -> bool:
    """Wait until the process that had `pid` since `started` (see start_time) has ended. Return whether it
    ended in time.
    """
    deadline = time.monotonic() + timeout_s
    while start_time(pid) == started:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class EnteredProcess(subprocess.Popen):
    """A command inside all namespaces of another process, with the interface of Popen.

    A process cannot enter a PID namespace itself, only its children can. Therefore Popen's process is
    `nsenter`, which returns the exit status of the command but does not forward signals: they are sent to the
    command itself. The command leads a session, and `kill` ends the whole session: mpirun or pdsh with all
    processes they started on this host.

    Args:
        init_pid: a process in the namespaces, usually the first one.
        command: the program and its arguments.
        cwd: working directory, by its path inside the namespaces.
        popen: further arguments of subprocess.Popen.
    """

    def __init__(self, init_pid: int, command: list[str], cwd: str, **popen):
        # nsenter changes to the root folder of the mount namespace; `env` then changes to `cwd`.
        inside = ["env", f"--chdir={cwd}", "setsid", "--", *map(str, command)]
        super().__init__(
            ["nsenter", f"--target={init_pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--", *inside],
            start_new_session=True,
            **popen,
        )

    def send_signal(self, sig: int) -> None:
        if self.poll() is not None:
            return
        command = descend(self, 1)
        if command is None:
            return
        # Until setsid has run, the command is in nsenter's session; then it is the only process to kill.
        targets = session_members(command) if sig == signal.SIGKILL else []
        for pid in targets or [command]:
            try:
                os.kill(pid, sig)
            except ProcessLookupError:  # it ended meanwhile
                continue


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on, because the name before it may have spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
