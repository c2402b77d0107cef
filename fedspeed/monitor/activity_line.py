"""The progress line for long work other than local steps: loading, evaluating, exporting.

A thread polls the current activity of the process (`fedspeed.activity`), so that work which cannot be
interrupted is shown too.
"""

import math
import threading
import time
from collections.abc import Callable
from typing import Self, TextIO

from fedspeed import activity
from fedspeed.activity import Activity
from fedspeed.monitor.progress import LOG_INTERVAL_S, Stream, bar_text, fit_columns
from fedspeed.units import seconds_text

MIN_SHOWN_S = 5.0  # shorter work is not shown
POLL_S = 0.5


class ActivityLine:
    """A context manager that shows long work while it is entered.

    Args:
        stream: a text stream; None: sys.stderr.
        now: returns monotonic seconds.
    """

    def __init__(self, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic):
        self._stream = Stream(stream)
        self._now = now
        self._terminal = self._stream.is_terminal
        self._shown: Activity | None = None
        self._drawn = -math.inf
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.update()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            self.update()

    def update(self) -> None:
        """Show the current work if it has taken long enough, and erase work that has ended."""
        work = activity.current()
        now = self._now()
        if self._ended.is_set() or work is not self._shown:
            self._erase()
        if self._ended.is_set() or work is None or work.quiet or now - work.began < MIN_SHOWN_S:
            return
        if self._terminal:
            self._stream.write(
                "\r" + fit_columns(self._parts(work, now), self._stream.columns() - 1) + "\x1b[K"
            )
        elif work is not self._shown or now - self._drawn >= LOG_INTERVAL_S:
            self._stream.write("  ".join(text for _, text in self._parts(work, now)) + "\n")
            self._drawn = now
        self._shown = work

    def _erase(self) -> None:
        if self._shown is not None and self._terminal:
            self._stream.write("\r\x1b[K")
        self._shown = None

    def _parts(self, work: Activity, now: float) -> list[tuple[int, str]]:
        parts = [(100, work.name.removeprefix("the "))]
        if self._terminal and work.total:
            parts.append((20, bar_text(min(1.0, work.done / work.total), *self._stream.bar_characters)))
        if work.total:
            parts.append((60, work.position))
        left = work.remaining_s(now)
        parts.append((
            80,
            f"{seconds_text(now - work.began)} so far" if left is None else f"ETA {seconds_text(left)}",
        ))
        return parts
