"""Coordination of a run's ranks: common start, requests to stop, and detection of lost ranks."""

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

from fedspeed import activity
from fedspeed.cluster import rendezvous
from fedspeed.cluster.heartbeat import Heartbeat
from fedspeed.cluster.store_values import read_values
from fedspeed.errors import EXIT_FAILED, EXIT_OK, FedSpeedError, LostPeerError, Preempted
from fedspeed.session.request import Job

CHECK_IN_S = 120.0  # from the first rank that is ready until all are
NOTE_S = 3.0  # for the other ranks to note their own failure
READ_S = 0.5  # for the other ranks to read why rank 0 ends, before its store ends with it


class StopFlag:
    """Whether SIGTERM or SIGUSR1 (a warning of some schedulers) has asked this process to stop.

    A run stops after the round in progress. Before the first round it stops at once, by `Preempted`.

    Attributes:
        in_rounds: whether a round is in progress.
        on_request: called once with the activity that was interrupted, if a round is in progress.
    """

    def __init__(self) -> None:
        self._requested = False
        self.in_rounds = False
        self.on_request: Callable[[str], None] = lambda activity: None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first = not self._requested
        self._requested = True
        where = activity.describe_current()
        if not self.in_rounds:
            at = f"during {where}" if where else "before a round had begun"
            raise Preempted(f"asked to end {at}; the same command goes on")
        if first:
            self.on_request(where)

    def __call__(self) -> bool:
        return self._requested


class CheckIn:
    """A barrier of the required ranks that also passes on failures.

    Used as a context: if its body raises on one rank, all other ranks raise too, at once instead of at a
    deadline.

    Args:
        point: name of the barrier; each is used once in a run.

    Raises:
        FedSpeedError: another rank failed; with its message and its exit code.
        LostPeerError: a rank did not arrive in time.
    """

    def __init__(self, job: Job, store: rendezvous.Store, point: str):
        self._store = store
        self._me = job.world_rank
        self._ranks = job.required_ranks
        self._point = point

    def __enter__(self) -> "CheckIn":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        keys = [f"{self._point}/{rank}" for rank in self._ranks]
        if kind is not None:
            # `try_put` does not raise: if the store is gone too, the error of the body is the one to report.
            code = getattr(error, "exit_code", EXIT_FAILED)
            self._store.try_put(f"{self._point}/{self._me}", f"{code} {error}")
            if self._me == 0 and len(keys) > 1:
                with suppress(Preempted):  # another rank has ended, and the launcher stops this one for it
                    self._store.wait(keys, NOTE_S)
                    time.sleep(READ_S)
            return
        self._store.put(f"{self._point}/{self._me}", f"{EXIT_OK}")
        late = self._store.wait(keys, CHECK_IN_S)
        if late:
            ranks = ", ".join(key.rsplit("/", 1)[1] for key in sorted(late))
            raise LostPeerError(
                f"ranks {ranks} did not get ready within {CHECK_IN_S:.0f} s; look at their output"
            )
        for rank, (code, text) in zip(self._ranks, read_values(self._store, keys, _status), strict=True):
            if code != EXIT_OK:
                failure = FedSpeedError(f"rank {rank} cannot take part: {text}")
                failure.exit_code = code
                raise failure


def _status(value: str) -> tuple[int, str]:
    """Return (exit code, message) as a rank has published them at a barrier."""
    code, _, text = value.partition(" ")
    return int(code), text


class StoreArrivalTracker:
    """A `routing.exchange.ArrivalTracker` for the ranks of a job.

    Entries in the store show which ranks have reached an exchange, the heartbeat shows which are lost.
    """

    def __init__(self, job: Job, store: rendezvous.Store, heartbeat: Heartbeat):
        self._job = job
        self._store = store
        self._heartbeat = heartbeat

    def arrive(self, tag: int) -> None:
        """Note that this participant has reached exchange number `tag`."""
        if len(self._job.topology.participants) > 1:
            rendezvous.publish(self._store, f"exchange/{tag}/{self._job.world_rank}", "here")

    def missing(self, tag: int) -> list[str]:
        """Return the participants that have not reached exchange number `tag`, as messages name them."""
        here = rendezvous.published(self._store, f"exchange/{tag}", self._job.topology.participants)
        if self._job.world_rank not in here:
            return [
                self._job.describe(0)
            ]  # the store has lost this rank's note: rank 0, which holds it, is gone
        return [self._job.describe(rank) for rank in self._job.topology.participants if rank not in here]

    def lost(self) -> list[str]:
        """Return the ranks whose heartbeat has stopped, as messages name them."""
        return [self._job.describe(rank) for rank in self._heartbeat.lost()]


def find_lost(job: Job, store: rendezvous.Store, heartbeat: Heartbeat) -> list[int]:
    """Return the ranks that a run has lost: those whose heartbeat has stopped.

    A heartbeat stops some time after its rank. Meanwhile the survivors fail too and note it in the store, so
    that ranks without a note after a few seconds are the lost ones.
    """
    end = time.monotonic() + NOTE_S
    while True:
        if lost := heartbeat.lost():
            return list(lost)
        silent = sorted(set(job.workers) - rendezvous.published(store, "failed", job.workers))
        if not silent or time.monotonic() >= end:
            return silent
        time.sleep(0.2)
