"""Runs a command, reads its output up to a limit and kills it with all its processes beyond its limits."""

import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedspeed.evaluation.sandbox.limits import WORK_FOLDER, Job, Outcome
from fedspeed.evaluation.sandbox.processes import descendants, files_in_sandbox, usage

_POLL_S = 0.01
_BLOCK = 65536


@dataclass
class _Watch:
    """The highest use of resources so far."""

    job: Job
    own_processes: int
    began: float = field(default_factory=time.monotonic)
    peak_memory: int = 0
    peak_processes: int = 0

    def exceeded(self, pid: int) -> str:
        """Measure the processes below one, and return the limit that they exceed; empty: none."""
        limits = self.job.limits
        if time.monotonic() - self.began > limits.wall_s:
            return "time"
        pids = descendants(pid)
        now = usage(pids)
        self.peak_memory = max(self.peak_memory, now.memory)
        self.peak_processes = max(self.peak_processes, now.threads)
        if now.memory > limits.memory:
            return "memory"
        if now.threads > limits.processes + self.own_processes:
            return "processes"
        if pids and files_in_sandbox(pids[-1], WORK_FOLDER, limits.disk) > limits.files:
            return "files"
        return ""


def supervised(
    words: Sequence[str],
    job: Job,
    *,
    environment: Mapping[str, str],
    descriptors: Sequence[int] = (),
    kill: Callable[[subprocess.Popen], None],
    folder: str = "/",
) -> Outcome:
    """Run a command until it ends or exceeds a limit of its job.

    It is over when the command's first process has ended: a child that goes on and keeps the output open is
    not waited for.

    Args:
        descriptors: open files that it inherits. kill: ends the command and all of its processes.
        folder: that it starts in.
    """
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            env=dict(environment),
            pass_fds=tuple(descriptors),
            cwd=folder,
            start_new_session=True,
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    try:
        return _until_end(process, reader, _Watch(job, own_processes=4))
    finally:
        kill(process)
        process.wait()
        os.close(reader)


def _until_end(process: subprocess.Popen, reader: int, watch: _Watch) -> Outcome:
    output = bytearray()
    limit = watch.job.limits.output
    end = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(end, select.POLLIN)
        poll.register(reader, select.POLLIN)
        killed_for = ""
        while not killed_for:
            ready = {descriptor for descriptor, _ in poll.poll(_POLL_S * 1000)}
            if reader in ready and not _read(reader, output, limit):
                poll.unregister(reader)
            if len(output) > limit:
                killed_for = "output"
            elif end in ready:
                break
            else:
                killed_for = watch.exceeded(process.pid)
    finally:
        os.close(end)
    while not killed_for and _read(reader, output, limit):
        pass
    code = -9 if killed_for else process.wait()
    return Outcome(killed_for, code, bytes(output[:limit]), watch.peak_memory, watch.peak_processes)


def _read(reader: int, output: bytearray, limit: int) -> bool:
    """Append what is waiting in a pipe, one byte more than the limit at most; return whether that was
    anything.
    """
    try:
        block = os.read(reader, min(_BLOCK, limit + 1 - len(output)))
    except BlockingIOError:
        return False
    output += block
    return bool(block)
