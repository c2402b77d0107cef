"""What one peer sends, read only as far as this participant has asked for it.

A peer may be a member that lies, so what it announces is compared with what is due before any memory is
allocated for it. A frame that nobody has asked for stays where it is: on a socket, the connection then blocks
its sender. Small ones are read ahead if the frame that is asked for comes behind them.
"""

import itertools
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from fedspeed.routing.transport import Payload, as_bytes

Step = tuple[int, int]  # (attempt, phase), see `Transport.swap`

RECOVERY_PHASE = 0
MESSAGE: Step = (2**32 - 1, 1)  # the step of messages from one participant to one other, outside of swaps
END: Step = (2**32 - 2, 1)  # the step of the last frame of a participant that ends the run
AHEAD_BYTES = 1 << 20  # memory of all frames of one peer that were read before they were asked for
FRAME_BYTES = 512  # memory that such a frame takes in addition to its content, at most
MAX_OTHERS = 16  # other frames that a peer may send after the deadline, before the one that is due


class Gone(Exception):
    """A peer that no longer answers, and why."""


class Crashed(Gone):
    """A peer whose process or machine is gone, as the operating system reports. Any other peer may be alive:
    one that is silent may wait for somebody who is silent towards it only.
    """


class Ahead(Gone):
    """A peer that is in a later attempt, or has ended the run."""


@dataclass(frozen=True)
class Header:
    """What a peer says about a frame before its content: the step, and the bytes of the content."""

    step: Step
    nbytes: int


class FrameSource(Protocol):
    """Where the frames of peers come from: each peer's in the order in which it has sent them.

    Each call ends by `end`, a time of `time.monotonic`, and raises Gone if the peer has not sent so much by
    then. What is there already is read after `end` too.
    """

    def receive_header(self, peer: int, end: float) -> Header:
        """Wait for the peer's next frame, and return its header only."""
        ...

    def receive_content(self, peer: int, nbytes: int, end: float) -> Payload:
        """Return the content of the frame whose header came last: `nbytes`, as the header says."""
        ...

    def discard_content(self, peer: int, nbytes: int, end: float) -> None:
        """Drop the content of the frame whose header came last, without memory for all of it."""
        ...


@dataclass(frozen=True)
class Due:
    """The frame that a swap expects of a peer: its step, and the bytes of its content."""

    step: Step
    nbytes: int


class FrameReader:
    """Reads the frames of one peer. Not more than one thread at a time may use it."""

    def __init__(self, source: FrameSource, peer: int, name: str):
        """Read the frames of participant `peer`, which messages call `name`."""
        self._source = source
        self._peer = peer
        self._name = name
        self._header: Header | None = None  # of the next frame, if its content is not read yet
        # What was read ahead: frames of swaps, and messages.
        self._frames: deque[tuple[Header, Payload]] = deque()
        self._messages: deque[Payload] = deque()
        self._ahead_bytes = 0
        self._last: Step | None = None  # of the frame that was returned last

    @property
    def ahead_bytes(self) -> int:
        """Memory of what was read ahead."""
        return self._ahead_bytes

    def frame(self, due: Due, end: float) -> Payload | None:
        """Return the content of the frame that is due; None if the peer is in another phase of this attempt,
        which is what the recovery is for. That frame stays for the recovery.

        Frames that are left over from an attempt that was given up are dropped. What is here already is
        looked at even if the deadline has passed, but no more than MAX_OTHERS frames of it.

        Raises:
            Gone: the peer has sent another number of bytes, the same phase twice, or a frame of a later
                attempt; or the frame did not arrive by `end`.
        """
        attempt, phase = due.step
        for others in itertools.count():
            if others > MAX_OTHERS and time.monotonic() > end:
                break
            header = self._next_header(end)
            if header.step == MESSAGE:
                self._read_ahead(header, end)
            elif header.step == due.step:
                if header.nbytes != due.nbytes:
                    raise Gone(f"{self._name} sent {header.nbytes} bytes where {due.nbytes} are due")
                self._last = header.step
                return self._content(header, end)
            elif header.step[0] == attempt and phase != RECOVERY_PHASE:
                if header.step == self._last and header.step[1] != RECOVERY_PHASE:
                    raise Gone(f"{self._name} sent step {header.step} twice")
                return None
            elif header.step == END:
                raise Ahead(f"{self._name} has ended the run; its own messages say why")
            elif header.step[0] > attempt:
                raise Ahead(f"{self._name} is at step {header.step}, not at {due.step}")
            else:
                self._discard(header, end)
        raise Gone(f"{self._name} sent {others} other frames, and none of step {due.step} in time")

    def message(self, max_bytes: int, end: float) -> Payload:
        """Return the content of the next message. Small frames of swaps that come first are read ahead.

        Raises:
            Gone: the message has more than `max_bytes`, or did not arrive by `end`.
        """
        if self._messages:
            message = self._messages.popleft()
            nbytes = as_bytes(message).size
            self._ahead_bytes -= nbytes + FRAME_BYTES
            self._check_message(nbytes, max_bytes)
            return message
        while (header := self._unread_header(end)).step != MESSAGE:
            self._read_ahead(header, end)
        self._check_message(header.nbytes, max_bytes)
        self._header = None
        return self._source.receive_content(self._peer, header.nbytes, end)

    def _check_message(self, nbytes: int, max_bytes: int) -> None:
        if nbytes > max_bytes:
            raise Gone(f"{self._name} sent a message of {nbytes} bytes; at most {max_bytes} are accepted")

    def _next_header(self, end: float) -> Header:
        """Return the header of the next frame, which may have been read ahead."""
        return self._frames[0][0] if self._frames else self._unread_header(end)

    def _unread_header(self, end: float) -> Header:
        """Return the header of the next frame whose content is not read yet."""
        if self._header is None:
            header = self._source.receive_header(self._peer, end)
            if header.nbytes <= 0:
                raise Gone(f"{self._name} announced a frame of {header.nbytes} bytes")
            self._header = header
        return self._header

    def _content(self, header: Header, end: float) -> Payload:
        """Return the content of the next frame, whose header this is."""
        if self._frames:
            self._ahead_bytes -= header.nbytes + FRAME_BYTES
            return self._frames.popleft()[1]
        self._header = None
        return self._source.receive_content(self._peer, header.nbytes, end)

    def _discard(self, header: Header, end: float) -> None:
        """Drop the next frame, whose header this is."""
        if self._frames:
            self._content(header, end)
            return
        self._header = None
        self._source.discard_content(self._peer, header.nbytes, end)

    def _read_ahead(self, header: Header, end: float) -> None:
        """Read the next unread frame, whose header this is, although nobody has asked for it yet.

        Raises:
            Gone: together with what was read ahead before, it takes more than AHEAD_BYTES.
        """
        needed = self._ahead_bytes + header.nbytes + FRAME_BYTES
        if needed > AHEAD_BYTES:
            raise Gone(
                f"{self._name} sent {header.nbytes} bytes that nobody had asked for; with what was read "
                f"before they would take {needed} bytes, of at most {AHEAD_BYTES}"
            )
        self._header = None
        content = self._source.receive_content(self._peer, header.nbytes, end)
        self._ahead_bytes = needed
        if header.step == MESSAGE:
            self._messages.append(content)
        else:
            self._frames.append((header, content))
