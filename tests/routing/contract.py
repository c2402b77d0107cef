"""The contract of every transport, and how tests start participants: as threads or as processes."""

import itertools
import threading

import numpy as np

from fedspeed.net.interfaces import LOOPBACK, interface_of
from fedspeed.routing.channel import Channel
from fedspeed.routing.exchange import PlainExchange
from fedspeed.routing.opening import TransportContext, open_transport
from fedspeed.routing.transport import all_gather, as_bytes
from tests.limits import LIMIT_S


def contract(transport) -> dict:
    """Use a transport as every participant does; return what must be equal on all of them."""
    rank = transport.rank
    size = transport.size
    gathered = all_gather(transport, np.array([rank, 10.0 + rank]), LIMIT_S)
    assert gathered.tolist() == [[r, 10.0 + r] for r in range(size)]
    parts = [np.full(3 + i, 100 * rank + i, dtype=np.float32) for i in range(size)]
    swapped = transport.swap([as_bytes(part) for part in parts], [(3 + rank) * 4] * size, LIMIT_S)
    arrived = [as_bytes(data).view(np.float32).tolist() for data in swapped]
    assert arrived == [[100.0 * sender + rank] * (3 + rank) for sender in range(size)]

    talk(Channel(transport, LIMIT_S))
    exchange = PlainExchange(transport, deadline_s=LIMIT_S)
    vectors = {
        n: [np.random.default_rng([n, r]).normal(size=n).astype(np.float32) for r in range(size)]
        for n in (1, 2, 1001)
    }
    # Three are under way at once.
    handles = {n: exchange.start(v[rank], weight=float(rank + 1)) for n, v in vectors.items()}
    for n, handle in handles.items():
        total, weight = handle.wait(LIMIT_S)
        assert weight == size * (size + 1) / 2
        exact = np.sum([v.astype(np.float64) for v in vectors[n]], axis=0)
        assert total.dtype == np.float32 and total.shape == (n,)
        np.testing.assert_array_equal(total, exact.astype(np.float32))
    before = transport.bytes_sent
    total, _ = exchange.start(np.full(size * 1000, 2.0**-30), 0.0).wait(LIMIT_S)
    sent = transport.bytes_sent - before
    assert total.dtype == np.float64 and (total == size * 2.0**-30).all()
    assert sent == 2 * (size - 1) * 1000 * 8 + (size - 1) * 32, (
        "each participant sends 2 (n-1)/n vectors and one head"
    )
    return {"digest": total.tobytes().hex()[:32], "sent": sent}


def talk(channel) -> None:
    """Exchange questions and answers with every other participant, and check their content and order."""
    rank = channel.rank
    size = channel.size
    for low, high in itertools.combinations(range(size), 2):
        question = {"hidden": np.full((2, 3 + high), low, np.float32), "none": np.empty((0, 4), np.int64)}
        answer = {"flow": np.arange(70_000 + low, dtype=np.float64)}
        if rank == low:
            channel.send(high, question)
            channel.send(high, {"more": np.array([high])})
            back = channel.receive(high)
            assert back.keys() == answer.keys() and np.array_equal(back["flow"], answer["flow"])
        if rank == high:
            first = channel.receive(low)
            more = channel.receive(low)
            for name, array in question.items():
                assert np.array_equal(first[name], array) and first[name].dtype == array.dtype
            assert more["more"].tolist() == [high], "messages keep their order"
            channel.send(low, answer)


def in_threads(transports, act):
    """Return `act(transport)` of every participant, each in a thread; raise the first error."""
    results = {}
    errors = []

    def run(t):
        try:
            results[t.rank] = act(t)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(t,), daemon=True) for t in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    if errors:
        raise errors[0]
    return [results[t.rank] for t in transports]


def opened(name: str, rank: int, size: int, **more):
    """Return the transport of one of `size` participants, opened as a session does."""
    return open_transport(
        name,
        TransportContext(
            asked=name, me=rank, participants=tuple(range(size)), world_size=size, timeout_s=LIMIT_S, **more
        ),
    )


def gloo_rank(rank, size, port, act):
    """Return `act(transport)` of a process of a job. `port` is that of the job's store."""
    from datetime import timedelta

    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=LIMIT_S))
    context = {
        "connect": lambda prefix: PrefixStore(prefix, store),
        "interfaces": lambda: interface_of(LOOPBACK),
    }
    result = act(opened("gloo", rank, size, **context))
    store.set(f"done{rank}", "1")
    if rank == 0:
        store.wait([f"done{r}" for r in range(size)], timedelta(seconds=LIMIT_S))
    return result
