"""Finds ranks that have gone silent: a machine without power says no goodbye, and every connection to it just
waits.

Each working rank counts up a number of its own in the job's store and reads those of the others. Two threads,
because a call to a store whose machine has vanished has no limit: one talks, and may hang; the other judges,
and never talks.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The goodbye of a rank, and the wait for it; a store that is slower than this is as good as gone.
_GOODBYE_S = 3.0
# Ranks that fall silent together are found by snapshots a few intervals apart, on each rank by its own.
_APART = 3


class IdleTime:
    """Seconds for which each rank has said nothing. Knows neither clock nor store.

    Args:
        step_s: the most that one snapshot may add. A process that was stopped itself must not take everybody
            else for lost when it wakes.
    """

    def __init__(self, ranks: Sequence[int], step_s: float):
        self._step_s = step_s
        self._counts = dict.fromkeys(ranks, 0)
        self._seconds = dict.fromkeys(ranks, 0.0)

    def take(self, counts: Mapping[int, int], passed_s: float) -> None:
        """Take in the counters of all ranks, `passed_s` after they were taken before."""
        for rank, count in counts.items():
            moved = count != self._counts[rank]
            self._counts[rank] = count
            self._seconds[rank] = 0.0 if moved else self._seconds[rank] + min(passed_s, self._step_s)

    def at_least(self, limit_s: float) -> tuple[int, ...]:
        """Return the ranks that have been silent for `limit_s` or more, in order."""
        return tuple(sorted(rank for rank, seconds in self._seconds.items() if seconds >= limit_s))


@dataclass(frozen=True)
class Snapshot:
    """What the store last told: ranks that have been silent for the whole limit, for nearly that long (these
    included), and that left.
    """

    silent: tuple[int, ...] = ()
    suspected: tuple[int, ...] = ()
    left: frozenset[int] = frozenset()


def judge(
    before: tuple[int, ...], snapshot: Snapshot, gone: bool, unresponsive: bool, holder: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the ranks to be called lost.

    Those who fall silent together are named together, and nobody is added afterwards: survivors give up
    because of the loss, rank 0 and the store with it perhaps first of all, and must not be taken for its
    cause.

    Args:
        before: what was said last time.
        gone, unresponsive: the store's connection is broken; it has not answered for the whole limit.
        holder: the rank that holds the store, empty if it does no work.
    """
    if before:
        return (
            before if gone or unresponsive else tuple(rank for rank in before if rank in snapshot.suspected)
        )
    holder = tuple(rank for rank in holder if rank not in snapshot.left)
    if unresponsive:
        return tuple(sorted({*holder, *snapshot.suspected}))
    if gone:
        return snapshot.suspected or holder
    return snapshot.suspected if snapshot.silent else ()


class Heartbeat:
    """This rank's heartbeat, and its ear for that of the others. Runs from construction to `close`.

    The store lives on world rank 0: if that rank works too, a store that is gone or does not answer means
    that it is lost. Nothing is known about the others then. A rank that is heard again is no longer lost.

    Args:
        store: what `rendezvous.meet` returned.
        ranks: world ranks that work, this one among them; all begin within less than `heartbeat_timeout_s` of
            each other.
        me: this world rank.
        interval_s: between two beats; a small part of `heartbeat_timeout_s`.
        heartbeat_timeout_s: a rank silent for so long is lost. Much longer than any C call that holds the
            interpreter lock, in which no thread beats.
        on_stuck: called once, with the lost, when there have been lost ranks for `grace_s` and `close` was
            not called: the main thread then waits in a call that no exception reaches. It must not call
            `close`, which waits for its end.
    """

    def __init__(
        self,
        store: Any,
        ranks: Sequence[int],
        me: int,
        *,
        interval_s: float,
        heartbeat_timeout_s: float,
        on_stuck: Callable[[tuple[int, ...]], None],
        grace_s: float,
    ):
        assert heartbeat_timeout_s > (_APART + 1) * interval_s, "a silence is many intervals"
        self._store, self._ranks, self._me = store, tuple(ranks), me
        self._interval_s = interval_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._on_stuck = on_stuck
        self._grace_s = grace_s
        self._lost: tuple[int, ...] = ()
        self._snapshot = Snapshot()
        self._answers = 0
        self._gone = False
        self._goodbye = False
        self._end, self._lock = threading.Event(), threading.Lock()
        self._talker = threading.Thread(target=self._talk, name="fedspeed-heartbeat", daemon=True)
        self._talker.start()
        threading.Thread(target=self._judge, name="fedspeed-heartbeat-judge", daemon=True).start()

    def lost(self) -> tuple[int, ...]:
        """Return the ranks lost at present, in order; costs nothing, from any thread."""
        return self._lost

    def close(self, goodbye: bool = True) -> None:
        """Stop it; `on_stuck` is not called from here on. May be called twice, and takes a few seconds at
        most.

        Args:
            goodbye: whether this rank leaves in order, and the others shall not count it as lost.
        """
        with self._lock:
            if self._end.is_set():
                return
            self._goodbye = goodbye
            self._end.set()
        if goodbye:
            self._talker.join(_GOODBYE_S)

    def _talk(self) -> None:
        """Beats and listens. Whatever a store does that is gone, torch tells by a RuntimeError."""
        try:
            tcp = self._store.connect("fedspeed/heartbeat", self._heartbeat_timeout_s)
            others = [rank for rank in self._ranks if rank != self._me]
            keys = [_beat(rank) for rank in others] + [_left(rank) for rank in others]
            for key in keys:
                tcp.add(key, 0)  # creates it: reading a key that is not there would wait
            idle = IdleTime(others, 2 * self._interval_s)
            last = time.monotonic()
            while not self._end.is_set():
                tcp.add(_beat(self._me), 1)
                numbers = [int(text) for text in tcp.multi_get(keys)] if keys else []
                now = time.monotonic()
                idle.take(dict(zip(others, numbers, strict=False)), now - last)
                last = now
                left = frozenset(
                    rank for rank, gone in zip(others, numbers[len(others) :], strict=True) if gone
                )
                limits_s = (self._heartbeat_timeout_s, self._heartbeat_timeout_s - _APART * self._interval_s)
                silent, suspected = (
                    tuple(rank for rank in idle.at_least(limit_s) if rank not in left) for limit_s in limits_s
                )
                self._snapshot = Snapshot(silent, suspected, left)
                self._answers += 1
                self._end.wait(self._interval_s)
            if self._goodbye:
                tcp.add(_left(self._me), 1)
        except RuntimeError:
            self._gone = True

    def _judge(self) -> None:
        store = IdleTime([0], 2 * self._interval_s)
        holder = tuple(rank for rank in self._ranks if rank == 0)
        last = time.monotonic()
        lost_s = 0.0
        while not self._end.wait(self._interval_s):
            now = time.monotonic()
            passed_s = min(now - last, 2 * self._interval_s)
            last = now
            store.take({0: self._answers}, passed_s)
            before = self._lost
            self._lost = judge(
                before, self._snapshot, self._gone, bool(store.at_least(self._heartbeat_timeout_s)), holder
            )
            lost_s = lost_s + passed_s if before and self._lost else 0.0
            if lost_s >= self._grace_s:
                with self._lock:
                    if not self._end.is_set():
                        self._on_stuck(self._lost)
                return


def _beat(world_rank: int) -> str:
    return f"beat/{world_rank}"


def _left(world_rank: int) -> str:
    return f"left/{world_rank}"
