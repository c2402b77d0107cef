"""The clock that an engine reports its seconds to (`monitor.clock.StageClock`), as far as the engine uses
it.
"""

from contextlib import AbstractContextManager
from typing import Protocol


class Trace(Protocol):
    """Describe what stores the spans of time that `monitor.trace_rounds` asks for."""

    def span(self, kind: str, name: str, begin: float, end: float) -> None: ...


class Clock(Protocol):
    """Describe a clock that adds up seconds by stage."""

    @property
    def trace(self) -> Trace: ...

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Charge the time inside to a stage such as `compute`, `gather` or `idle`."""
