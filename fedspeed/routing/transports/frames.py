"""The base of transports that can send to one peer at a time: swaps that go on without lost peers."""

import itertools
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.routing.transport import Payload, PeersLost, as_bytes

Step = tuple[int, int]  # (attempt, phase), see `Transport.swap`

RECOVERY_PHASE = 0
MESSAGE: Step = (2**32 - 1, 1)  # the step of messages from one participant to one other, outside of swaps
MAX_BYTES = 1 << 36  # of one frame
MAX_PIECES = 1 << 24
PIECE_BYTES = 128  # memory that a piece takes besides its content
# What one peer may have waiting here before it is asked for; a single frame may be larger.
FRAMES_AHEAD = 16
BYTES_AHEAD = 1 << 32


def is_frame(count: int, length: int) -> bool:
    """Return whether a frame may have `count` pieces of `length` bytes each."""
    return 0 < count <= MAX_PIECES and 0 < count * length <= MAX_BYTES


def memory_bytes(count: int, length: int) -> int:
    """Return the memory that `count` pieces of `length` bytes each take."""
    return count * (length + PIECE_BYTES)


@dataclass(frozen=True)
class Frame:
    """A message between two participants, in pieces of equal length, [length] uint8 each."""

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


class Gone(Exception):
    """A peer that no longer answers, and why."""


class FrameTransport(ABC):
    """A transport made of frames between two participants, which keep their order.

    Subclasses give `_send` and `_receive`.
    """

    def __init__(self, rank: int, size: int):
        """Take part as number `rank` of `size`."""
        self.rank = rank
        self.size = size
        self.bytes_sent = 0
        # What arrived before it was waited for, by sender: frames of swaps, and messages.
        self._kept: dict[int, deque[Frame]] = defaultdict(deque)
        self._messages: dict[int, deque[Frame]] = defaultdict(deque)
        self._gone: dict[int, str] = {}  # why a peer is lost

    def swap(
        self, parts: Sequence[Payload], sizes: Sequence[int], deadline_s: float, step: Step = (0, 1)
    ) -> list[Payload]:
        """See `Transport.swap`."""
        end = time.monotonic() + deadline_s
        self._send_all(parts, step, end)
        own = parts[self.rank]
        arrived: list[Payload] = [np.empty(0, np.uint8)] * self.size
        arrived[self.rank] = own if isinstance(own, list) else as_bytes(own)
        lost: dict[int, str] = {}
        recovering = False
        for peer, size in enumerate(sizes):
            if peer == self.rank or not size:
                continue
            try:
                frame = self._next(peer, step, end)
                if frame is None:
                    recovering = True
                elif frame.nbytes != size:
                    raise Gone(f"participant {peer} sent {frame.nbytes} bytes where {size} are due")
                else:
                    in_pieces = len(frame.pieces) > 1 and isinstance(own, list)
                    arrived[peer] = frame.pieces if in_pieces else as_bytes(frame.pieces)
            except Gone as gone:
                lost[peer] = self._gone.setdefault(peer, str(gone))
        if lost or recovering:
            raise PeersLost(frozenset(lost), list(lost.values()), recovering, arrived)
        return arrived

    def _send_all(self, parts: Sequence[Payload], step: Step, end: float) -> None:
        """Send all parts of a swap to the peers that are not lost; note those that are lost by now."""
        for peer, part in enumerate(parts):
            frame = Frame.of(step, part)
            if peer == self.rank or not frame.nbytes or peer in self._gone:
                continue
            try:
                self._send(peer, frame, max(0.1, end - time.monotonic()))
                self.bytes_sent += frame.nbytes
            except Gone as gone:
                self._gone[peer] = str(gone)

    def _next(self, peer: int, step: Step, end: float) -> Frame | None:
        """Return the peer's frame of this step; None if it is in another phase of this attempt, which is what
        the recovery is for.

        Frames that wait here already are looked at even if the deadline has passed while others were waited
        for, but no more than may wait here: a peer that keeps sending other frames is gone.
        """
        attempt, phase = step
        for passed in itertools.count():
            if passed > FRAMES_AHEAD and time.monotonic() > end:
                break
            frame = self._kept[peer].popleft() if self._kept[peer] else self._unread(peer, end)
            if frame.step == MESSAGE:
                self._put_aside(peer, frame)
            elif frame.step == step:
                return frame
            elif frame.step[0] == attempt and phase != RECOVERY_PHASE:
                self._kept[peer].appendleft(frame)
                return None
            elif frame.step[0] > attempt:
                self._kept[peer].appendleft(frame)
                raise Gone(f"participant {peer} is at step {frame.step}, not at {step}")
            # Any other frame is left over from an attempt that was given up.
        raise Gone(f"participant {peer} sent {passed} other frames, and none of step {step} in time")

    def _put_aside(self, peer: int, frame: Frame) -> None:
        """Keep a frame until it is asked for, those of swaps apart from messages.

        Raises:
            Gone: the peer has more waiting here than it may; nothing of it is kept then.
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

    def _unread(self, peer: int, end: float) -> Frame:
        """Wait for the next frame of a peer that is not kept here yet."""
        if peer in self._gone:
            raise Gone(self._gone[peer])
        return self._receive(peer, max(0.0, end - time.monotonic()))

    def send(self, peer: int, data: np.ndarray, deadline_s: float) -> None:
        """See `Transport.send`."""
        end = time.monotonic() + deadline_s
        frame = Frame.of(MESSAGE, data)
        try:
            if peer in self._gone:
                raise Gone(self._gone[peer])
            self._send(peer, frame, deadline_s)
            self._flush(end)
        except Gone as gone:
            reason = self._gone.setdefault(peer, str(gone))
            raise PeersLost(frozenset({peer}), [reason]) from gone
        self.bytes_sent += frame.nbytes

    def receive(self, peer: int, deadline_s: float) -> np.ndarray:
        """See `Transport.receive`. Frames of swaps that arrive meanwhile are kept for their swap."""
        end = time.monotonic() + deadline_s
        try:
            if self._messages[peer]:
                return as_bytes(self._messages[peer].popleft().pieces)
            while (frame := self._unread(peer, end)).step != MESSAGE:
                self._put_aside(peer, frame)
        except Gone as gone:
            reason = self._gone.setdefault(peer, str(gone))
            raise PeersLost(frozenset({peer}), [reason]) from gone
        return as_bytes(frame.pieces)

    def _flush(self, end: float) -> None:  # noqa: B027 - most transports have nothing to do here
        """Wait until what was sent has left, where that does not happen by itself. Raises Gone."""

    @abstractmethod
    def _send(self, peer: int, frame: Frame, deadline_s: float) -> None:
        """Send a frame to a peer. Raises Gone if it does not take the frame in time."""

    @abstractmethod
    def _receive(self, peer: int, timeout_s: float) -> Frame:
        """Wait for the next frame of a peer. Raises Gone if none arrives in time."""

    @abstractmethod
    def close(self) -> None:
        """See `Transport.close`."""
