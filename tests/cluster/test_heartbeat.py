"""Ranks that fall silent: real processes on a real store, and the judgement alone."""

import os
import signal
import time
from datetime import timedelta

import pytest

from fedspeed.cluster.heartbeat import Heartbeat, IdleTime, Snapshot, find_lost_ranks
from fedspeed.cluster.rendezvous import Store
from tests.limits import LIMIT_S
from tests.processes import free_port, run_ranks

RANKS = (0, 1, 2)
INTERVAL_S = 0.05
HEARTBEAT_TIMEOUT_S = 1.2
GRACE_S = 0.3


def store_of(rank, port):
    from torch.distributed import TCPStore

    tcp = TCPStore(
        "127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=10)
    )
    return Store(tcp, ("127.0.0.1", port), rank)


def begin(rank, port):
    """(heartbeat, what it called on_stuck with, store), once all three beat."""
    store = store_of(rank, port)
    calls = []
    heartbeat = Heartbeat(
        store,
        RANKS,
        rank,
        interval_s=INTERVAL_S,
        heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S,
        on_stuck=calls.append,
        grace_s=GRACE_S,
    )
    store.put(f"here/{rank}", "")
    assert not store.wait([f"here/{r}" for r in RANKS], LIMIT_S)
    return heartbeat, calls, store


def until(condition, limit_s=LIMIT_S):
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def fall(rank, port, number):
    """Be the victim in a child process, and strike it once the others watch."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        *_, store = begin(rank, port)
        assert not store.wait([f"watches/{r}" for r in RANKS if r != rank], LIMIT_S)
        os.write(theirs, b"x")
        time.sleep(LIMIT_S)
        os._exit(0)
    os.read(ours, 1)
    os.kill(child, number)
    time.sleep(HEARTBEAT_TIMEOUT_S + 2 * GRACE_S)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def falls_or_watches(rank, port, victim, number, closer):
    if rank == victim:
        return fall(rank, port, number)
    heartbeat, calls, store = begin(rank, port)
    before = heartbeat.lost()
    begun = time.monotonic()
    store.put(f"watches/{rank}", "")
    until(heartbeat.lost)
    lost = heartbeat.lost()
    seconds = time.monotonic() - begun
    if rank == closer:
        heartbeat.close()
    else:
        until(lambda: calls)
    time.sleep(2 * GRACE_S)  # for a call that must not be
    heartbeat.close()
    return before, lost, seconds, calls


@pytest.mark.parametrize(
    ("victim", "number", "closer"),
    [(1, signal.SIGSTOP, None), (2, signal.SIGKILL, 1), (0, signal.SIGKILL, None), (0, signal.SIGSTOP, None)],
)
def test_a_rank_that_falls_silent_is_lost_and_who_is_stuck_is_told_once(victim, number, closer):
    arguments = (free_port(), victim, number, closer)
    results = run_ranks(3, falls_or_watches, *arguments, timeout=LIMIT_S)
    for rank in set(RANKS) - {victim}:
        before, lost, seconds, calls = results[rank]
        assert before == ()
        assert lost == (victim,)
        assert calls == ([] if rank == closer else [(victim,)])
        if victim == 0 and number == signal.SIGKILL:
            assert seconds < HEARTBEAT_TIMEOUT_S, "a broken connection to the store needs no waiting"
        else:
            assert seconds > HEARTBEAT_TIMEOUT_S - 4 * INTERVAL_S


def test_a_counter_that_is_no_number_counts_as_silence():
    from torch.distributed import HashStore

    store = Store(HashStore(), ("", 0), 0)
    heartbeat = Heartbeat(
        store,
        (0, 1),
        0,
        interval_s=INTERVAL_S,
        heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S,
        on_stuck=lambda lost: None,
        grace_s=LIMIT_S,
    )
    until(lambda: store.has("fedspeed/heartbeat/beat/0"))
    store.put("fedspeed/heartbeat/beat/1", "\x1b[2J")
    until(heartbeat.lost)
    assert heartbeat.lost() == (1,)
    heartbeat.close()


def leaves_or_stays(rank, port):
    heartbeat, calls, store = begin(rank, port)
    if rank == 1:
        heartbeat.close()
        heartbeat.close()
        return (), calls
    time.sleep(HEARTBEAT_TIMEOUT_S + 8 * INTERVAL_S)
    lost = heartbeat.lost()
    store.put(f"looked/{rank}", "")
    if rank == 0:  # which holds the store
        assert not store.wait(["looked/2"], LIMIT_S)
    heartbeat.close()
    return lost, calls


def test_a_rank_that_leaves_in_order_is_not_lost():
    assert run_ranks(3, leaves_or_stays, free_port(), timeout=LIMIT_S) == [((), [])] * 3


def test_a_rank_that_fails_says_no_goodbye_and_a_rank_heard_again_is_not_lost():
    port = free_port()
    calls = []
    store = store_of(0, port)
    here = Heartbeat(
        store, (0, 1), 0, interval_s=INTERVAL_S, heartbeat_timeout_s=0.3, on_stuck=calls.append, grace_s=60.0
    )
    first = Heartbeat(
        store, (0, 1), 1, interval_s=INTERVAL_S, heartbeat_timeout_s=60.0, on_stuck=calls.append, grace_s=60.0
    )
    time.sleep(0.2)
    first.close(goodbye=False)
    until(here.lost)
    assert here.lost() == (1,)
    again = Heartbeat(
        store, (0, 1), 1, interval_s=INTERVAL_S, heartbeat_timeout_s=60.0, on_stuck=calls.append, grace_s=60.0
    )
    until(lambda: not here.lost())
    assert here.lost() == ()
    again.close()
    here.close()
    assert calls == []


def test_a_store_on_a_rank_that_does_not_work_may_go():
    class Gone:
        def connect(self, prefix, timeout_s):
            raise RuntimeError("Connection refused")

    calls = []
    heartbeats = [
        Heartbeat(
            Gone(), ranks, 1, interval_s=0.02, heartbeat_timeout_s=0.1, on_stuck=calls.append, grace_s=0.1
        )
        for ranks in ((1, 2), (0, 1, 2))
    ]
    until(lambda: calls)
    assert [heartbeat.lost() for heartbeat in heartbeats] == [(), (0,)]
    assert calls == [(0,)]
    for heartbeat in heartbeats:
        heartbeat.close()


def test_idle_time_is_counted_in_snapshots():
    idle = IdleTime([1, 2], step_s=10.0)
    for second in range(1, 12):
        idle.take({1: second, 2: 1}, 5.0)
    assert idle.at_least(50.0) == (2,)
    assert idle.at_least(50.1) == ()
    idle.take({1: 12, 2: 2}, 5.0)
    assert idle.at_least(0.1) == ()


def test_a_process_that_was_stopped_itself_takes_nobody_for_lost():
    idle = IdleTime([1], step_s=10.0)
    idle.take({1: 1}, 5.0)
    idle.take({1: 1}, 3600.0)
    assert idle.at_least(10.1) == ()


@pytest.mark.parametrize(
    ("before", "snapshot", "gone", "unresponsive", "lost"),
    [
        ((), Snapshot((), (3,)), False, False, ()),
        (
            (),
            Snapshot((3,), (3, 4)),
            False,
            False,
            (3, 4),
        ),  # one host, whose ranks did not stop in the same snapshot
        ((3,), Snapshot((3, 5), (3, 5)), False, False, (3,)),  # 5 has given up since
        ((3, 4), Snapshot((3,), (3,)), False, False, (3,)),  # 4 is heard again
        ((3,), Snapshot((), ()), False, False, ()),
        ((), Snapshot(), True, False, (0,)),
        ((), Snapshot((), (3,)), True, False, (3,)),  # rank 0 saw the loss first, and has gone because of it
        ((3,), Snapshot((3,), (3,)), True, False, (3,)),
        ((), Snapshot((), (3,)), False, True, (0, 3)),
        ((0,), Snapshot(), False, False, ()),  # the store answers again
        ((), Snapshot((), (), frozenset([0])), True, False, ()),  # rank 0 left in order
    ],
)
def test_judgement(before, snapshot, gone, unresponsive, lost):
    assert find_lost_ranks(before, snapshot, gone, unresponsive, (0,)) == lost
