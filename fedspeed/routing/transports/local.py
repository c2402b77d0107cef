"""Participants as threads of one process: for a single rank, for tests and for simulation."""

import queue
import time

import numpy as np

from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.opening import TransportContext
from fedspeed.routing.transport import Payload
from fedspeed.routing.transports.frames import Crashed, Frame, FrameTransport, Gone, Header

Mailbox = queue.Queue[Frame | None]  # None: its sender has closed


class LocalTransport(FrameTransport):
    """One participant among threads. Make all of them together, with `LocalTransport.set_of(size)`."""

    def __init__(self, rank: int, mailboxes: list[list[Mailbox]]):
        """Take part as number `rank`, with the mailboxes of all: [receiver][sender]."""
        super().__init__(rank, len(mailboxes))
        self._mailboxes = mailboxes
        self._current: dict[int, Frame] = {}  # by sender, the frame whose header was returned last

    @classmethod
    def set_of(cls, size: int) -> list["LocalTransport"]:
        """Return the transports of `size` participants, by number."""
        mailboxes: list[list[Mailbox]] = [[queue.Queue() for _ in range(size)] for _ in range(size)]
        return [cls(rank, mailboxes) for rank in range(size)]

    def send_frame(self, peer: int, frame: Frame, deadline_s: float) -> None:
        """See `FrameTransport.send_frame`."""
        # Pieces are made for sending; a single one may be the caller's vector, which it may change
        # afterwards.
        pieces = frame.pieces if len(frame.pieces) > 1 else [_copied(frame.pieces[0])]
        self._mailboxes[peer][self.rank].put(Frame(frame.step, pieces))

    def receive_header(self, peer: int, end: float) -> Header:
        """See `FrameSource.receive_header`."""
        try:
            frame = self._mailboxes[self.rank][peer].get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            raise Gone(f"participant {peer} sent nothing in time") from None
        if frame is None:
            self._mailboxes[self.rank][peer].put(None)  # so that it is found here the next time too
            raise Crashed(f"participant {peer} is gone")
        self._current[peer] = frame
        return Header(frame.step, frame.nbytes)

    def receive_content(self, peer: int, nbytes: int, end: float) -> Payload:
        """Return the content as it was sent: pieces that were made for sending are not copied."""
        pieces = self._current.pop(peer).pieces
        return pieces if len(pieces) > 1 else pieces[0]

    def close(self) -> None:
        """Leave: the others find this participant gone."""
        for receiver in range(self.size):
            self._mailboxes[receiver][self.rank].put(None)


def _copied(piece: np.ndarray) -> np.ndarray:
    copy = BUFFERS.take(piece.size)
    copy[:] = piece
    return copy


def open_transport(context: TransportContext) -> LocalTransport:
    """Return the transport of a single participant, who has nobody to connect to."""
    assert len(context.participants) == 1, "participants of one process are made together, by `set_of`"
    return LocalTransport.set_of(1)[0]
