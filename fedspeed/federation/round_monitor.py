"""The interface of the monitor, as the rounds use it. The session passes a monitor to the rounds
(monitor.monitor).
"""

from typing import Protocol

from fedspeed.monitor.records import RoundRecord


class RoundMonitor(Protocol):
    """Shows local steps and rounds."""

    def step(self, round_number: int, local_step: int, local_steps: int, loss: float | None = None) -> None:
        """Show that local step `local_step` (from 1) of `local_steps` is done on this rank, with its mean
        loss.
        """
        ...

    def round(self, record: RoundRecord) -> None:
        """Show the record of a finished round."""
        ...
