"""The time of one rank by stage, and its peak memory."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedspeed.monitor.trace import NoTrace

STAGES = ("compute", "gather", "exchange", "idle")


class StageClock:
    """Counts the seconds of one rank by stage; every moment belongs to exactly one stage, or to `other`.

    Stages nest, and a moment counts for the innermost one: a gather inside a backward pass is gather, not
    compute. The sum over `snapshot_and_reset()` is therefore the wall time since the last snapshot.

    The clock reads host time. An accelerator executes kernels after their launch, so a stage that launches
    kernels must synchronise before it ends, or their time is counted for the next stage.

    Threads may share a clock while they take turns (autograd runs backward hooks in another thread while the
    caller waits). Two threads at once would add up to more than the wall time; the assertion at the end of a
    stage detects them.

    Args:
        now: returns seconds.
        trace: records the spans of stages.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter, trace: NoTrace | None = None):
        self._now = now
        self.trace = trace or NoTrace()
        self._open: list[str] = []
        self._seconds = dict.fromkeys((*STAGES, "other"), 0.0)
        self._since = now()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside for a stage, one of STAGES."""
        assert name in STAGES, f"stage {name!r} is none of {STAGES}"
        self._charge()
        self._open.append(name)
        begin = self._since
        try:
            yield
        finally:
            self._charge()
            self.trace.span("stage", name, begin, self._since)
            left = self._open.pop()
            assert left == name, f"stage {name!r} ended while {left!r} was the innermost one"

    def snapshot_and_reset(self) -> dict[str, float]:
        """Return the seconds by stage, and `other`, since the last call or the construction. Open stages stay
        open.
        """
        self._charge()
        taken = self._seconds
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return taken

    def _charge(self) -> None:
        now = self._now()
        self._seconds[self._open[-1] if self._open else "other"] += now - self._since
        self._since = now


def peak_bytes() -> int:
    """Return the peak memory of this rank: on its GPU if it uses one, else of the process in RAM.

    Both are peaks since the process started, not per round or per run. The RAM figure is the kernel's VmHWM
    and includes the interpreter and all libraries. It is read from /proc because ru_maxrss of getrusage
    survives exec, so that a small child would report the peak of the launcher that started it.

    Raises:
        RuntimeError: the kernel does not report it.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(
        "/proc/self/status has no line VmHWM: this kernel does not report the peak memory of a process"
    )
