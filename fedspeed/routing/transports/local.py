"""Participants as threads of one process: for a single rank, for tests and for simulation."""

import queue

import numpy as np

from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.opening import TransportContext
from fedspeed.routing.transports.frames import Frame, FrameTransport, Gone


class LocalTransport(FrameTransport):
    """One participant; make a whole set of them with `LocalTransport.set_of(size)`. `close` is the end of it
    for the others.
    """

    def __init__(self, rank: int, mailboxes: list[list[queue.Queue]]):
        super().__init__(rank, len(mailboxes))
        self._mailboxes = mailboxes  # [receiver][sender]

    @classmethod
    def set_of(cls, size: int) -> list["LocalTransport"]:
        mailboxes = [[queue.Queue() for _ in range(size)] for _ in range(size)]
        return [cls(rank, mailboxes) for rank in range(size)]

    def _send(self, peer: int, frame: Frame, deadline_s: float) -> None:
        self._mailboxes[peer][self.rank].put(
            Frame(frame.step, frame.pieces if len(frame.pieces) > 1 else [_copied(frame.pieces[0])])
        )

    def _receive(self, peer: int, timeout_s: float) -> Frame:
        try:
            frame = self._mailboxes[self.rank][peer].get(timeout=timeout_s)
        except queue.Empty:
            raise Gone(f"participant {peer} sent nothing in time") from None
        if frame is None:
            self._mailboxes[self.rank][peer].put(None)
            raise Gone(f"participant {peer} is gone")
        return frame

    def close(self):
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
