"""Sites of anonymous sums in one process and with a virtual clock: real attempts over real frames, where time
passes only while all wait.
"""

import threading
from collections import deque
from types import SimpleNamespace

import numpy as np

from fedspeed.routing.transports import frames
from fedspeed.routing.transports.frames import Crashed, Frame, FrameTransport, Gone, Header

LATENCY_S = 0.01
CLOSED = None


class VirtualClock:
    """A clock that goes on once every site waits: to the earliest moment that one of them waits for.

    Attributes:
        now: seconds since the start.
    """

    def __init__(self, sites: int):
        """Begin at zero, with this number of sites at work."""
        self.now = 0.0
        self.changed = threading.Condition()
        self._at_work = sites
        self._waiting: dict[int, float] = {}  # by site, until when

    def wait(self, site: int, until: float) -> None:
        """Wait until that time, or until something has arrived for this site. Called under `changed`."""
        self._waiting[site] = until
        self._advance()
        while site in self._waiting:
            self.changed.wait()

    def wake(self, site: int) -> None:
        """Let a site look at what has arrived. Called under `changed`."""
        self._waiting.pop(site, None)
        self.changed.notify_all()

    def leave(self) -> None:
        """Note that a site has ended."""
        with self.changed:
            self._at_work -= 1
            self._advance()

    def _advance(self) -> None:
        if self._waiting and len(self._waiting) == self._at_work:
            self.now = max(self.now, min(self._waiting.values()))
            for site in [site for site, until in self._waiting.items() if until <= self.now]:
                del self._waiting[site]
            self.changed.notify_all()


class VirtualTransport(FrameTransport):
    """A transport among threads whose messages take LATENCY_S of a virtual clock.

    Attributes:
        on_send: gets (receiver, frame) of all that this site sends, and returns the frames that leave in its
            place, each with the seconds by which it is late.
    """

    def __init__(self, rank: int, clock: VirtualClock, inboxes):
        super().__init__(rank, len(inboxes))
        self.on_send = lambda receiver, frame: [(0.0, frame)]
        self._clock = clock
        self._current = {}
        self._inboxes = inboxes  # [receiver][sender] of (time of arrival, frame)

    @classmethod
    def set_of(cls, size: int, monkeypatch) -> list["VirtualTransport"]:
        """Return the transports of `size` sites, whose deadlines are of one virtual clock."""
        clock = VirtualClock(size)
        monkeypatch.setattr(frames, "time", SimpleNamespace(monotonic=lambda: clock.now))
        inboxes = [[deque() for _ in range(size)] for _ in range(size)]
        return [cls(rank, clock, inboxes) for rank in range(size)]

    @property
    def now(self) -> float:
        """Seconds of the virtual clock."""
        return self._clock.now

    def send_frame(self, peer, frame, deadline_s):
        copied = Frame(frame.step, [np.array(piece) for piece in frame.pieces])
        with self._clock.changed:
            for late_s, sent in self.on_send(peer, copied):
                self._put(peer, late_s, sent)

    def _put(self, peer, late_s, frame):
        inbox = self._inboxes[peer][self.rank]
        earliest = inbox[-1][0] if inbox else 0.0  # a connection keeps the order
        inbox.append((max(earliest, self._clock.now + LATENCY_S + late_s), frame))
        self._clock.wake(peer)

    def receive_header(self, peer, end):
        with self._clock.changed:
            inbox = self._inboxes[self.rank][peer]
            while True:
                if inbox and inbox[0][0] <= self._clock.now:
                    if inbox[0][1] is CLOSED:
                        raise Crashed(f"participant {peer} is gone")
                    self._current[peer] = inbox.popleft()[1]
                    return Header(self._current[peer].step, self._current[peer].nbytes)
                if self._clock.now >= end:
                    raise Gone(f"participant {peer} sent nothing in time")
                self._clock.wait(self.rank, min(end, inbox[0][0]) if inbox else end)

    def receive_content(self, peer, nbytes, end):
        return self._current.pop(peer).pieces

    def close(self):
        """Leave: the others find this site gone."""
        with self._clock.changed:
            for peer in range(self.size):
                self._put(peer, 0.0, CLOSED)
        self._clock.leave()
