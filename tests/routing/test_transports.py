"""One contract for every transport, and for the exchange on top of it. Each implementation runs as it is used: threads, processes, mpirun."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fedspeed.errors import FedSpeedError, LostPeerError, connection_text
from fedspeed.routing.channel import Channel
from fedspeed.routing.exchange import PlainExchange
from fedspeed.routing.transport import PeersLost, TransportError, all_gather, all_to_all
from fedspeed.routing.transports.local import LocalTransport
from tests.conftest import ROOT
from tests.limits import LIMIT_S
from tests.processes import free_port, run_ranks


def contract(transport) -> dict:
    """What every participant does; the checks that need only its own view are made here."""
    rank, size = transport.rank, transport.size
    gathered = all_gather(transport, np.array([rank, 10.0 + rank]), LIMIT_S)
    assert gathered.tolist() == [[r, 10.0 + r] for r in range(size)]
    came = all_to_all(transport, [np.full(3 + i, 100 * rank + i, dtype=np.float32) for i in range(size)], LIMIT_S)
    assert came.dtype == np.float32 and came.shape == (size, 3 + rank)
    assert came[:, 0].tolist() == [100.0 * sender + rank for sender in range(size)]

    talk(Channel(transport, LIMIT_S))
    exchange = PlainExchange(transport, deadline_s=LIMIT_S)
    vectors = {n: [np.random.default_rng([n, r]).normal(size=n).astype(np.float32) for r in range(size)] for n in (1, 2, 1001)}
    handles = {n: exchange.start(v[rank], weight=float(rank + 1)) for n, v in vectors.items()}  # three under way at once
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
    assert sent == 2 * (size - 1) * 1000 * 8 + (size - 1) * 32, "each participant sends 2 (n-1)/n vectors and one head"
    return {"digest": total.tobytes().hex()[:32], "sent": sent}


def talk(channel) -> None:
    """Messages between pairs, of which one answers the other, between two exchanges of all."""
    rank, size = channel.rank, channel.size
    for low, high in itertools.combinations(range(size), 2):
        question = {"hidden": np.full((2, 3 + high), low, np.float32), "none": np.empty((0, 4), np.int64)}
        answer = {"flow": np.arange(70_000 + low, dtype=np.float64)}
        if rank == low:
            channel.send(high, question)
            channel.send(high, {"more": np.array([high])})
            back = channel.receive(high)
            assert back.keys() == answer.keys() and np.array_equal(back["flow"], answer["flow"])
        if rank == high:
            came, more = channel.receive(low), channel.receive(low)
            assert all(np.array_equal(came[name], array) and came[name].dtype == array.dtype for name, array in question.items())
            assert more["more"].tolist() == [high], "messages keep their order"
            channel.send(low, answer)


def gloo_rank(rank, size, port, act):
    from datetime import timedelta

    from torch.distributed import TCPStore

    from fedspeed.routing.transports.gloo import GlooTransport

    store = TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=LIMIT_S))
    result = act(GlooTransport(store, rank, size, LIMIT_S))
    store.set(f"done{rank}", "1")
    if rank == 0:
        store.wait([f"done{r}" for r in range(size)], timedelta(seconds=LIMIT_S))
    return result


def in_threads(transports, act):
    results, errors = {}, []

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


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_contract_local(size):
    results = in_threads(LocalTransport.set_of(size), contract)
    assert len({r["digest"] for r in results}) == 1


@pytest.mark.parametrize("size", [1, 3])
def test_contract_gloo(size):
    results = run_ranks(size, gloo_rank, size, free_port(), contract, timeout=LIMIT_S)
    assert len({r["digest"] for r in results}) == 1


@pytest.mark.parametrize("size,idle", [(1, 0), (3, 1)])
def test_contract_mpi(size, idle):
    """Rank 0 and the last one may stand aside: participants need not be the first ranks."""
    program = ("import json, sys; from mpi4py import MPI; from tests.routing.test_transports import contract;"
               "from fedspeed.routing.transports.mpi import MpiTransport;"
               f"t = MpiTransport(list(range({idle}, {idle + size})));"
               "r = contract(t) if t.rank >= 0 else None; t.close(); print('RESULT', json.dumps(r))")
    done = subprocess.run(["mpirun", "--oversubscribe", "-n", str(size + 2 * idle), sys.executable, "-c", program], cwd=ROOT,
                          capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == size + 2 * idle
    assert len({r["digest"] for r in results if r}) == 1


class Late:
    """A roll call in which participant 1 never arrives."""

    def arrive(self, tag):
        pass

    def missing(self, tag):
        return ["client 1 (rank 1)"]


def test_a_missing_participant_is_named_within_the_deadline():
    transports = LocalTransport.set_of(2)
    begin = time.monotonic()
    with pytest.raises(LostPeerError, match=r"the update of client 1 \(rank 1\) is missing"):
        PlainExchange(transports[0], deadline_s=0.3, roll=Late()).start(np.zeros(4), 1.0).wait(LIMIT_S)
    assert time.monotonic() - begin < LIMIT_S


def dies_or_tells(told, transport):
    if transport.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        all_gather(transport, np.zeros(2), LIMIT_S)
    except TransportError as error:
        told.write_text(f"{time.monotonic() - begin} {error}")
        raise


def test_gloo_notices_a_killed_participant_long_before_the_deadline(tmp_path):
    with pytest.raises(AssertionError, match="rank 1:\ndied without a word"):
        run_ranks(2, gloo_rank, 2, free_port(), functools.partial(dies_or_tells, tmp_path / "told"), timeout=LIMIT_S)
    assert float((tmp_path / "told").read_text().split()[0]) < LIMIT_S / 10


def disagree(transport):
    with pytest.raises(FedSpeedError, match="disagree"):
        PlainExchange(transport, LIMIT_S).start(np.zeros(3 + transport.rank), 1.0).wait(LIMIT_S)


def test_different_lengths_are_refused_on_every_side():
    in_threads(LocalTransport.set_of(3), disagree)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="float32 or float64"):
        PlainExchange(LocalTransport.set_of(1)[0], 5).start(np.zeros(3, dtype=np.int64), 1.0)


LOST_SCRIPT = """
import time, numpy as np
from fedspeed.errors import LostPeerError
from fedspeed.routing.exchange import NoRollCall, PlainExchange
from fedspeed.routing.transports.local import LocalTransport
class Roll(NoRollCall):
    def lost(self): return ["client 1 (rank 1 on beta)"]
begin = time.monotonic()
try:
    PlainExchange(LocalTransport.set_of(2)[0], 500, Roll()).start(np.zeros(4), 1.0).wait(500)
except LostPeerError as error:
    print(time.monotonic() - begin, error)
"""


def test_a_lost_participant_ends_the_wait_and_the_process_long_before_the_deadline():
    done = subprocess.run([sys.executable, "-c", LOST_SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    seconds, _, said = done.stdout.partition(" ")
    assert float(seconds) < LIMIT_S / 10
    assert "the update of client 1 (rank 1 on beta) is missing" in said


def test_a_broken_connection_is_told_without_torchs_own_words():
    text = ("[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:26021. This is typically "
            "caused by a remote worker crashing. Check the logs of the remote worker before reporting an error. GLHF! \U0001f3d6\nand a trace")
    assert connection_text(RuntimeError(text)) == "Connection closed by peer [127.0.0.1]:26021"
    assert connection_text(RuntimeError("timed out\nmore")) == "timed out" and connection_text(RuntimeError()) == "RuntimeError"


def test_a_message_does_not_come_between_swaps():
    """One that arrives while a swap is waited for stays for its receiver, and a swap that comes while a message is waited for, for its swap."""
    one, other = LocalTransport.set_of(2)
    one.send(1, np.arange(5, dtype=np.uint8), 1.0)
    with pytest.raises(PeersLost, match="in time"):
        one.swap([b"", b"a"], [0, 1], 0.05)
    assert bytes(other.swap([b"b", b""], [1, 0], 1.0)[0]) == b"a"
    assert other.receive(0, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_what_is_no_message_of_arrays_is_refused():
    one, other = LocalTransport.set_of(2)
    channel = Channel(other, 0.05)
    one.send(1, np.frombuffer(b"anything", np.uint8), 1.0)
    with pytest.raises(FedSpeedError, match="participant 0 sent a message that holds no arrays"):
        channel.receive(0)
    with pytest.raises(LostPeerError, match="participant 0 sent no message"):
        channel.receive(0)
