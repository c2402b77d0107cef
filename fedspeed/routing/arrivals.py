"""Who has reached an exchange, as known from outside of the transport."""

from typing import Protocol


class ArrivalTracker(Protocol):
    """Track from outside of the transport which participants have reached an exchange, so that the error of a
    failed one can name the others, and which are lost, which makes an exchange fail.

    Exchanges are numbered from 0; names are those of messages.
    """

    def arrive(self, number: int) -> None:
        """Note that this participant has reached an exchange."""
        ...

    def missing(self, number: int) -> list[str]:
        """Return the names of participants that have not reached an exchange."""
        ...

    def lost(self) -> list[str]:
        """Return the names of participants whose heartbeat has stopped."""
        ...


class NoArrivalTracker:
    """A tracker that knows nobody: errors say that somebody is missing, but not who."""

    def arrive(self, number: int) -> None:
        """Do nothing."""

    def missing(self, number: int) -> list[str]:
        """Return no names."""
        return []

    def lost(self) -> list[str]:
        """Return no names."""
        return []
