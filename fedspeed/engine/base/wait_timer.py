"""How long the arithmetic waits for loads."""

import time
from collections import deque
from contextlib import contextmanager

from deepspeed.accelerator import get_accelerator


class WaitTimer:
    """Adds up waiting times. On an accelerator they are its stream's own, between two events; the host does
    not stop to read them.
    """

    def __init__(self):
        self._seconds = 0.0
        self._open: deque = deque()  # pairs of events that may not be over yet

    @contextmanager
    def timed(self):
        """Count what the current stream, or this thread where there is no accelerator, waits for inside."""
        if get_accelerator().is_synchronized_device():
            before = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - before
            return
        begin, end = (get_accelerator().Event(enable_timing=True) for _ in range(2))
        begin.record(get_accelerator().current_stream())
        yield
        end.record(get_accelerator().current_stream())
        self._open.append((begin, end))
        while self._open and self._open[0][1].query():
            self._close_one()

    def take(self) -> float:
        """Seconds since the last call. Waits for the device."""
        while self._open:
            self._open[0][1].synchronize()
            self._close_one()
        taken = self._seconds
        self._seconds = 0.0
        return taken

    def _close_one(self) -> None:
        begin, end = self._open.popleft()
        self._seconds += begin.elapsed_time(end) / 1000
