"""Participants as threads of one process: for a single rank, for tests and for simulation."""

import queue

import numpy as np

from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.opening import TransportContext
from fedspeed.routing.transports.frames import Frame, FrameTransport, Gone

Mailbox = queue.Queue[Frame | None]  # None: its sender has closed


class LocalTransport(FrameTransport):
    """One participant among threads. Make all of them together, with `LocalTransport.set_of(size)`."""

    def __init__(self, rank: int, mailboxes: list[list[Mailbox]]):
        """Take part as number `rank`, with the mailboxes of all: [receiver][sender]."""
        super().__init__(rank, len(mailboxes))
        self._mailboxes = mailboxes

    @classmethod
    def set_of(cls, size: int) -> list["LocalTransport"]:
        """Return the transports of `size` participants, by number."""
        mailboxes: list[list[Mailbox]] = [[queue.Queue() for _ in range(size)] for _ in range(size)]
        return [cls(rank, mailboxes) for rank in range(size)]

    def _send(self, peer: int, frame: Frame, deadline_s: float) -> None:
        # Pieces are made for sending; a single one may be the caller's vector, which it may change
        # afterwards.
        pieces = frame.pieces if len(frame.pieces) > 1 else [_copied(frame.pieces[0])]
        self._mailboxes[peer][self.rank].put(Frame(frame.step, pieces))

    def _receive(self, peer: int, timeout_s: float) -> Frame:
        try:
            frame = self._mailboxes[self.rank][peer].get(timeout=timeout_s)
        except queue.Empty:
            raise Gone(f"participant {peer} sent nothing in time") from None
        if frame is None:
            self._mailboxes[self.rank][peer].put(None)  # so that it is found here the next time too
            raise Gone(f"participant {peer} is gone")
        return frame

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
