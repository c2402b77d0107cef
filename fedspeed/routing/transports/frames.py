"""What transports have in common that can send to one peer at a time: swaps that go on without those who are lost."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.routing.transport import PeersLost, as_bytes

SETTLE = 0


@dataclass(frozen=True)
class Frame:
    """A message between two participants: (attempt, state), and pieces of one size, [size] uint8 each."""

    step: tuple[int, int]
    pieces: list[np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(piece.size for piece in self.pieces)


class Gone(Exception):
    """A peer that does not answer any more, and why."""


class FrameTransport(ABC):
    """Subclasses give `_send` and `_receive`, both of which raise Gone. Frames between two participants keep their order."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.bytes_sent = rank, size, 0
        self._kept: dict[int, Frame] = {}  # frames that came before they were waited for
        self._gone: dict[int, str] = {}

    def swap(self, parts: Sequence, sizes: Sequence[int], deadline_s: float, step: tuple[int, int] = (0, 1)) -> list[np.ndarray]:
        end = time.monotonic() + deadline_s
        for peer, part in enumerate(parts):
            frame = Frame(step, [as_bytes(piece) for piece in (part if isinstance(part, list) else [part])])
            if peer != self.rank and frame.nbytes and peer not in self._gone:
                try:
                    self._send(peer, frame, max(0.1, end - time.monotonic()))
                    self.bytes_sent += frame.nbytes
                except Gone as gone:
                    self._gone[peer] = str(gone)
        came, lost, settling = [np.empty(0, np.uint8)] * self.size, {}, False
        came[self.rank] = parts[self.rank] if isinstance(parts[self.rank], list) else as_bytes(parts[self.rank])
        for peer, size in enumerate(sizes):
            if peer == self.rank or not size:
                continue
            try:
                frame = self._next(peer, step, end)
                if frame is None:
                    settling = True
                elif frame.nbytes != size:
                    raise Gone(f"participant {peer} sent {frame.nbytes} bytes where {size} are due")
                else:
                    pieced = len(frame.pieces) > 1 and isinstance(parts[self.rank], list)
                    came[peer] = frame.pieces if pieced else as_bytes(frame.pieces)
            except Gone as gone:
                self._gone.setdefault(peer, str(gone))
                lost[peer] = self._gone[peer]
        if lost or settling:
            raise PeersLost(frozenset(lost), list(lost.values()), settling)
        return came

    def _next(self, peer: int, step: tuple[int, int], end: float) -> Frame | None:
        """The peer's frame of this step; None if it is at another step of this attempt."""
        while True:
            frame = self._kept.pop(peer, None)
            if frame is None:
                if peer in self._gone:
                    raise Gone(self._gone[peer])
                frame = self._receive(peer, max(0.0, end - time.monotonic()))
            if frame.step == step:
                return frame
            (attempt, state), theirs = step, frame.step[0]
            if theirs == attempt and state != SETTLE:  # settling, or somewhere else, which is to be settled
                self._kept[peer] = frame
                return None
            if theirs > attempt:
                self._kept[peer] = frame
                raise Gone(f"participant {peer} is at step {frame.step}, not at {step}")
            # Left over from something that was given up.

    @abstractmethod
    def _send(self, peer: int, frame: Frame, deadline_s: float) -> None:
        """Raises: Gone."""

    @abstractmethod
    def _receive(self, peer: int, timeout_s: float) -> Frame:
        """The next frame of a peer. Raises: Gone."""

    @abstractmethod
    def close(self) -> None: ...
