"""Processes inside the namespaces of another process: finding, entering and signalling them.

All numbers are process ids as this process sees them. Everything is read from /proc, so nothing needs psutil.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.lab.errors import LabError

START_TIMEOUT_S = 120.0


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of process `pid`, None if there is no such process. With the pid it
    names a process for good.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else int(fields[19])


def children(pid: int) -> list[int]:
    """The direct children of all threads of `pid`; empty if it is gone."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in path.read_text().split()]
        except OSError:  # the thread ended meanwhile
            continue
    return found


def session_members(session: int) -> list[int]:
    """All processes of a session, whichever PID namespace they run in."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if (fields := _stat(pid)) is not None and int(fields[3]) == session]


def descend(process: subprocess.Popen, generations: int) -> int | None:
    """Waits for the only child of the only child ... of `process`, and returns its pid; None if `process`
    ended before it was seen.

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
    """Waits until the process that had `pid` since `started` (see start_time) has ended; False if it has not
    by the deadline.
    """
    deadline = time.monotonic() + timeout_s
    while start_time(pid) == started:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class EnteredProcess(subprocess.Popen):
    """A command inside all namespaces of another process, with the interface of Popen.

    `nsenter` has to stay outside and fork (a process cannot move itself into a PID namespace), so the process
    that Popen knows
    is nsenter: it returns the command's exit status, but does not pass signals on. Signals are therefore sent
        to the command
    itself. The command leads a session of its own, and `kill` ends that whole session: mpirun or pdsh with
    all they started here.

    Args:
        init_pid: a process in the wanted namespaces, usually their first one.
        command: what to run.
        cwd: working directory, by its path inside the namespaces.
        popen: further arguments of subprocess.Popen.
    """

    def __init__(self, init_pid: int, command: list[str], cwd: str, **popen):
        # nsenter changes to the root directory of the new mount namespace, so the directory is entered
        # afterwards, by `env`.
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
        # Before setsid has run, the command still shares nsenter's session, and killing it alone is all that
        # is needed.
        targets = session_members(command) if sig == signal.SIGKILL else []
        for pid in targets or [command]:
            try:
                os.kill(pid, sig)
            except ProcessLookupError:  # it ended meanwhile
                continue


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; the name before them may hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
