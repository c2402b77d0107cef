"""What this process is working on, for the progress line and for the message of a run that is asked to end.

One activity at a time, in the main thread only. Code that does the work announces it with `during` and counts
units with `advance`; nothing is displayed here.
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

    Attributes:
        name: fits behind "during", such as `the evaluation before round 1`.
        total: number of units; 0 if unknown.
        unit: name of a unit, in the singular.
        quiet: whether something else displays it already.
        done: units that are done, with fractions.
        began: monotonic seconds.
        paused: whether `advance` counts nothing (`uncounted`).
    """

    name: str
    total: int
    unit: str
    quiet: bool
    done: float = 0.0
    began: float = field(default_factory=lambda: time.monotonic())
    paused: bool = False

    @property
    def position(self) -> str:
        """Return the unit in progress, such as `batch 12 of 40`; empty if nothing is counted."""
        return f"{self.unit} {min(int(self.done) + 1, self.total)} of {self.total}" if self.total else ""

    def remaining_s(self, now: float) -> float | None:
        """Return the estimated seconds until it is done; None while there is no estimate."""
        if not self.total or not self.done:
            return None
        return max(0.0, (now - self.began) * (self.total / self.done - 1))


# Nested activities, the outermost first.
_active: list[Activity] = []


@contextmanager
def during(name: str, total: int = 0, unit: str = "", quiet: bool = False) -> Iterator[None]:
    """Announce an activity while the context is entered. Arguments as for `Activity`."""
    activity = Activity(name, total, unit, quiet)
    _active.append(activity)
    try:
        yield
    finally:
        _active.remove(activity)


def counted(items: Sequence[T], name: str, unit: str) -> Iterator[T]:
    """Yield items as a counted activity; an item is done when the next one is requested."""
    with during(name, len(items), unit):
        for item in items:
            yield item
            advance()


@contextmanager
def uncounted() -> Iterator[None]:
    """Count nothing while the context is entered: its calls of `advance` count other units than those of the
    innermost activity.
    """
    activity = current()
    if activity is None:
        yield
        return
    was_paused = activity.paused
    activity.paused = True
    try:
        yield
    finally:
        activity.paused = was_paused


def advance(units: float = 1.0) -> None:
    """Count units of the innermost activity as done."""
    if _active and not _active[-1].paused:
        _active[-1].done += units


def current() -> Activity | None:
    """Return the innermost activity."""
    return _active[-1] if _active else None


def describe_current() -> str:
    """Return the innermost activity and its unit in progress; empty without one.

    For example `the evaluation before round 1, batch 12 of 40`.
    """
    activity = current()
    return ", ".join(filter(None, (activity.name, activity.position))) if activity else ""
