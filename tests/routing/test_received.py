"""What a peer may send is bounded in number, memory and time."""

import json
import queue
import threading
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedspeed.errors import FedSpeedError, JournalError
from fedspeed.routing.channel import Channel
from fedspeed.routing.exchange import PlainExchange
from fedspeed.routing.transport import PeersLost, TransportError
from fedspeed.routing.transports import frames, gloo, tls
from fedspeed.routing.transports.frames import FRAMES_AHEAD, MAX_BYTES, MAX_PIECES, MESSAGE, Frame, is_frame
from fedspeed.routing.transports.inbox import Inbox
from fedspeed.routing.transports.local import LocalTransport
from fedspeed.session import resume
from fedspeed.session.site import _parsed, differences
from tests.limits import LIMIT_S
from tests.routing.contract import in_threads
from tests.routing.sites import Sites

PIECE = [np.zeros(1000, np.uint8)]


class Flood:
    """A mailbox that always has another frame. After 100 000 it is empty, so that no test hangs."""

    def __init__(self, step):
        self.step = step
        self.given = 0

    def get(self, timeout):
        self.given += 1
        if self.given > 100_000:
            raise queue.Empty
        return Frame(self.step, PIECE)


def flooded(step) -> tuple[LocalTransport, Flood]:
    """Return participant 1 of two, and its mailbox of frames from participant 0."""
    transport = LocalTransport.set_of(2)[1]
    flood = Flood(step)
    transport._mailboxes[1][0] = flood
    return transport, flood


@pytest.mark.parametrize(
    ("act", "step", "reason"),
    [
        ("swap", MESSAGE, "sent 17 frames of 19176 bytes together that nobody had asked for"),
        ("receive", (0, 1), "sent 17 frames of 19176 bytes together that nobody had asked for"),
        ("swap", (2, 1), r"sent 17 other frames, and none of step \(3, 1\) in time"),
    ],
)
def test_a_peer_that_never_stops_sending_is_lost(act, step, reason):
    transport, flood = flooded(step)
    with pytest.raises(PeersLost, match=f"participant 0 {reason}") as lost:
        transport.swap([b"", b""], [4, 0], 0.0, (3, 1)) if act == "swap" else transport.receive(0, LIMIT_S)
    assert lost.value.peers == {0}
    assert flood.given == FRAMES_AHEAD + 1, "no more frames are read"
    assert not transport._messages[0] and not transport._kept[0], "none of them is kept"


def test_the_bytes_that_are_kept_are_bounded_too(monkeypatch):
    monkeypatch.setattr(frames, "BYTES_AHEAD", 3000)
    transport, flood = flooded(MESSAGE)
    with pytest.raises(PeersLost, match="3 frames of 3384 bytes together that nobody had asked for"):
        transport.swap([b"", b""], [4, 0], 1.0)
    assert flood.given == 3


def test_kept_messages_stay_in_order():
    one, other = LocalTransport.set_of(2)
    for i in range(FRAMES_AHEAD):
        one.send(1, np.array([i], np.uint8), 1.0)
    one.swap([b"", b"swap"], [0, 0], 1.0)
    assert bytes(other.swap([b"", b""], [4, 0], 0.0)[0]) == b"swap", (
        "a frame that is here is read after the deadline too"
    )
    assert [other.receive(0, 0.0)[0] for _ in range(FRAMES_AHEAD)] == list(range(FRAMES_AHEAD))


@pytest.mark.parametrize(
    ("count", "length", "is_valid"),
    [
        (1, 1, True),
        (1, MAX_BYTES, True),
        (MAX_PIECES, 1, True),
        (1, MAX_BYTES + 1, False),
        (MAX_PIECES + 1, 1, False),
        (2, MAX_BYTES, False),
        (0, 1, False),
        (1, 0, False),
        (-1, -1, False),
        (1, -1, False),
    ],
)
def test_the_size_of_a_frame_is_checked(count, length, is_valid):
    assert is_frame(count, length) == is_valid


def test_a_full_inbox_blocks_the_reader_until_it_is_emptied_or_closed():
    inbox = Inbox(2, 100)
    released = []
    assert inbox._has_room(500), "a single entry may be larger than the limit"
    inbox.put("large", 500)
    assert not inbox._has_room(1) and inbox.get(0.0) == "large"
    inbox.put("first", 60)
    assert inbox._has_room(40) and not inbox._has_room(41)
    inbox.put("second", 1)
    assert not inbox._has_room(1), "two wait already"

    def read():
        try:
            inbox.make_room(60)
            released.append("room")
        except ConnectionAbortedError as error:
            released.append(str(error))

    for act in (lambda: inbox.get(0.0), inbox.close):
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        act()
        reader.join(LIMIT_S)
        inbox.put("third", 60)
    assert released == ["room", "closed on this side"]


def test_a_site_reads_no_more_than_it_may_keep(tmp_path, monkeypatch):
    monkeypatch.setattr(tls, "BYTES_AHEAD", 1500)
    waiting = []
    put = Inbox.put

    def watched(self, entry, nbytes=0):
        put(self, entry, nbytes)
        waiting.append(self._bytes)

    monkeypatch.setattr(Inbox, "put", watched)
    one, other = Sites(tmp_path, 2).all()
    for i in range(3):
        one.send(1, np.full(1000, i, np.uint8), LIMIT_S)
    assert [other.receive(0, LIMIT_S)[0] for _ in range(3)] == [0, 1, 2]
    assert waiting == [1000 + frames.PIECE_BYTES] * 3
    one.close()
    other.close()


class Group:
    """A gloo group in which a peer announces a message of some length; each wait takes 3 s of its clock."""

    def __init__(self, length: int):
        self.length = length
        self.now = 100.0
        self.waits = []

    def recv(self, tensors, peer, tag):
        if not self.waits:
            tensors[0].copy_(torch.from_numpy(np.array([self.length], np.int64).view(np.uint8)))
        return self

    def send(self, tensors, peer, tag):
        return self

    def wait(self, timeout: timedelta):
        self.waits.append(timeout.total_seconds())
        self.now += 3.0


def over_gloo(length: int, monkeypatch) -> gloo.GlooTransport:
    """Return a transport over such a group, with its clock."""
    transport = gloo.GlooTransport.__new__(gloo.GlooTransport)
    transport._group = Group(length)
    transport.bytes_sent = 0
    monkeypatch.setattr(gloo, "time", SimpleNamespace(monotonic=lambda: transport._group.now))
    return transport


@pytest.mark.parametrize(
    ("length", "max_bytes", "reason"),
    [(-1, MAX_BYTES, "at most"), (MAX_BYTES + 1, MAX_BYTES, "at most"), (1 << 61, 1 << 62, "no memory")],
)
def test_the_length_of_a_message_is_bounded(length, max_bytes, reason, monkeypatch):
    monkeypatch.setattr(gloo, "MAX_BYTES", max_bytes)
    with pytest.raises(
        TransportError, match=f"participant 1 announced a message of {length} bytes.*{reason}"
    ):
        over_gloo(length, monkeypatch).receive(1, 1.0)


def test_a_message_over_gloo_has_one_deadline(monkeypatch):
    transport = over_gloo(5, monkeypatch)
    assert transport.receive(1, 10.0).shape == (5,)
    transport.send(1, np.zeros(5, np.uint8), 4.0)
    transport.send(1, np.zeros(5, np.uint8), 2.0)
    assert transport._group.waits == [10.0, 7.0, 4.0, 1.0, 2.0, gloo._MIN_WAIT_S]


@pytest.mark.parametrize("amount", [np.nan, np.inf, -1.0])
def test_an_invalid_amount_is_refused_by_all(amount):
    """`argmax` would take NaN for the highest priority."""

    def act(transport):
        exchange = PlainExchange(transport, LIMIT_S)
        own = amount if transport.rank == 1 else 2.0
        with pytest.raises(
            FedSpeedError, match=f"participant 1 sends a priority of {amount}, which is invalid"
        ):
            exchange.share(np.zeros(3), own)
        with pytest.raises(
            FedSpeedError, match=f"participant 1 sends a weight of {amount}, which is invalid"
        ):
            exchange.start(np.zeros(3), own).wait(LIMIT_S)
        return True

    assert in_threads(LocalTransport.set_of(3), act) == [True] * 3


def test_an_exchange_number_of_nan_is_a_disagreement():
    def act(transport):
        exchange = PlainExchange(transport, LIMIT_S)
        if transport.rank:
            exchange._number = np.nan
        with pytest.raises(
            FedSpeedError, match=r"disagree on the exchange: .* are \[\(0, 3, 1\), \(nan, 3, 1\)\]"
        ):
            exchange.start(np.zeros(3), 1.0).wait(LIMIT_S)
        return True

    assert in_threads(LocalTransport.set_of(2), act) == [True, True]


def test_the_sender_of_a_vector_may_be_known_beforehand():

    def act(transport):
        exchange = PlainExchange(transport, LIMIT_S)
        received = [exchange.share_from(sender, np.full(3, transport.rank, np.float32)) for sender in (2, 0)]
        with pytest.raises(ValueError, match="participant 3 is none of 0 to 2"):
            exchange.share_from(3, np.zeros(3))
        return [vector.tolist() for vector in received], str(received[0].dtype)

    expected = [[2.0] * 3, [0.0] * 3], "float32"
    assert in_threads(LocalTransport.set_of(3), act) == [expected] * 3


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 40 + b'""' + b"}" * 40,
        b"5",
        b"null",
        b"[[[], 1]]",
        b'[["data.task", "file"]]',
        b"\xff",
        b'{"data.task": 5}',
        b'{"data.task": {"\x1b": "\x1b"}}',
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_the_error_for_invalid_settings_names_the_site_that_sent_them(text):
    with pytest.raises(FedSpeedError, match="site1 sent settings that cannot be read .* the same version"):
        _parsed("site1", text)


def test_settings_of_another_site_are_quoted_and_not_printed_as_they_are():
    theirs = {"data.task\x1b[2J": "\u202e", "federation.rounds": "3\n" * 500}
    text = "".join(
        differences({"federation.rounds": "3"}, _parsed("site1", json.dumps(theirs).encode()), "site1")
    )
    assert r"data.task\x1b[2J: - here, \u202e at site1" in text and r"3\n3\n3" in text
    assert text.isprintable() and len(text) < 1000


@pytest.mark.parametrize(
    ("index", "value"), [(0, np.nan), (0, np.inf), (0, -1), (1, 0.5), (1, -2), (2, np.nan), (3, np.inf)]
)
def test_an_invalid_round_is_not_resumed(index, value):
    head = np.array([4.0, 2.0, 0.7, 1.0, -1.0])
    resume._check_head(head)
    head[index] = value
    with pytest.raises(JournalError, match="impossible numbers of its state: .*; start anew with --fresh"):
        resume._check_head(head)


def test_an_error_that_quotes_a_message_of_a_peer_can_be_printed():
    header = json.dumps(
        {"\x1b[2J": {"dtype": "\x1b[2J\u202e" * 99, "shape": [1]}}, ensure_ascii=False
    ).encode()
    one, other = LocalTransport.set_of(2)
    one.send(1, np.frombuffer(len(header).to_bytes(8, "little") + header, np.uint8), LIMIT_S)
    with pytest.raises(FedSpeedError, match="north sent a message that holds no arrays") as error:
        Channel(other, LIMIT_S, names=("north", "south")).receive(0)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
