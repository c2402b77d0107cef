"""Commands that are measured from outside: when they print what, and the memory of all their processes."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.05
KILL_S = 10.0  # that killed processes may take to end
TAIL = 3000  # characters of errors that are kept


@dataclass(frozen=True)
class Watched:
    """A command that has ended.

    Attributes:
        code: its exit code; None: it was killed at its limit. seconds: from start to end.
        lines: of its stdout, each with the seconds from the start until it was seen.
        rss: peak of the resident bytes summed over all its processes. pss: the same with pages that several
            processes share divided among them; sampled more seldom.
        errors: the last characters of its stderr.
    """

    code: int | None
    seconds: float
    lines: tuple[tuple[float, str], ...]
    rss: int
    pss: int
    errors: str


def watch(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    limit_s: float = 3600,
    seen: Callable[[str], None] | None = None,
    find: Callable[[int], list[Path]] | None = None,
    has_memory: bool = True,
) -> Watched:
    """Run a command in a session of its own, and measure it until it ends or its limit is reached. Then all
    its processes are killed.

    Args:
        limit_s: seconds that it may take.
        seen: called with each line of its stdout soon after it was written; it may measure more.
        find: the folders in /proc of its processes, from the number of its session; None: those of the
            session.
        has_memory: whether memory is measured, which takes longer than a round where processes are many;
            else it is 0.
    """
    find = find or session_processes
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=dict(env), cwd=cwd, start_new_session=True
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        lines: list[tuple[float, str]] = []
        memory = _Peaks()
        rest = b""
        in_time = True
        try:
            while True:
                ended = process.poll() is not None
                *whole, rest = (rest + (process.stdout.read() or b"")).split(b"\n")
                seconds = time.perf_counter() - start
                lines += [(seconds, line.decode(errors="replace")) for line in whole]
                for _, line in lines[len(lines) - len(whole) :] if seen else ():
                    seen(line)
                in_time = seconds < limit_s
                if ended or not in_time:
                    break
                if has_memory:
                    memory.look(find(process.pid))
                time.sleep(POLL_S)
            seconds = time.perf_counter() - start
        finally:  # an interrupt ends them too
            process.kill()  # it may not be where `find` looks yet
            kill_all(lambda: find(process.pid))
            process.wait()
            process.stdout.close()
        errors.seek(0)
        code = process.returncode if in_time else None
        tail = errors.read()[-TAIL:]
        return Watched(code, seconds, tuple(lines), rss=memory.rss, pss=memory.pss, errors=tail)


class _Peaks:
    """The peaks of the memory of some processes, in bytes."""

    def __init__(self) -> None:
        self.rss = 0
        self.pss = 0
        self._pss_due = 0.0

    def look(self, found: Sequence[Path]) -> None:
        """Measure the processes now."""
        self.rss = max(self.rss, resident(found))
        # The kernel walks every page for it: seldom enough to take 3 % of a core, whatever runs.
        if (before := time.perf_counter()) >= self._pss_due:
            self.pss = max(self.pss, proportional(found))
            self._pss_due = time.perf_counter() + 30 * (time.perf_counter() - before)


def kill_all(find: Callable[[], list[Path]]) -> None:
    """Kill processes until none is found that is not a zombie: some start others meanwhile.

    Args:
        find: the folders in /proc of what is to be killed.
    """
    deadline = time.monotonic() + KILL_S
    while (left := [process for process in find() if not _is_zombie(process)]) and (
        time.monotonic() < deadline
    ):
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        time.sleep(POLL_S)


def _is_zombie(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:  # it has ended
        return True


def session_processes(session: int) -> list[Path]:
    """Return the folders in /proc of all processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # it ended while we looked
            if int(stat.read_text().rsplit(")", 1)[1].split()[3]) == session:
                found.append(stat.parent)
    return found


def processes_with(word: str, without: Sequence[str] = ()) -> list[Path]:
    """Return the folders in /proc of all processes whose command contains a word, and none of others."""
    found = []
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = arguments.read_bytes()
            if word.encode() in command and not any(other.encode() in command for other in without):
                found.append(arguments.parent)
    return found


def cpu_seconds(found: Sequence[Path]) -> tuple[float, float]:
    """Return the CPU-seconds of the processes so far: of their first threads, and of all others."""
    first = 0
    every = 0
    for process in found:
        with contextlib.suppress(OSError):
            both = process / "stat", process / "task" / process.name / "stat"
            whole, one = (stat.read_text().rsplit(")", 1)[1].split()[11:13] for stat in both)
            every += sum(map(int, whole))
            first += sum(map(int, one))
    ticks = os.sysconf("SC_CLK_TCK")
    return first / ticks, (every - first) / ticks


def resident(found: Sequence[Path]) -> int:
    """Return the sum of the processes' resident bytes; a page that two of them share counts twice."""
    pages = 0
    for process in found:
        with contextlib.suppress(OSError, IndexError):
            pages += int((process / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def proportional(found: Sequence[Path]) -> int:
    """Return the bytes of the processes' memory, a page that n of them share counted as 1/n for each."""
    kib = 0
    for process in found:
        with contextlib.suppress(OSError, StopIteration):
            rollup = (process / "smaps_rollup").read_text().splitlines()
            kib += int(next(line for line in rollup if line.startswith("Pss:")).split()[1])
    return 1024 * kib
