"""What every transport must do, and the ways to have participants do something: threads, processes."""

import itertools
import threading

import numpy as np

from fedspeed.routing.channel import Channel
from fedspeed.routing.exchange import PlainExchange
from fedspeed.routing.opening import TransportContext, open_transport
from fedspeed.routing.transport import all_gather, all_to_all
from tests.limits import LIMIT_S


def contract(transport) -> dict:
    """What every participant does; the checks that need only its own view are made here."""
    rank = transport.rank
    size = transport.size
    gathered = all_gather(transport, np.array([rank, 10.0 + rank]), LIMIT_S)
    assert gathered.tolist() == [[r, 10.0 + r] for r in range(size)]
    came = all_to_all(
        transport, [np.full(3 + i, 100 * rank + i, dtype=np.float32) for i in range(size)], LIMIT_S
    )
    assert came.dtype == np.float32 and came.shape == (size, 3 + rank)
    assert came[:, 0].tolist() == [100.0 * sender + rank for sender in range(size)]

    talk(Channel(transport, LIMIT_S))
    exchange = PlainExchange(transport, deadline_s=LIMIT_S)
    vectors = {
        n: [np.random.default_rng([n, r]).normal(size=n).astype(np.float32) for r in range(size)]
        for n in (1, 2, 1001)
    }
    handles = {
        n: exchange.start(v[rank], weight=float(rank + 1)) for n, v in vectors.items()
    }  # three under way at once
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
    """Messages between pairs, of which one answers the other, between two exchanges of all."""
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
            came = channel.receive(low)
            more = channel.receive(low)
            assert all(
                np.array_equal(came[name], array) and came[name].dtype == array.dtype
                for name, array in question.items()
            )
            assert more["more"].tolist() == [high], "messages keep their order"
            channel.send(low, answer)


def in_threads(transports, act):
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
    """The transport of one of `size` participants, opened as a session does."""
    return open_transport(
        name,
        TransportContext(
            asked=name, me=rank, participants=tuple(range(size)), world_size=size, timeout_s=LIMIT_S, **more
        ),
    )


def gloo_rank(rank, size, port, act):
    """What a process of a job does with its transport. `port`: of the job's store."""
    from datetime import timedelta

    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=LIMIT_S))
    result = act(opened("gloo", rank, size, connect=lambda prefix: PrefixStore(prefix, store)))
    store.set(f"done{rank}", "1")
    if rank == 0:
        store.wait([f"done{r}" for r in range(size)], timedelta(seconds=LIMIT_S))
    return result
