"""What a peer may send is bounded in number, memory and time."""

import json
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedspeed.errors import FedSpeedError, JournalError, LostPeerError
from fedspeed.routing.channel import Channel
from fedspeed.routing.exchange import PlainExchange
from fedspeed.routing.transport import PeersLost, TransportError
from fedspeed.routing.transports import gloo
from fedspeed.routing.transports.frame_reader import AHEAD_BYTES, FRAME_BYTES
from fedspeed.routing.transports.local import LocalTransport
from fedspeed.session import resume
from fedspeed.session.site import _parsed, differences
from tests.limits import LIMIT_S
from tests.routing.contract import in_threads


@pytest.mark.parametrize("act", ["swap", "receive"])
def test_what_a_peer_may_have_waiting_here_is_bounded(act):
    """Whoever sends more is lost, and goes on being lost."""
    one, other = LocalTransport.set_of(2)
    data = np.zeros(1000, np.uint8)
    for _ in range(1000):
        if act == "swap":
            one.send(1, data, LIMIT_S)
        else:
            one.swap([b"", data], [0, 0], LIMIT_S)
    reason = f"participant 0 sent 1000 bytes that nobody had asked for; .* of at most {AHEAD_BYTES}"
    for _ in range(2):
        with pytest.raises(PeersLost, match=reason) as lost:
            other.swap([b"", b""], [4, 0], LIMIT_S) if act == "swap" else other.receive(0, LIMIT_S, 1000)
        assert lost.value.peers == {0}
    assert other._mailboxes[1][0].qsize() == 1000 - AHEAD_BYTES // (1000 + FRAME_BYTES) - 1


def test_kept_messages_stay_in_order():
    one, other = LocalTransport.set_of(2)
    for i in range(20):
        one.send(1, np.array([i], np.uint8), 1.0)
    one.swap([b"", b"swap"], [0, 0], 1.0)
    assert bytes(other.swap([b"", b""], [4, 0], LIMIT_S)[0]) == b"swap"
    assert [other.receive(0, 0.0, 1)[0] for _ in range(20)] == list(range(20))


def test_a_frame_that_is_here_is_read_after_the_deadline_too():
    one, other = LocalTransport.set_of(2)
    one.swap([b"", b"swap"], [0, 0], 1.0)
    assert bytes(other.swap([b"", b""], [4, 0], 0.0)[0]) == b"swap"


def test_a_channel_refuses_what_is_larger_than_its_limit():
    one, other = (Channel(t, LIMIT_S, names=("a", "b"), max_bytes=1 << 20) for t in LocalTransport.set_of(2))
    one.send(1, {"x": np.zeros(1 << 20, np.uint8)})
    with pytest.raises(
        LostPeerError, match=r"a sent no message of up to 1 MiB \(routing.message_mib\): .*at most 1048576"
    ):
        other.receive(0)


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
    [(-1, 1000, "at most"), (1001, 1000, "at most"), (1 << 61, 1 << 62, "no memory")],
)
def test_the_length_of_a_message_is_bounded(length, max_bytes, reason, monkeypatch):
    with pytest.raises(
        TransportError, match=f"participant 1 announced a message of {length} bytes.*{reason}"
    ):
        over_gloo(length, monkeypatch).receive(1, 1.0, max_bytes)


def test_a_message_over_gloo_has_one_deadline(monkeypatch):
    transport = over_gloo(5, monkeypatch)
    assert transport.receive(1, 10.0, 5).shape == (5,)
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
