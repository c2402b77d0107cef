"""The seam under every exchange: how equal-standing participants move buffers. One contract suite tests all
implementations.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TransportError(Exception):
    """A peer did not answer before the deadline, or its connection broke. Buffers given to the call are
    undefined.
    """


class PeersLost(TransportError):
    """Participants that no longer answer. The others have been heard, and the transport goes on without
    these.

    Attributes:
        peers: their numbers. settling: whether somebody who does answer is settling (`Transport.swap`).
    """

    def __init__(self, peers: frozenset[int], reasons: Sequence[str] = (), settling: bool = False):
        super().__init__("; ".join(reasons) or "a participant is settling a loss")
        self.peers = peers
        self.settling = settling


class Transport(Protocol):
    """`size` participants, numbered 0 to size-1. Every participant makes the same calls in the same order.

    Calls block at most `deadline_s` seconds and then raise TransportError. After an error the transport can
    only be closed, unless it is PeersLost: then calls go on among the others. Calls may come from a thread of
    their own, one at a time.
    """

    rank: int
    size: int
    bytes_sent: int  # payload this participant has sent to others since the start

    def swap(
        self, parts: Sequence, sizes: Sequence[int], deadline_s: float, step: tuple[int, int] = (0, 1)
    ) -> list[np.ndarray]:
        """Give `parts[i]` to participant i, who expects so many bytes; returns what came from each,
        `sizes[i]` bytes [uint8].

        Args:
            parts: buffers of bytes, or lists of pieces of one size, which some transports give as they came:
                as lists of arrays. What this participant gives to itself comes back.
            step: (attempt, state), equal on all who take part; transports that can do without a peer tell by
                it what a late message belongs to. State 0 is settling: whoever waits in another state of the
                same attempt and hears of it gets PeersLost(settling=True).
        """
        ...

    def send(self, peer: int, data: np.ndarray, deadline_s: float) -> None:
        """Give one participant a message, whatever the others do; no swap of the two may be under way.

        Args:
            data: [n] uint8. It may be on its way still when this returns, so it must not change afterwards.
        """
        ...

    def receive(self, peer: int, deadline_s: float) -> np.ndarray:
        """Wait for the next message of a participant; returns its bytes [n] uint8. Messages of one sender
        keep their order.
        """
        ...

    def close(self) -> None: ...


def all_gather(transport: Transport, mine: np.ndarray, deadline_s: float) -> np.ndarray:
    """Stack the participants' vectors of equal length and dtype: [size, n] on everyone."""
    data = as_bytes(mine)
    came = transport.swap([data] * transport.size, [data.size] * transport.size, deadline_s)
    return np.concatenate(came).view(mine.dtype).reshape(transport.size, -1)


def all_to_all(transport: Transport, parts: Sequence[np.ndarray], deadline_s: float) -> np.ndarray:
    """Give `parts[i]` to participant i. Parts for one receiver have equal lengths on all senders. Returns
    what came: [size, n].
    """
    size = parts[transport.rank].nbytes
    came = transport.swap([as_bytes(part) for part in parts], [size] * transport.size, deadline_s)
    return np.concatenate(came).view(parts[0].dtype).reshape(transport.size, -1)


def as_bytes(buffer) -> np.ndarray:
    """A buffer as [n] uint8, without a copy where it lies in one piece."""
    if isinstance(buffer, list):
        return np.concatenate([as_bytes(piece) for piece in buffer]) if buffer else np.empty(0, np.uint8)
    if isinstance(buffer, np.ndarray):
        return np.ascontiguousarray(buffer).reshape(-1).view(np.uint8)
    return np.frombuffer(buffer, np.uint8) if len(buffer) else np.empty(0, np.uint8)
