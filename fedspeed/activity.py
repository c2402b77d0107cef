"""What this process is at: for the line that shows progress, and for the last word of a run that is asked to
end.

One thing at a time, and by the main thread only. Whoever works says so with `during` and counts with
`advance`; nothing is shown here.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Activity:
    """A piece of work.

    Args:
        name: fits behind "during", such as `the evaluation before round 1`.
        total: how many units there are, 0 where nobody knows.
        unit: of what, in the singular.
        quiet: whether others show it already.
        done: units that are done; parts of one count.
        began: monotonic seconds.
    """

    name: str
    total: int
    unit: str
    quiet: bool
    done: float = 0.0
    began: float = field(default_factory=lambda: time.monotonic())

    @property
    def position(self) -> str:
        """`batch 12 of 40`, the twelfth being at work; empty where nothing is counted."""
        return f"{self.unit} {min(int(self.done) + 1, self.total)} of {self.total}" if self.total else ""

    def remaining_s(self, now: float) -> float | None:
        """Seconds until it is done, None while nothing is known."""
        if not self.total or not self.done:
            return None
        return max(0.0, (now - self.began) * (self.total / self.done - 1))


_at_work: list[Activity] = []  # the outermost first


@contextmanager
def during(name: str, total: int = 0, unit: str = "", quiet: bool = False) -> Iterator[None]:
    """Say what is done inside."""
    activity = Activity(name, total, unit, quiet)
    _at_work.append(activity)
    try:
        yield
    finally:
        _at_work.remove(activity)


def counted(items: Sequence[T], name: str, unit: str) -> Iterator[T]:
    """The items one by one, as work that is counted: an item is done when the next one is asked for."""
    with during(name, len(items), unit):
        for item in items:
            yield item
            advance()


def advance(units: float = 1.0) -> None:
    """Count what is done of the innermost piece of work."""
    if _at_work:
        _at_work[-1].done += units


def current() -> Activity | None:
    """The innermost piece of work."""
    return _at_work[-1] if _at_work else None


def describe_current() -> str:
    """What this process is at: `the evaluation before round 1, batch 12 of 40`; empty if nobody has said."""
    activity = current()
    return ", ".join(filter(None, (activity.name, activity.position))) if activity else ""
