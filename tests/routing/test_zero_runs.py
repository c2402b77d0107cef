"""Runs of zeros are not sent: the bits that arrive are the same, fewer bytes pass the socket, and what is no
encoding is refused.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspeed.errors import FedSpeedError
from fedspeed.routing.exchange import HEAD, PlainExchange
from fedspeed.routing.transport import as_bytes
from fedspeed.routing.transports.local import LocalTransport
from fedspeed.routing.zero_runs import decode, encode
from tests.limits import LIMIT_S
from tests.processes import free_port, run_ranks
from tests.routing.contract import gloo_rank, in_threads

F32 = np.dtype(np.float32)
SPECIAL = np.array([0.0, -0.0, np.nan, np.inf, 1e-45, 1.0], np.float32)


@given(st.lists(st.tuples(st.sampled_from(range(len(SPECIAL))), st.integers(1, 9)), max_size=40))
def test_the_bits_are_the_same_and_no_more(runs):
    values = np.concatenate([np.empty(0, np.float32), *(np.full(n, SPECIAL[i]) for i, n in runs)])
    encoded = encode(values)
    assert encoded.size <= values.nbytes and encoded.size % 4 == 0
    assert decode(encoded, values.size, F32).tobytes() == values.tobytes()
    longer = np.pad(values, (50, 20))
    assert encode(longer).size <= values.nbytes + 4 + 8
    assert decode(encode(longer), longer.size, F32).tobytes() == longer.tobytes()


def test_a_dense_vector_stays_as_it_is():
    values = np.arange(1, 1001, dtype=np.float32)
    values[::20] = 0
    assert encode(values).tobytes() == values.tobytes()
    assert encode(np.zeros(1000, np.float32)).size == 4
    scattered = np.zeros((1000, 4), np.float32)
    scattered[:, 0] = 1
    assert encode(scattered[:64].reshape(-1)).size == 4 + 64 * (8 + 4)
    assert encode(scattered.reshape(-1)).size == scattered.nbytes
    assert encode(np.zeros(0, np.float32)).size == 0


def stretches(*numbers, values=0):
    return np.concatenate([
        np.array(numbers, "<u4").view(np.uint8),
        np.ones(values, np.float32).view(np.uint8),
    ])


@pytest.mark.parametrize(
    "data",
    [
        np.zeros(0, np.uint8),
        np.zeros(3, np.uint8),
        stretches(1),
        stretches(2**32 - 1, 0, 1, values=1),
        stretches(1, 0, 2, values=1),
        stretches(1, 0, 1, values=2),
        stretches(1, 99, 2, values=2),
        stretches(1, 2**32 - 1, 1, values=1),
        stretches(2, 4, 2, 5, 1, values=3),
        stretches(2, 4, 2, 0, 1, values=3),
    ],
)
def test_what_is_no_encoding_is_refused(data):
    with pytest.raises(FedSpeedError, match="a participant sends .* bytes"):
        decode(data, 100, F32)
    assert decode(stretches(2, 4, 2, 6, 1, values=3), 100, F32)[4:7].tolist() == [1, 1, 1]


SIZE = 4
LENGTH = 40_000


def slice_of(rank):
    """Return a vector of which one of SIZE parts is not zero; it lies in the chunks of two participants."""
    part = LENGTH // SIZE
    vector = np.zeros(LENGTH, np.float32)
    vector[(np.arange(part) + rank * part + part // 3) % LENGTH] = dense_of(rank)[:part]
    return vector


def dense_of(rank):
    return np.random.default_rng([9, rank]).standard_normal(LENGTH).astype(np.float32)


def summed(transport):
    exchange = PlainExchange(transport, LIMIT_S)
    found = {}
    for name, of in (("slices", slice_of), ("dense", dense_of)):
        before = transport.bytes_sent
        total, weight = exchange.start(of(transport.rank), 2.0).wait(LIMIT_S)
        assert weight == 2.0 * SIZE
        found[name] = (total, transport.bytes_sent - before)
    return found


def gloo_summed(rank, port):
    return gloo_rank(rank, SIZE, port, summed)


@pytest.mark.parametrize("transport", ["local", "gloo"])
def test_a_slice_costs_its_share_at_the_socket(transport):
    """Of what participants contribute; the sum goes to everybody as before."""
    if transport == "local":
        found = in_threads(LocalTransport.set_of(SIZE), summed)
    else:
        found = run_ranks(SIZE, gloo_summed, free_port())
    others = SIZE - 1
    chunk = LENGTH // SIZE * 4
    returned = others * chunk + others * HEAD.itemsize
    for of_rank in found:
        for name, of in (("slices", slice_of), ("dense", dense_of)):
            exact = np.sum([of(rank).astype(np.float64) for rank in range(SIZE)], axis=0)
            assert of_rank[name][0].tobytes() == exact.astype(np.float32).tobytes()
        assert of_rank["dense"][1] == returned + others * chunk
    for rank, of_rank in enumerate(found):
        contributed = of_rank["slices"][1] - returned
        theirs = np.delete(slice_of(rank).reshape(SIZE, -1), rank, axis=0)
        assert (
            4 * np.count_nonzero(theirs) <= contributed <= 4 * np.count_nonzero(theirs) + 4 * others + 8 * 2
        )
        assert contributed < others * chunk / SIZE


def test_a_participant_that_announces_too_much_is_refused():
    def act(transport):
        exchange = PlainExchange(transport, LIMIT_S)
        if transport.rank:
            head = np.array([(0, 10, 0, 6, 1.0)] * 2, HEAD)  # 24 bytes, and a chunk has 20
            transport.swap([as_bytes(part) for part in head], [HEAD.itemsize] * 2, LIMIT_S)
            return True
        with pytest.raises(FedSpeedError, match="participant 1 announces more than the 20 bytes of a chunk"):
            exchange.start(np.zeros(10, np.float32), 1.0).wait(LIMIT_S)
        return True

    assert in_threads(LocalTransport.set_of(2), act) == [True, True]
