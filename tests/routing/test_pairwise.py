"""FATE's pairwise-masked sum: exactness, bytes at the socket, equal results, and what is refused."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.exchange import PlainExchange
from fedspeed.routing.listen_address import own_membership
from fedspeed.routing.pairwise.encodings import ENCODINGS, MAX_VALUE, NATIVE_RANGE, uniform_masks
from fedspeed.routing.pairwise.exchange import PairwiseExchange, streams_of
from fedspeed.routing.transport import all_gather
from fedspeed.routing.transports.local import LocalTransport
from tests.limits import LIMIT_S
from tests.routing.contract import in_threads, opened
from tests.routing.sites import Sites

HEAD = 32  # bytes of a head and of a public key
N = 1001
WEIGHTS = (300.0, 70.0, 1000.0, 1.0, 45.0)


def updates(size: int, n: int = N) -> list[np.ndarray]:
    """Return weighted updates as LoRA's are: of all magnitudes from 1e-9 to 1, zeros among them."""
    vectors = []
    for i in range(size):
        rng = np.random.default_rng([5, i])
        values = rng.standard_normal(n) * 10.0 ** rng.uniform(-9, 0, n)
        values[::17] = 0.0
        vectors.append((WEIGHTS[i] * values).astype(np.float32))
    return vectors


def streams_of_all(size: int):
    private = [X25519PrivateKey.generate() for _ in range(size)]
    keys = [public_bytes(key) for key in private]
    return [streams_of(key, i, keys) for i, key in enumerate(private)]


def summed(encoding, values, shares, streams, number: int = 7):
    """Return (sum, clipped values, what the arbiter receives of each) of values [participants, n]."""
    n = values[0].size
    sent = [encoding.masked(v, s, own, number) for v, s, own in zip(values, shares, streams, strict=True)]
    received = [encoding.read(masked.reshape(-1).view(np.uint8), n) for masked, _ in sent]
    total = received[0].copy()
    for masked in received[1:]:
        encoding.add(total, masked)
    down = encoding.sent_down(total)
    assert sent[0][0].nbytes == n * encoding.bytes_up and down.nbytes == n * encoding.bytes_down
    return encoding.decoded(down.view(np.uint8)), sum(clipped for _, clipped in sent), received


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize(("name", "bound"), [("native", 1e-8), ("compact", None)])
def test_the_sum_is_near_the_exact_one(size, name, bound):
    weights = np.array(WEIGHTS[:size])
    shares = weights / weights.sum()
    values = [v.astype(np.float64) / weights.sum() for v in updates(size)]
    total, clipped, received = summed(ENCODINGS[name](), values, shares, streams_of_all(size))
    exact = np.array([math.fsum(column) for column in zip(*values, strict=True)])
    largest = np.abs(total - exact).max()
    assert clipped == 0
    assert largest <= (size * 2.0**-27 if bound is None else bound)
    if name == "native":
        assert largest < 1e-13, "integer parts are exact, and fractions are rounded as float64 below 5 are"
        # What arrives is the mask, not the value: integer parts as wide as the masks of all pairs.
        for masked in received:
            assert 0.4 < masked[1].std() / (NATIVE_RANGE * math.sqrt((size - 1) / 3)) < 1.6
            assert np.abs(masked[0]).max() > 0.5
    else:
        grid = sum(np.rint(v * 2.0**26) for v in values) * 2.0**-26
        np.testing.assert_array_equal(total, grid, "masks cancel exactly")


@pytest.mark.parametrize("name", ["native", "compact"])
def test_without_one_participant_the_sum_stays_masked(name):
    streams = streams_of_all(3)
    values = [v.astype(np.float64) / 400 for v in updates(3)]
    total, _, _ = summed(ENCODINGS[name](), values[:2], [0.3, 0.2], streams[:2])
    exact = values[0] + values[1]
    assert np.median(np.abs(total - exact)) > 1.0


def test_masks_are_uniform_and_differ_by_number_and_key():
    masks = uniform_masks(b"k" * 32, 3, 200_000)
    assert -NATIVE_RANGE <= masks.min() and masks.max() < NATIVE_RANGE
    assert abs(masks.mean()) < 5 * NATIVE_RANGE / math.sqrt(3 * masks.size)
    assert abs(masks.std() * math.sqrt(3) / NATIVE_RANGE - 1) < 0.01
    assert (uniform_masks(b"k" * 32, 3, 10) == masks[:10]).all()
    for other in (uniform_masks(b"k" * 32, 4, 10), uniform_masks(b"l" * 32, 3, 10)):
        assert (other != masks[:10]).all()


def test_compact_clips_by_the_share_and_never_wraps():
    """Two participants with the largest values that are possible; their sum fits exactly."""
    shares = [0.75, 0.25]
    values = [np.array([s * 40.0, s * -40.0, s * 31.0, 0.0]) for s in shares]
    total, clipped, _ = summed(ENCODINGS["compact"](), values, shares, streams_of_all(2))
    assert clipped == 4
    np.testing.assert_allclose(total, [MAX_VALUE, -MAX_VALUE, 31.0, 0.0], rtol=0, atol=2.0**-25)


def act(transport, name: str):
    """Sum two updates and a ledger; return the bits of the results, and the bytes that were sent for each."""
    rank = transport.rank
    size = transport.size
    exchange = PairwiseExchange(transport, LIMIT_S, encoding=ENCODINGS[name]())
    vectors = updates(size)
    exact = np.array([math.fsum(column) for column in zip(*vectors, strict=True)])
    sent = []
    digest = b""
    for _ in range(2):
        before = transport.bytes_sent
        handle = exchange.start(vectors[rank], WEIGHTS[rank])
        total, weight = handle.wait(LIMIT_S)
        sent.append(transport.bytes_sent - before)
        assert weight == sum(WEIGHTS[:size]) and total.dtype == np.float32
        assert (handle.participants, handle.clipped) == (size, 0)
        bound = 1e-8 if name == "native" else size * 2.0**-27
        assert np.abs(total - exact).max() <= weight * bound + np.abs(exact).max() * 2.0**-24
        digest += total.tobytes()
    before = transport.bytes_sent
    ledger, _ = exchange.start(np.full(size * 10, 2.0**-40), 0.0).wait(LIMIT_S)
    assert ledger.dtype == np.float64 and (ledger == size * 2.0**-40).all()
    sent.append(transport.bytes_sent - before)
    return digest.hex(), sent


def check(results, name: str):
    """Compare with the table of bytes."""
    size = len(results)
    assert len({digest for digest, _ in results}) == 1, "all participants have the same bits"
    encoding = ENCODINGS[name]
    for rank, (_, sent) in enumerate(results):
        client = 8 + N * encoding.bytes_up
        arbiter = (size - 1) * (8 + N * encoding.bytes_down)
        of_update = (size - 1) * HEAD + (client if rank else arbiter)
        ledger = (size - 1) * (HEAD + 2 * 10 * 8)
        assert sent == [of_update + (size - 1) * HEAD, of_update, ledger]


def test_a_compact_sum_has_the_same_bits_after_a_restart():
    """Whatever the keys, which are new, and the number of the sum, which counts from the start."""

    def course(transport, sums):
        exchange = PairwiseExchange(transport, LIMIT_S, encoding=ENCODINGS["compact"]())
        vector = updates(3)[transport.rank]
        weight = WEIGHTS[transport.rank]
        return [exchange.start(k * vector, weight).wait(LIMIT_S)[0].tobytes() for k in sums]

    whole = in_threads(LocalTransport.set_of(3), lambda transport: course(transport, (1, 2, 3)))
    resumed = in_threads(LocalTransport.set_of(3), lambda transport: course(transport, (3,)))
    assert [sums[2:] for sums in whole] == resumed and len(set(whole[0])) == 3


@pytest.mark.parametrize("name", ["native", "compact"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_threads_end_with_the_same_bits(name, size):
    check(in_threads(LocalTransport.set_of(size), lambda transport: act(transport, name)), name)


def test_the_bytes_at_the_socket_are_those_of_the_table(tmp_path):
    """16 bytes a value up and 8 down, counted at the TLS connections of three sites; 4 and 4 if compact."""
    assert (ENCODINGS["native"].bytes_up, ENCODINGS["native"].bytes_down) == (16, 8)
    assert (ENCODINGS["compact"].bytes_up, ENCODINGS["compact"].bytes_down) == (4, 4)
    sites = Sites(tmp_path, 3)

    def site(i: int):
        transport = opened("tls", i, 3, member=own_membership(sites.routing(i)))
        try:
            return {name: act(transport, name) for name in ENCODINGS}
        finally:
            transport.close()

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(site, range(3)))
    for name in ENCODINGS:
        check([result[name] for result in results], name)


def test_weights_of_zero_sum_to_zero():
    def none(transport):
        exchange = PairwiseExchange(transport, LIMIT_S, encoding=ENCODINGS["native"]())
        total, weight = exchange.start(np.zeros(5, np.float32), 0.0).wait(LIMIT_S)
        return total.tolist(), weight

    assert in_threads(LocalTransport.set_of(3), none) == [([0.0] * 5, 0.0)] * 3


def test_a_key_of_small_order_is_refused():
    private = X25519PrivateKey.generate()
    own = public_bytes(private)
    for key, said in ((bytes(32), "participant 1 sends a public key of small order"), (b"short", "5 bytes")):
        with pytest.raises(FedSpeedError, match=said):
            streams_of(private, 0, [own, key])


def test_a_zero_key_on_the_wire_ends_the_sum():
    def pair(transport):
        exchange = PairwiseExchange(transport, 1.0, encoding=ENCODINGS["native"]())
        if transport.rank == 0:
            with pytest.raises(FedSpeedError, match="participant 1 sends a public key of small order"):
                exchange.start(np.zeros(4, np.float32), 1.0).wait(LIMIT_S)
            return True
        PlainExchange._weights(exchange, _Request())
        all_gather(transport, np.zeros(32, np.uint8), LIMIT_S)
        return True

    assert in_threads(LocalTransport.set_of(2), pair) == [True, True]


class _Request:
    """The request of a liar that only takes part in the head."""

    number = 0
    vector = np.zeros(4, np.float32)
    weight = 1.0


class Liar(ENCODINGS["native"]):
    """Sends what is not finite."""

    def masked(self, values, share, streams, number):
        parts, clipped = super().masked(values, share, streams, number)
        parts[0, 2] = np.nan
        return parts, clipped


class Miscounting(ENCODINGS["compact"]):
    def masked(self, values, share, streams, number):
        return super().masked(values, share, streams, number)[0], values.size + 1


@pytest.mark.parametrize(
    ("liar", "honest", "said"),
    [
        (Liar, "native", "the masked update of participant 1 has values that are not finite"),
        (Miscounting, "compact", "participant 1 says that an impossible number of values were clipped"),
    ],
)
def test_all_name_who_sends_impossible_numbers(liar, honest, said):
    def act(transport):
        chosen = liar if transport.rank == 1 else ENCODINGS[honest]
        exchange = PairwiseExchange(transport, LIMIT_S, encoding=chosen())
        return message_of(exchange, np.zeros(4, np.float32))

    messages = in_threads(LocalTransport.set_of(3), act)
    assert len(set(messages)) == 1 and messages[0].startswith(said)


def message_of(exchange, vector) -> str:
    """Return what a sum is refused with, which is not that somebody is missing."""
    with pytest.raises(FedSpeedError) as refused:
        exchange.start(vector, 1.0).wait(LIMIT_S)
    assert not isinstance(refused.value, LostPeerError)
    return str(refused.value)


@pytest.mark.parametrize("name", ["native", "compact"])
@pytest.mark.parametrize(("size", "wrong"), [(1, 0), (3, 0), (3, 2)])
def test_all_say_whose_update_is_not_finite(name, size, wrong):
    """Nothing of it is sent, nor any mask, and the next sum is as if nothing had been."""

    def act(transport):
        exchange = PairwiseExchange(transport, LIMIT_S, encoding=ENCODINGS[name]())
        vector = np.ones(4, np.float32)
        spoiled = np.array([1.0, np.inf, np.nan, 1.0], np.float32) if transport.rank == wrong else vector
        swap = transport.swap
        sent = []
        transport.swap = lambda parts, *rest: (
            sent.append([bytes(part) for part in parts]) or swap(parts, *rest)
        )
        said = message_of(exchange, spoiled)
        if transport.rank == wrong == 2:
            assert sent[2][0] == np.int64(-1).tobytes() + bytes(4 * ENCODINGS[name].bytes_up)
        total, weight = exchange.start(vector, 1.0).wait(LIMIT_S)
        np.testing.assert_allclose(total, float(size), rtol=0, atol=1e-6)
        return said, weight

    said = (
        f"the update of participant {wrong} has values that are not finite; lower train.lr, or set train.clip"
    )
    assert in_threads(LocalTransport.set_of(size), act) == [(said, float(size))] * size


def test_a_lost_participant_ends_the_sum():
    def pair(transport):
        exchange = PairwiseExchange(transport, LIMIT_S, encoding=ENCODINGS["native"]())
        if transport.rank == 2:
            PlainExchange._weights(exchange, _Request())
            transport.close()
            return True
        with pytest.raises(LostPeerError, match="participant 2"):
            exchange.start(np.zeros(4, np.float32), 1.0).wait(LIMIT_S)
        return True

    assert in_threads(LocalTransport.set_of(3), pair) == [True] * 3
