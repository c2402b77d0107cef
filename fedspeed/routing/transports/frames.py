"""What transports have in common that can send to one peer at a time: swaps that go on without those who are
lost.
"""

import itertools
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.routing.transport import PeersLost, as_bytes

SETTLE = 0
MESSAGE = (2**32 - 1, 1)  # the step of what goes from one participant to one other, outside of swaps
MAX_BYTES, MAX_PIECES = 1 << 36, 1 << 24  # of one frame
PIECE_BYTES = 128  # of memory that a piece takes beside its content
# What one peer may have lying here that nobody has asked for yet; one frame alone may be larger.
FRAMES_AHEAD = 16
BYTES_AHEAD = 1 << 32


def is_frame(count: int, length: int) -> bool:
    """Say whether a frame may have so many pieces of so many bytes each."""
    return 0 < count <= MAX_PIECES and 0 < count * length <= MAX_BYTES


def memory_bytes(count: int, length: int) -> int:
    """Return what pieces of so many bytes take of memory."""
    return count * (length + PIECE_BYTES)


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
    """Subclasses give `_send` and `_receive`, both of which raise Gone. Frames between two participants keep
    their order.
    """

    def __init__(self, rank: int, size: int):
        self.rank = rank
        self.size = size
        self.bytes_sent = 0
        # What came before it was waited for, by sender: frames of swaps, and messages.
        self._kept: dict[int, deque[Frame]] = defaultdict(deque)
        self._messages: dict[int, deque[Frame]] = defaultdict(deque)
        self._gone: dict[int, str] = {}

    def swap(
        self, parts: Sequence, sizes: Sequence[int], deadline_s: float, step: tuple[int, int] = (0, 1)
    ) -> list[np.ndarray]:
        end = time.monotonic() + deadline_s
        for peer, part in enumerate(parts):
            frame = Frame(step, [as_bytes(piece) for piece in (part if isinstance(part, list) else [part])])
            if peer != self.rank and frame.nbytes and peer not in self._gone:
                try:
                    self._send(peer, frame, max(0.1, end - time.monotonic()))
                    self.bytes_sent += frame.nbytes
                except Gone as gone:
                    self._gone[peer] = str(gone)
        came = [np.empty(0, np.uint8)] * self.size
        lost = {}
        settling = False
        came[self.rank] = (
            parts[self.rank] if isinstance(parts[self.rank], list) else as_bytes(parts[self.rank])
        )
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
        """Return the peer's frame of this step; None if it is at another step of this attempt.

        What lies here already is looked at even if the deadline has passed in the wait for others, but not
        more of it than may lie here: a peer that never stops to send other things is gone.
        """
        for passed in itertools.count():
            if passed > FRAMES_AHEAD and time.monotonic() > end:
                raise Gone(f"participant {peer} sent {passed} other frames, and none of step {step} in time")
            frame = self._kept[peer].popleft() if self._kept[peer] else self._fresh(peer, end)
            if frame.step == MESSAGE:
                self._put_aside(peer, frame)
                continue
            if frame.step == step:
                return frame
            (attempt, state) = step
            theirs = frame.step[0]
            if theirs == attempt and state != SETTLE:  # settling, or somewhere else, which is to be settled
                self._kept[peer].appendleft(frame)
                return None
            if theirs > attempt:
                self._kept[peer].appendleft(frame)
                raise Gone(f"participant {peer} is at step {frame.step}, not at {step}")
            # Left over from something that was given up.

    def _put_aside(self, peer: int, frame: Frame) -> None:
        """Keep a frame until it is asked for: those of swaps apart from messages.

        Raises:
            Gone: the peer has more lying here than it may; nothing of it is kept then.
        """
        kept = self._kept[peer]
        messages = self._messages[peer]
        (messages if frame.step == MESSAGE else kept).append(frame)
        ahead = [memory_bytes(len(one.pieces), one.pieces[0].size) for one in (*kept, *messages)]
        if len(ahead) > FRAMES_AHEAD or (len(ahead) > 1 and sum(ahead) > BYTES_AHEAD):
            kept.clear()
            messages.clear()
            raise Gone(
                f"participant {peer} sent {len(ahead)} frames of {sum(ahead)} bytes together that "
                f"nobody had asked for; at most {FRAMES_AHEAD} of {BYTES_AHEAD} bytes are kept"
            )

    def _fresh(self, peer: int, end: float) -> Frame:
        """The next frame of a peer that has not been looked at."""
        if peer in self._gone:
            raise Gone(self._gone[peer])
        return self._receive(peer, max(0.0, end - time.monotonic()))

    def send(self, peer: int, data: np.ndarray, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        frame = Frame(MESSAGE, [as_bytes(data)])
        try:
            if peer in self._gone:
                raise Gone(self._gone[peer])
            self._send(peer, frame, deadline_s)
            self._flush(end)
        except Gone as gone:
            self._gone.setdefault(peer, str(gone))
            raise PeersLost(frozenset({peer}), [self._gone[peer]]) from gone
        self.bytes_sent += frame.nbytes

    def receive(self, peer: int, deadline_s: float) -> np.ndarray:
        end = time.monotonic() + deadline_s
        try:
            if self._messages[peer]:
                return as_bytes(self._messages[peer].popleft().pieces)
            while (frame := self._fresh(peer, end)).step != MESSAGE:
                # A frame of a swap waits for its swap; one that was given up is passed over there.
                self._put_aside(peer, frame)
        except Gone as gone:
            self._gone.setdefault(peer, str(gone))
            raise PeersLost(frozenset({peer}), [self._gone[peer]]) from gone
        return as_bytes(frame.pieces)

    def _flush(self, end: float) -> None:  # noqa: B027 - most transports have nothing to do here
        """Wait until what was sent has left, where that does not happen by itself. Raises: Gone."""

    @abstractmethod
    def _send(self, peer: int, frame: Frame, deadline_s: float) -> None:
        """Raises: Gone."""

    @abstractmethod
    def _receive(self, peer: int, timeout_s: float) -> Frame:
        """The next frame of a peer. Raises: Gone."""

    @abstractmethod
    def close(self) -> None: ...
