"""The seam under every exchange: how equal-standing participants move buffers. One contract suite tests all implementations."""

from typing import Protocol

import numpy as np


class TransportError(Exception):
    """A peer did not answer before the deadline, or its connection broke. Buffers given to the call are undefined."""


class Transport(Protocol):
    """`size` participants, numbered 0 to size-1. Every participant makes the same calls in the same order.

    Calls block at most `deadline_s` seconds and then raise TransportError; after an error the transport can only be closed.
    They may come from a thread of their own, one at a time.
    """

    rank: int
    size: int
    bytes_sent: int  # payload this participant has sent to others since the start

    def all_gather(self, mine: np.ndarray, deadline_s: float) -> np.ndarray:
        """Stack the participants' vectors of equal length and dtype: [size, n] on everyone."""
        ...

    def all_to_all(self, parts: list[np.ndarray], deadline_s: float) -> np.ndarray:
        """Give `parts[i]` to participant i. Parts for one receiver have equal lengths on all senders. Returns what came: [size, n]."""
        ...

    def close(self) -> None: ...
