"""How long the computation waits for loads."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from deepspeed.accelerator import get_accelerator

from fedspeed.engine.device_events import DeviceEvent


class WaitTimer:
    """Add up waiting times. On an accelerator they are measured in its stream, between two events, so the
    host does not block to read them.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._open: deque[tuple[DeviceEvent, DeviceEvent]] = deque()  # (begin, end), perhaps not reached yet

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time that the current stream (on a CPU: this thread) waits inside."""
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
            self._count_first()

    def take(self) -> float:
        """Return the seconds since the last call. Waits for the device."""
        while self._open:
            self._open[0][1].synchronize()
            self._count_first()
        taken = self._seconds
        self._seconds = 0.0
        return taken

    def _count_first(self) -> None:
        begin, end = self._open.popleft()
        self._seconds += begin.elapsed_time(end) / 1000
