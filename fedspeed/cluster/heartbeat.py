"""Detection of ranks that no longer respond: a machine without power closes no connection, so reads only
wait.

Each working rank increments a counter of its own in the job's store and reads those of the others. Two
threads do this, because a call to a store whose machine has vanished has no timeout: one thread calls the
store and may hang, the other decides which ranks are lost and never calls it.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedspeed.cluster.rendezvous import Store

# How long `close` waits until the store knows that this rank leaves.
_LEAVE_S = 3.0
# Ranks that stop at the same time may be noticed this many intervals apart.
_MARGIN_INTERVALS = 3


class IdleTime:
    """Seconds for which each rank's counter has not changed. Knows neither clock nor store.

    Args:
        step_s: the most that one update may add. If this process itself was stopped, it must not take all
            others for lost when it continues.
    """

    def __init__(self, ranks: Sequence[int], step_s: float):
        self._step_s = step_s
        self._counts = dict.fromkeys(ranks, 0)
        self._seconds = dict.fromkeys(ranks, 0.0)

    def take(self, counts: Mapping[int, int], passed_s: float) -> None:
        """Update from the counters of all ranks, read `passed_s` seconds after the last update."""
        for rank, count in counts.items():
            changed = count != self._counts[rank]
            self._counts[rank] = count
            self._seconds[rank] = 0.0 if changed else self._seconds[rank] + min(passed_s, self._step_s)

    def at_least(self, limit_s: float) -> tuple[int, ...]:
        """Return the ranks that have been idle for `limit_s` seconds or more, in order."""
        return tuple(sorted(rank for rank, seconds in self._seconds.items() if seconds >= limit_s))


@dataclass(frozen=True)
class Snapshot:
    """What the store last returned.

    Attributes:
        silent: ranks that have been idle for the whole heartbeat timeout.
        suspected: ranks that have been idle for nearly that long, the silent ones included.
        left: ranks that have left in order.
    """

    silent: tuple[int, ...] = ()
    suspected: tuple[int, ...] = ()
    left: frozenset[int] = frozenset()


def find_lost_ranks(
    before: tuple[int, ...], snapshot: Snapshot, gone: bool, unresponsive: bool, holder: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the ranks that are lost.

    Ranks that stop at the same time are reported together, and none is added later: survivors end because of
    the loss, rank 0 and the store with it perhaps first, and must not be taken for its cause.

    Args:
        before: the result of the last call.
        snapshot: the last one.
        gone: whether the connection to the store is broken.
        unresponsive: whether the store has not answered for the whole heartbeat timeout.
        holder: the rank that holds the store; empty if it does no work.
    """
    if before:
        if gone or unresponsive:
            return before
        return tuple(rank for rank in before if rank in snapshot.suspected)
    holder = tuple(rank for rank in holder if rank not in snapshot.left)
    if unresponsive:
        return tuple(sorted({*holder, *snapshot.suspected}))
    if gone:
        return snapshot.suspected or holder
    return snapshot.suspected if snapshot.silent else ()


class Heartbeat:
    """The heartbeat of a rank, and the detection of lost ranks. Runs from construction until `close`.

    World rank 0 holds the store. If that rank works too, it is lost when the store is gone or does not
    answer; nothing is known about the others then. A rank whose counter changes again is no longer lost.

    Args:
        store: returned by `rendezvous.meet`.
        ranks: world ranks that work, this one among them. All must start within less than
            `heartbeat_timeout_s` of each other.
        me: this world rank.
        interval_s: between two increments; a small part of `heartbeat_timeout_s`.
        heartbeat_timeout_s: a rank idle for so long is lost. Must be much longer than any C call that holds
            the interpreter lock, during which no thread runs.
        on_stuck: called once, with the lost ranks, when there have been lost ranks for `grace_s` and `close`
            was not called: the main thread then waits in a call that no exception reaches. It must not call
            `close`, which waits for its end.
        grace_s: see `on_stuck`.
    """

    def __init__(
        self,
        store: Store,
        ranks: Sequence[int],
        me: int,
        *,
        interval_s: float,
        heartbeat_timeout_s: float,
        on_stuck: Callable[[tuple[int, ...]], None],
        grace_s: float,
    ):
        margin_s = (_MARGIN_INTERVALS + 1) * interval_s
        assert heartbeat_timeout_s > margin_s, "the timeout must be many intervals"
        self._store = store
        self._ranks = tuple(ranks)
        self._me = me
        self._interval_s = interval_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._on_stuck = on_stuck
        self._grace_s = grace_s
        self._lost: tuple[int, ...] = ()
        self._snapshot = Snapshot()
        self._answers = 0
        self._gone = False
        self._announce_leaving = False
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._client = threading.Thread(target=self._call_store, name="fedspeed-heartbeat", daemon=True)
        self._client.start()
        threading.Thread(target=self._watch, name="fedspeed-heartbeat-judge", daemon=True).start()

    def lost(self) -> tuple[int, ...]:
        """Return the ranks lost at present, in order. Cheap, and safe to call from any thread."""
        return self._lost

    def close(self, goodbye: bool = True) -> None:
        """Stop; `on_stuck` is not called from here on. May be called twice, and takes a few seconds at most.

        Args:
            goodbye: whether this rank leaves in order, and the others shall not count it as lost.
        """
        with self._lock:
            if self._end.is_set():
                return
            self._announce_leaving = goodbye
            self._end.set()
        if goodbye:
            self._client.join(_LEAVE_S)

    def _call_store(self) -> None:
        """Increment this rank's counter and read the others' until the end.

        Whatever fails in a store, torch raises a RuntimeError.
        """
        try:
            tcp = self._store.connect("fedspeed/heartbeat", self._heartbeat_timeout_s)
            others = [rank for rank in self._ranks if rank != self._me]
            keys = [_beat_key(rank) for rank in others] + [_left_key(rank) for rank in others]
            for key in keys:
                tcp.add(key, 0)  # creates the key: reading one that does not exist would wait
            idle = IdleTime(others, 2 * self._interval_s)
            last = time.monotonic()
            while not self._end.is_set():
                tcp.add(_beat_key(self._me), 1)
                numbers = list(map(_number, tcp.multi_get(keys))) if keys else []
                now = time.monotonic()
                idle.take(dict(zip(others, numbers, strict=False)), now - last)
                last = now
                has_left = dict(zip(others, numbers[len(others) :], strict=True))
                self._snapshot = self._snapshot_of(idle, frozenset(r for r in others if has_left[r] > 0))
                self._answers += 1
                self._end.wait(self._interval_s)
            if self._announce_leaving:
                tcp.add(_left_key(self._me), 1)
        except RuntimeError:
            self._gone = True

    def _snapshot_of(self, idle: IdleTime, left: frozenset[int]) -> Snapshot:
        timeout_s = self._heartbeat_timeout_s
        silent = idle.at_least(timeout_s)
        suspected = idle.at_least(timeout_s - _MARGIN_INTERVALS * self._interval_s)
        return Snapshot(
            silent=tuple(rank for rank in silent if rank not in left),
            suspected=tuple(rank for rank in suspected if rank not in left),
            left=left,
        )

    def _watch(self) -> None:
        """Decide which ranks are lost until the end, and call `on_stuck` if they remain lost."""
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
            unresponsive = bool(store.at_least(self._heartbeat_timeout_s))
            self._lost = find_lost_ranks(before, self._snapshot, self._gone, unresponsive, holder)
            lost_s = lost_s + passed_s if before and self._lost else 0.0
            if lost_s >= self._grace_s:
                with self._lock:
                    if not self._end.is_set():
                        self._on_stuck(self._lost)
                return


def _number(value: bytes) -> int:
    """Return a counter of the store; -1 for a value that another program has written, so that the rank whose
    counter it was counts as idle.
    """
    try:
        return int(value)
    except ValueError:
        return -1


def _beat_key(world_rank: int) -> str:
    return f"beat/{world_rank}"


def _left_key(world_rank: int) -> str:
    return f"left/{world_rank}"
