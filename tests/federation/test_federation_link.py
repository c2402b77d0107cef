"""A rank's way into the exchange, with the client's ranks and the participants as threads."""

import threading

import numpy as np
import pytest

from fedspeed.errors import LostPeerError
from fedspeed.federation.link import ClientLink
from fedspeed.federation.shared_channel import SharedChannel
from fedspeed.routing.channel import Channel
from fedspeed.routing.exchange import PlainExchange
from fedspeed.routing.transports.local import LocalTransport
from tests.limits import LIMIT_S


class Alone:
    """The engine of a client with one rank."""

    def share_from_gateway(self, values):
        return values


class PairOfRanks:
    """The engines of a client with two ranks: the other rank receives what the gateway shares."""

    def __init__(self):
        self._sent = []
        self._received = 0
        self._ready = threading.Semaphore(0)

    def gateway(self):
        return self._Gateway(self)

    def share_from_gateway(self, values):
        assert self._ready.acquire(timeout=LIMIT_S)
        self._received += 1
        return self._sent[self._received - 1]

    class _Gateway:
        def __init__(self, pair):
            self._pair = pair

        def share_from_gateway(self, values):
            self._pair._sent.append(values)
            self._pair._ready.release()
            return values


def test_every_rank_of_every_client_receives_the_sum():
    first, second = (PlainExchange(t, LIMIT_S) for t in LocalTransport.set_of(2))
    pair = PairOfRanks()
    links = [
        ClientLink(pair.gateway(), first, 10),
        ClientLink(pair, None, 10),
        ClientLink(Alone(), second, 10),
    ]
    vectors = [np.array([1.0, 2.0]), np.array([50.0, 60.0]), np.array([0.5, 0.25])]
    sums = {}
    threads = [
        threading.Thread(
            target=lambda i=i: sums.update({i: links[i].sum(vectors[i], float(i + 1))}), daemon=True
        )
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    for i in range(3):
        assert sums[i].vector.tolist() == [1.5, 2.25], "only gateways' vectors count"
        assert sums[i].weight == 1 + 3
    assert (sums[1].idle_s, sums[1].exchange_s) == (sums[0].idle_s, sums[0].exchange_s)
    assert (sums[0].bytes_sent, sums[1].bytes_sent, sums[2].bytes_sent) == (32 + 8 + 8, 0, 32 + 8 + 8), (
        "a head, a part, a summed part"
    )


def test_bytes_are_those_of_one_exchange():
    first, second = (PlainExchange(t, LIMIT_S) for t in LocalTransport.set_of(2))
    for _ in range(2):
        handle = second.start(np.zeros(4), 0.0)
        assert ClientLink(Alone(), first, 10).sum(np.zeros(4), 0.0).bytes_sent == 32 + 16 + 16
        handle.wait(LIMIT_S)


def test_a_missing_participant_is_a_lost_peer():
    exchange = PlainExchange(LocalTransport.set_of(2)[0], 0.05)
    with pytest.raises(LostPeerError, match="the update of at least one participant .* is missing: "):
        ClientLink(Alone(), exchange, 0.05).sum(np.zeros(3), 0.0)


def test_a_lost_gateway_is_a_lost_peer():
    class Broken:
        def share_from_gateway(self, values):
            raise RuntimeError("Connection closed by peer\nwith a trace of many lines")

    with pytest.raises(
        LostPeerError, match="gateway of this rank's client was lost: Connection closed by peer$"
    ):
        ClientLink(Broken(), None, 10).sum(np.zeros(3), 0.0)


def test_all_ranks_of_a_client_get_the_arrays_of_their_gateway():
    """Of whatever names and shapes; also if there are none."""
    for arrays in ({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "memory/b": np.float32([7.0])}, {}):
        pair = PairOfRanks()
        own = ClientLink(pair.gateway(), None, 10).arrays_from_gateway(arrays)
        received = ClientLink(pair, None, 10).arrays_from_gateway(None)
        for found in (own, received):
            assert found.keys() == arrays.keys() and all(
                np.array_equal(found[name], arrays[name]) for name in arrays
            )


def test_what_comes_by_a_channel_reaches_all_ranks_and_so_does_a_failure():
    own, other = (Channel(t, 5.0) for t in LocalTransport.set_of(2))
    pair = PairOfRanks()
    ranks = [
        SharedChannel(engine, channel, server=1, speakers=(0,), ranks=(2,))
        for engine, channel in ((pair.gateway(), own), (pair, None))
    ]
    for number, rank in enumerate(ranks):
        rank.send(1, {"x": np.full(2, number, np.int32)})
    assert other.receive(0)["x"].tolist() == [0, 0], "the gateway's"
    sent = {"long": np.arange(3), "half": np.ones((2, 1), np.float16), "none": np.zeros((0, 4), np.float32)}
    other.send(0, sent)
    for rank in ranks:
        received = rank.receive(1)
        assert {n: (a.dtype, a.tolist()) for n, a in received.items()} == {
            n: (a.dtype, a.tolist()) for n, a in sent.items()
        }
    other._transport.close()
    for rank, text in zip(
        ranks, ("participant 1 sent no message", "this rank's gateway could not speak"), strict=True
    ):
        with pytest.raises(LostPeerError, match=text):
            rank.receive(1)
