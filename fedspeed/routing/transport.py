"""The interface under every exchange: how participants of equal standing move bytes to each other.

One suite of tests holds all implementations to this contract (tests/routing/contract.py).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedspeed.routing.buffer_pool import BUFFERS

# Arrays are [n] uint8. A list is one message in pieces of equal length, which need not lie side by side.
Payload = bytes | np.ndarray | list[np.ndarray]


class TransportError(Exception):
    """A peer did not answer before the deadline, or its connection broke. The content of buffers that were
    given to the call is undefined.
    """


class PeersLost(TransportError):
    """Participants no longer answer. The others have been heard, and the transport goes on without the lost.

    Attributes:
        peers: numbers of the lost participants; empty if only `recovering` is why the call ended.
        recovering: whether a participant that does answer is in another phase (`Transport.swap`).
        arrived: what has arrived from the others in this swap, by participant; empty if that is not known.
        ahead: those of the lost that are in a later attempt, or have ended the run (`Transport.end_run`).
        silent: those of the lost that may be alive: their processes are not known to be gone.
    """

    def __init__(
        self,
        peers: frozenset[int],
        reasons: Sequence[str] = (),
        recovering: bool = False,
        arrived: Sequence[Payload] = (),
        *,
        ahead: frozenset[int] = frozenset(),
        silent: frozenset[int] = frozenset(),
    ):
        super().__init__("; ".join(reasons) or "a participant recovers from a loss")
        self.ahead = ahead
        self.silent = silent
        self.peers = peers
        self.arrived = arrived
        self.recovering = recovering


class Transport(Protocol):
    """A connection of `size` participants, numbered from 0 to size-1, all of which make the same calls in the
    same order.

    Calls block for at most `deadline_s` seconds and then raise TransportError. After an error the transport
    can only be closed, unless the error is PeersLost: then calls go on among the others. Calls may come from
    any thread, one at a time.

    Attributes:
        rank: this participant's number. size: how many there are.
        bytes_sent: payload that this participant has sent to others since the start.
    """

    rank: int
    size: int
    bytes_sent: int

    def swap(
        self,
        parts: Sequence[Payload],
        sizes: Sequence[int],
        deadline_s: float,
        step: tuple[int, int] = (0, 1),
    ) -> list[Payload]:
        """Send `parts[i]` to participant i, and return what each has sent to this one, of `sizes[i]` bytes.

        All participants call it together. An empty part is not sent; a size of 0 is not waited for. What this
        participant gives to itself comes back.

        Args:
            parts: what is sent in pieces may arrive as a list of arrays.
            step: (attempt, phase), the same on all who take part. Transports that can do without a peer tell
                by it what a late message belongs to. Phase 0 is the recovery: whoever waits in another phase
                of the same attempt and hears of it gets PeersLost(recovering=True).
            sizes: what is due. Whoever sends another number of bytes is lost. No memory is allocated for what
                nobody expects, so no size may come from a peer without having been compared with a maximum.
        """
        ...

    def send(self, peer: int, data: np.ndarray, deadline_s: float) -> None:
        """Send one participant a message, whatever the others do. The two must not be in a swap, and the
        receiver takes the message before its next swap with the sender: it may refuse a large message there.

        Args:
            data: [n] uint8. It must not change afterwards: it may still be on its way when this returns.
        """
        ...

    def receive(self, peer: int, deadline_s: float, max_bytes: int) -> np.ndarray:
        """Wait for the next message of a participant, and return its bytes [n] uint8. Messages of one sender
        keep their order.

        Args:
            max_bytes: the sender of a larger message is lost.
        """
        ...

    def end_run(self) -> None:
        """Send everybody, lost participants too, that this one ends the run: from now on their swaps with it
        raise PeersLost, with this participant in `ahead`. A transport that cannot go on without a participant
        has nothing to do here.
        """
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


def all_gather(transport: Transport, own: np.ndarray, deadline_s: float) -> np.ndarray:
    """Return the participants' vectors of equal length and dtype: [size, n] on everyone."""
    data = as_bytes(own)
    arrived = transport.swap([data] * transport.size, [data.size] * transport.size, deadline_s)
    return np.concatenate([as_bytes(part) for part in arrived]).view(own.dtype).reshape(transport.size, -1)


def swap_among(
    transport: Transport,
    present: Sequence[int],
    parts: Sequence[Payload],
    sizes: Sequence[int],
    *,
    deadline_s: float,
    step: tuple[int, int],
) -> list[Payload]:
    """Make a swap with some participants only; return what they have sent, in their order.

    Args:
        present: their numbers, this participant's among them.
        parts, sizes: `parts[i]` is sent to participant `present[i]`, which sends `sizes[i]` bytes.

    Raises:
        PeersLost: some do not answer; with places in `present` for the numbers of participants.
        TransportError: as `Transport.swap` does.
    """
    everybody: list[Payload] = [b""] * transport.size
    due = [0] * transport.size
    for place, number in enumerate(present):
        everybody[number] = parts[place]
        due[number] = sizes[place]
    try:
        arrived = transport.swap(everybody, due, deadline_s, step)
    except PeersLost as error:

        def places(peers: frozenset[int]) -> frozenset[int]:
            return frozenset(present.index(peer) for peer in peers)

        raise PeersLost(
            places(error.peers),
            [str(error)],
            error.recovering,
            [error.arrived[number] for number in present] if error.arrived else (),
            ahead=places(error.ahead),
            silent=places(error.silent),
        ) from error
    return [arrived[number] for number in present]


def as_bytes(payload: Payload) -> np.ndarray:
    """Return a payload as [n] uint8, without a copy where its bytes lie side by side."""
    if isinstance(payload, list) and len(payload) == 1:
        return as_bytes(payload[0])
    if isinstance(payload, list):
        joined = BUFFERS.take(sum(piece.nbytes for piece in payload))
        return np.concatenate([as_bytes(piece) for piece in payload], out=joined) if payload else joined
    if isinstance(payload, np.ndarray):
        return np.ascontiguousarray(payload).reshape(-1).view(np.uint8)
    return np.frombuffer(payload, np.uint8) if len(payload) else np.empty(0, np.uint8)
