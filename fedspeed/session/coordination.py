"""How the ranks of a run act as one: they start together or not at all, know who is missing, and end when
asked to.
"""

import signal
import time
from collections.abc import Callable
from contextlib import suppress

from fedspeed import activity
from fedspeed.cluster import rendezvous
from fedspeed.cluster.heartbeat import Heartbeat
from fedspeed.errors import EXIT_FAILED, EXIT_OK, FedSpeedError, LostPeerError, Preempted
from fedspeed.session.request import Job

# Ranks prepare alike; one that needs longer than this after the first is ready has a problem of its own.
CHECK_IN_S = 120.0
NOTE_S = 3.0
HEAR_S = 0.5  # for the others to read why rank 0 goes, and the store with it


class StopFlag:
    """SIGTERM and SIGUSR1 (some schedulers' warning) ask to end: after the round in progress, or at once
    while there is none.

    Attributes:
        in_rounds: whether a round is in progress.
        on_asked: takes what the process was at when it was asked, if a round is in progress.
    """

    def __init__(self):
        self._asked = False
        self.in_rounds = False
        self.on_asked: Callable[[str], None] = lambda where: None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_) -> None:
        first = not self._asked
        self._asked = True
        where = activity.describe_current()
        if not self.in_rounds:
            at = f"during {where}" if where else "before a round had begun"
            raise Preempted(f"asked to end {at}; the same command goes on")
        if first:
            self.on_asked(where)

    def __call__(self) -> bool:
        return self._asked


class CheckIn:
    """A point that all ranks that a run needs pass together, or nobody: one rank's bad input ends the others
    at once instead of at a deadline.
    """

    def __init__(self, job: Job, store: rendezvous.Store, point: str):
        self._store = store
        self._me = job.world_rank
        self._ranks = job.required_ranks
        self._point = point

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        keys = [f"{self._point}/{rank}" for rank in self._ranks]
        if kind is not None:
            # A note: should the store be gone too, the error must still be heard.
            code = getattr(error, "exit_code", EXIT_FAILED)
            self._store.try_put(f"{self._point}/{self._me}", f"{code} {error}")
            if self._me == 0 and len(keys) > 1:
                with suppress(Preempted):  # another rank may be gone already, and this one told to end for it
                    self._store.wait(keys, NOTE_S)
                    time.sleep(HEAR_S)
            return
        self._store.put(f"{self._point}/{self._me}", f"{EXIT_OK}")
        late = self._store.wait(keys, CHECK_IN_S)
        if late:
            ranks = ", ".join(key.rsplit("/", 1)[1] for key in sorted(late))
            raise LostPeerError(
                f"ranks {ranks} did not get ready within {CHECK_IN_S:.0f} s; look at their output"
            )
        for rank, word in zip(self._ranks, self._store.get(*keys), strict=True):
            code, _, text = word.partition(" ")
            if int(code) != EXIT_OK:
                failure = FedSpeedError(f"rank {rank} cannot take part: {text}")
                failure.exit_code = int(code)
                raise failure


class RollCall:
    """Who has reached an exchange, by notes in the store; who is lost, by the heartbeat."""

    def __init__(self, job: Job, store: rendezvous.Store, heartbeat: Heartbeat):
        self._job = job
        self._store = store
        self._heartbeat = heartbeat

    def arrive(self, tag: int) -> None:
        if len(self._job.topology.participants) > 1:
            rendezvous.publish(self._store, f"exchange/{tag}/{self._job.world_rank}", "here")

    def missing(self, tag: int) -> list[str]:
        here = rendezvous.published(self._store, f"exchange/{tag}", self._job.topology.participants)
        if self._job.world_rank not in here:
            return [self._job.describe(0)]  # our own note is gone: so is the store, and rank 0 that held it
        return [self._job.describe(rank) for rank in self._job.topology.participants if rank not in here]

    def lost(self) -> list[str]:
        return [self._job.describe(rank) for rank in self._heartbeat.lost()]


def find_lost(job: Job, store: rendezvous.Store, heartbeat: Heartbeat) -> list[int]:
    """The ranks that a run has lost: those whose heartbeat has stopped. Until it does, survivors leave a note
    that they failed too, and who leaves none within a few seconds is the one.
    """
    end = time.monotonic() + NOTE_S
    while True:
        if lost := heartbeat.lost():
            return list(lost)
        silent = sorted(set(job.workers) - rendezvous.published(store, "failed", job.workers))
        if not silent or time.monotonic() >= end:
            return silent
        time.sleep(0.2)
