"""What is read of a peer's frames, and what is left unread, with a peer that sends anything."""

import numpy as np
import pytest

from fedspeed.net import sockets
from fedspeed.net.sockets import receive_into
from fedspeed.routing.transport import as_bytes
from fedspeed.routing.transports.frame_reader import (
    AHEAD_BYTES,
    FRAME_BYTES,
    MAX_OTHERS,
    MESSAGE,
    Due,
    FrameReader,
    Gone,
    Header,
)

LATER = float("inf")
PAST = 0.0
HUGE = 1 << 60


class Script:
    """A source whose peer sends the given frames: (step, bytes that it announces). The content is zeros.

    Attributes:
        read, discarded: bytes of content so far. headers: how many were read.
    """

    def __init__(self, *frames):
        self.frames = list(frames)
        self.read = 0
        self.discarded = 0
        self.headers = 0

    def receive_header(self, peer, end):
        if not self.frames:
            raise Gone("site7: it sent nothing in time")
        self.headers += 1
        return Header(*self.frames.pop(0))

    def receive_content(self, peer, nbytes, end):
        self.read += nbytes
        return np.zeros(nbytes, np.uint8)

    def discard_content(self, peer, nbytes, end):
        self.discarded += nbytes


def script(*frames) -> tuple[Script, FrameReader]:
    source = Script(*frames)
    return source, FrameReader(source, 7, "site7")


def test_the_frame_that_is_due_is_read():
    source, reader = script(((3, 1), 100), ((3, 2), 50))
    assert as_bytes(reader.frame(Due((3, 1), 100), LATER)).size == 100
    assert source.headers == 1, "nothing is read before it is asked for"
    assert as_bytes(reader.frame(Due((3, 2), 50), LATER)).size == 50


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([((3, 1), HUGE)], f"sent {HUGE} bytes where 100 are due"),
        ([((3, 1), 101)], "sent 101 bytes where 100 are due"),
        ([((3, 1), 99)], "sent 99 bytes where 100 are due"),
        ([((3, 1), 50), ((3, 1), 50)], "sent 50 bytes where 100 are due"),
        ([((3, 1), 0)], "announced a frame of 0 bytes"),
        ([((3, 1), -5)], "announced a frame of -5 bytes"),
        ([((4, 0), HUGE)], r"is at step \(4, 0\), not at \(3, 1\)"),
        ([(MESSAGE, HUGE)], f"sent {HUGE} bytes that nobody had asked for"),
    ],
    ids=["huge", "oversized", "undersized", "split", "empty", "negative", "later attempt", "message"],
)
def test_a_frame_that_is_not_due_is_refused_at_its_header(frames, reason):
    source, reader = script(*frames)
    with pytest.raises(Gone, match=f"site7 {reason}"):
        reader.frame(Due((3, 1), 100), LATER)
    assert (source.read, source.discarded, source.headers) == (0, 0, 1)


def test_a_phase_that_is_sent_twice_is_refused():
    source, reader = script(((3, 1), 100), ((3, 1), 100))
    reader.frame(Due((3, 1), 100), LATER)
    with pytest.raises(Gone, match=r"site7 sent step \(3, 1\) twice"):
        reader.frame(Due((3, 2), 100), LATER)
    assert source.read == 100


def test_a_recovery_is_noticed_without_its_content_and_stays():
    """Also behind a frame of the same phase, and with frames of phases that were given up before it."""
    source, reader = script(((3, 4), 10), ((3, 5), HUGE), ((3, 0), 100), ((3, 0), 7))
    reader.frame(Due((3, 4), 10), LATER)
    assert reader.frame(Due((3, 6), HUGE), LATER) is None
    assert reader.frame(Due((3, 6), HUGE), LATER) is None, "it is still there"
    assert source.read == 10
    assert as_bytes(reader.frame(Due((3, 0), 100), LATER)).size == 100
    assert source.discarded == HUGE, "what is left over takes no memory"
    assert reader.frame(Due((3, 7), 5), LATER) is None
    assert as_bytes(reader.frame(Due((3, 0), 7), LATER)).size == 7


def test_frames_of_an_attempt_that_was_given_up_are_dropped():
    source, reader = script(((2, 9), HUGE), ((0, 1), 8), ((3, 1), 100))
    assert as_bytes(reader.frame(Due((3, 1), 100), LATER)).size == 100
    assert (source.read, source.discarded) == (100, HUGE + 8)


def test_a_peer_that_sends_only_other_frames_is_gone_at_the_deadline():
    source, reader = script(*[((2, 1), 5)] * 1000)
    with pytest.raises(Gone, match=r"site7 sent 17 other frames, and none of step \(3, 1\) in time"):
        reader.frame(Due((3, 1), 100), PAST)
    assert source.headers == MAX_OTHERS + 1


def test_small_messages_wait_until_they_are_asked_for():
    source, reader = script((MESSAGE, 1000), (MESSAGE, 2000), ((0, 1), 100), (MESSAGE, 3000))
    reader.frame(Due((0, 1), 100), LATER)
    assert reader.ahead_bytes == 3000 + 2 * FRAME_BYTES
    sizes = [as_bytes(reader.message(5000, LATER)).size for _ in range(3)]
    assert sizes == [1000, 2000, 3000] and reader.ahead_bytes == 0


def test_small_frames_of_swaps_wait_while_a_message_is_awaited():
    source, reader = script(((0, 1), 100), ((0, 1), 200), (MESSAGE, 300), ((0, 1), 400))
    assert as_bytes(reader.message(300, LATER)).size == 300
    assert [as_bytes(reader.frame(Due((0, 1), size), LATER)).size for size in (100, 200, 400)] == [
        100,
        200,
        400,
    ]
    assert reader.ahead_bytes == 0


def test_a_frame_that_waits_has_the_size_that_is_due_too():
    source, reader = script(((0, 1), 100), (MESSAGE, 300))
    reader.message(300, LATER)
    with pytest.raises(Gone, match="site7 sent 100 bytes where 8 are due"):
        reader.frame(Due((0, 1), 8), LATER)


@pytest.mark.parametrize("nbytes", [1, 1000, AHEAD_BYTES - FRAME_BYTES])
@pytest.mark.parametrize("awaited", ["frame", "message"])
def test_what_waits_takes_bounded_memory(nbytes, awaited):
    step = MESSAGE if awaited == "frame" else (0, 1)
    source, reader = script(*[(step, nbytes)] * 5000)
    with pytest.raises(Gone, match=f"site7 sent {nbytes} bytes that nobody had asked for; .* {AHEAD_BYTES}"):
        if awaited == "frame":
            reader.frame(Due((0, 1), 100), LATER)
        else:
            reader.message(100, LATER)
    assert source.read // nbytes == AHEAD_BYTES // (nbytes + FRAME_BYTES)
    assert reader.ahead_bytes <= AHEAD_BYTES


def test_a_message_above_the_size_that_the_receiver_accepts_is_refused():
    source, reader = script((MESSAGE, 1001))
    with pytest.raises(Gone, match="site7 sent a message of 1001 bytes; at most 1000 are accepted"):
        reader.message(1000, LATER)
    assert source.read == 0
    source, reader = script((MESSAGE, 1001), ((0, 1), 1))
    reader.frame(Due((0, 1), 1), LATER)
    with pytest.raises(Gone, match="at most 1000 are accepted"):
        reader.message(1000, LATER)


class Drip:
    """A connection that yields one byte a second, by a clock of its own."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.waits = []
        monkeypatch.setattr(sockets, "time", self)

    def monotonic(self):
        return self.now

    def settimeout(self, seconds):
        self.waits.append(seconds)

    def recv_into(self, buffer):
        self.now += 1.0
        return 1


def test_a_sender_that_drips_has_one_deadline_for_all_its_bytes(monkeypatch):
    connection = Drip(monkeypatch)
    with pytest.raises(TimeoutError, match="only 5 of 1000 bytes arrived in time"):
        receive_into(connection, memoryview(bytearray(1000)), 105.0)
    assert connection.waits == [5.0, 4.0, 3.0, 2.0, 1.0]
    receive_into(connection, memoryview(bytearray(1)), 90.0)  # what is there is read after the deadline too
    assert connection.waits[-1] == sockets._LEAST_WAIT_S
