"""The base of transports that can send to one peer at a time: swaps that go on without lost peers."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedspeed.routing.transport import Payload, PeersLost, as_bytes
from fedspeed.routing.transports.frame_reader import (
    END,
    MESSAGE,
    Ahead,
    Crashed,
    Due,
    FrameReader,
    Gone,
    Header,
    Step,
)

__all__ = [
    "MESSAGE",
    "Crashed",
    "Frame",
    "FrameTransport",
    "Gone",
    "Header",
    "Read",
    "Received",
    "Step",
    "result_of",
]

# What was read from a peer: the content, None from one that recovers, or why there is none.
Received = Payload | Gone | None
Read = Callable[[], Payload | None]  # reads from a peer; may raise Gone


@dataclass(frozen=True)
class Frame:
    """A message to one participant, in arrays [n] uint8, which need not lie side by side.

    The receiver gets their bytes, and does not learn where one ends.
    """

    step: Step
    pieces: list[np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return sum(piece.size for piece in self.pieces)

    @classmethod
    def of(cls, step: Step, payload: Payload) -> "Frame":
        """Make the frame of a payload."""
        pieces = payload if isinstance(payload, list) else [payload]
        return cls(step, [as_bytes(piece) for piece in pieces])


def result_of(read: Read) -> Received:
    """Return what a call has read, or why the peer is gone."""
    try:
        return read()
    except Gone as gone:
        return gone


class FrameTransport(ABC):
    """A transport made of frames between two participants, which keep their order.

    Subclasses give `send_frame`, `receive_header`, `receive_content` and `close`. What they receive may be
    anything: `FrameReader` compares a header with what is due before the content is asked for.

    Attributes:
        names: of all participants, for messages.
    """

    def __init__(self, rank: int, size: int, names: Sequence[str] = ()):
        """Take part as number `rank` of `size`. names: of all participants, for messages."""
        self.rank = rank
        self.size = size
        self.bytes_sent = 0
        self.names = tuple(names) or tuple(f"participant {i}" for i in range(size))
        self._gone: dict[int, str] = {}  # why a peer is lost
        self._ahead: set[int] = set()  # peers that are lost because they are in a later attempt
        self._crashed: set[int] = set()  # peers that are lost because their process is gone
        self._deadline_s = 0.0  # of the last swap
        self._readers = {
            peer: FrameReader(self, peer, name) for peer, name in enumerate(self.names) if peer != rank
        }

    def swap(
        self, parts: Sequence[Payload], sizes: Sequence[int], deadline_s: float, step: Step = (0, 1)
    ) -> list[Payload]:
        """See `Transport.swap`."""
        end = time.monotonic() + deadline_s
        self._deadline_s = deadline_s
        self._send_all(parts, step, end)
        own = parts[self.rank]
        arrived: list[Payload] = [np.empty(0, np.uint8)] * self.size
        arrived[self.rank] = own if isinstance(own, list) else as_bytes(own)
        due = {i: Due(step, size) for i, size in enumerate(sizes) if i != self.rank and size}
        lost = {peer: self._gone[peer] for peer in due if peer in self._gone}
        reads = {
            peer: partial(self._readers[peer].frame, one, end)
            for peer, one in due.items()
            if peer not in lost
        }
        recovering = False
        for peer, received in self._read_all(reads).items():
            if received is None:
                recovering = True
            elif isinstance(received, Gone):
                lost[peer] = self._note(peer, received)
            else:
                arrived[peer] = received if isinstance(own, list) else as_bytes(received)
        if lost or recovering:
            ahead = frozenset(self._ahead & lost.keys())
            silent = frozenset(lost) - ahead - self._crashed
            reasons = list(lost.values())
            raise PeersLost(frozenset(lost), reasons, recovering, arrived, ahead=ahead, silent=silent)
        return arrived

    def _note(self, peer: int, gone: Gone) -> str:
        """Note that a peer is lost, unless that is known; return why it was lost first."""
        if peer not in self._gone:
            self._gone[peer] = str(gone)
            if isinstance(gone, Ahead):
                self._ahead.add(peer)
            if isinstance(gone, Crashed):
                self._crashed.add(peer)
        return self._gone[peer]

    def end_run(self) -> None:
        """See `Transport.end_run`."""
        for peer in self._readers:
            with contextlib.suppress(Gone):
                # A peer may not read before its own wait for others has ended.
                self.send_frame(peer, Frame.of(END, b"!"), self._deadline_s)

    def _send_all(self, parts: Sequence[Payload], step: Step, end: float) -> None:
        """Send all parts of a swap to the peers that are not lost; note those that are lost by now."""
        for peer, part in enumerate(parts):
            frame = Frame.of(step, part)
            if peer == self.rank or not frame.nbytes or peer in self._gone:
                continue
            try:
                self.send_frame(peer, frame, max(0.1, end - time.monotonic()))
                self.bytes_sent += frame.nbytes
            except Gone as gone:
                self._note(peer, gone)

    def _read_all(self, reads: Mapping[int, Read]) -> dict[int, Received]:
        """Make a call for each of some peers, and return the results. A transport that can read from several
        peers at the same time does.
        """
        return {peer: result_of(read) for peer, read in reads.items()}

    def send(self, peer: int, data: np.ndarray, deadline_s: float) -> None:
        """See `Transport.send`."""
        end = time.monotonic() + deadline_s
        frame = Frame.of(MESSAGE, data)
        try:
            if peer in self._gone:
                raise Gone(self._gone[peer])
            self.send_frame(peer, frame, deadline_s)
            self._flush(end)
        except Gone as gone:
            reason = self._note(peer, gone)
            raise PeersLost(frozenset({peer}), [reason]) from gone
        self.bytes_sent += frame.nbytes

    def receive(self, peer: int, deadline_s: float, max_bytes: int) -> np.ndarray:
        """See `Transport.receive`."""
        if peer in self._gone:
            raise PeersLost(frozenset({peer}), [self._gone[peer]])
        read = partial(self._readers[peer].message, max_bytes, time.monotonic() + deadline_s)
        received = self._read_all({peer: read})[peer]
        if isinstance(received, Gone):
            raise PeersLost(frozenset({peer}), [self._note(peer, received)]) from received
        assert received is not None, "only a swap can find a peer that recovers"
        return as_bytes(received)

    def _flush(self, end: float) -> None:  # noqa: B027 - most transports have nothing to do here
        """Wait until what was sent has left, where that does not happen by itself. Raises Gone."""

    @abstractmethod
    def send_frame(self, peer: int, frame: Frame, deadline_s: float) -> None:
        """Send a frame to a peer. Raises Gone if it does not take the frame in time."""

    @abstractmethod
    def receive_header(self, peer: int, end: float) -> Header:
        """See `FrameSource.receive_header`."""

    @abstractmethod
    def receive_content(self, peer: int, nbytes: int, end: float) -> Payload:
        """See `FrameSource.receive_content`. A list of arrays is passed on as it is."""

    def discard_content(self, peer: int, nbytes: int, end: float) -> None:
        """See `FrameSource.discard_content`. A transport between organisations must bound the memory."""
        self.receive_content(peer, nbytes, end)

    @abstractmethod
    def close(self) -> None:
        """See `Transport.close`."""
