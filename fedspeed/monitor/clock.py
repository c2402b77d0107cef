"""Where one rank's time and memory go."""

import sys
import time
from contextlib import contextmanager
from pathlib import Path

from fedspeed.monitor.trace import NoTrace

STAGES = ("compute", "gather", "exchange", "idle")


class StageClock:
    """Seconds by stage for one rank; every moment belongs to exactly one stage, or to `other`.

    Stages nest, and a moment counts for the innermost one only: a gather inside a backward pass is gather,
        not compute. The sum over
    `snapshot_and_reset()` is therefore the wall time since the last snapshot.

    The clock reads host time. On an accelerator, kernels run on after their launch, so a stage that launches
    some must synchronise before it ends, or the next stage is charged for them.

    Args:
        trace: what keeps the spans of stages (monitor.trace).

    Threads may share it while they take turns (autograd runs backward hooks in a thread of its own while the
    caller waits). Two threads at once would make more seconds than the wall has; the assertion on leaving a
    stage is there to catch them.
    """

    def __init__(self, now=time.perf_counter, trace=None):
        self._now = now
        self.trace = trace or NoTrace()
        self._open = []
        self._seconds = dict.fromkeys((*STAGES, "other"), 0.0)
        self._since = now()

    @contextmanager
    def stage(self, name: str):
        """Charge the time inside to `name` (one of STAGES)."""
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
        """Seconds per stage, and `other`, since the last call (or since the clock was made). Stages that are
        open stay open.
        """
        self._charge()
        taken = self._seconds
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return taken

    def _charge(self):
        now = self._now()
        self._seconds[self._open[-1] if self._open else "other"] += now - self._since
        self._since = now


def peak_bytes() -> int:
    """The most memory this rank has held: of its GPU if it uses one, else of the process in RAM.

    Both are peaks since the process started: there is no peak per round or per run. The RAM figure is the
        kernel's VmHWM and contains the
    interpreter and all libraries. It is read from /proc because ru_maxrss of getrusage survives exec, and so
    gives a small child the peak of the launcher that started it.
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
