"""The exchange of a round: every participant gives a vector and a weight, and learns the sums. There is no
server process.

Here is what all exchanges have in common, and the plain one.
"""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.transport import Transport, TransportError, all_gather, all_to_all, as_bytes

DTYPES = (np.float32, np.float64)
_LOOK_S = 1.0  # between two looks at who has been lost


class RollCall(Protocol):
    """Out-of-band knowledge of who has reached an exchange, used to name the missing when one fails, and of
    who has been lost, which makes it fail.
    """

    def arrive(self, tag: int) -> None: ...

    def missing(self, tag: int) -> list[str]: ...

    def lost(self) -> list[str]: ...


class NoRollCall:
    """Knows nobody: the error says that someone is missing, not who."""

    def arrive(self, tag: int) -> None:
        pass

    def missing(self, tag: int) -> list[str]:
        return []

    def lost(self) -> list[str]:
        return []


@dataclass(frozen=True)
class Outcome:
    """What an exchange gives a participant.

    Attributes:
        total: sum of the vectors [n]. weight: sum of the weights.
        idle_s: seconds until the last participant had arrived. exchange_s: seconds from then on.
        clipped: values of all participants that were beyond what the exchange carries, and count for less
            than they should.
    """

    total: np.ndarray
    weight: float
    idle_s: float
    exchange_s: float
    clipped: int = 0


class Handle:
    """An exchange under way."""

    def __init__(self, future: futures.Future, tag: int, roll: RollCall):
        self._future = future
        self._tag = tag
        self._roll = roll
        self.idle_s = 0.0  # seconds until the last participant had arrived
        self.exchange_s = 0.0  # seconds the vectors travelled
        self.clipped = 0  # see Outcome

    def wait(self, deadline_s: float) -> tuple[np.ndarray, float]:
        """(sum of the vectors, sum of the weights).

        Raises:
            LostPeerError: some participant did not arrive or was lost on the way; names those that are known
                to be missing.
        """
        end = time.monotonic() + deadline_s
        while not futures.wait([self._future], max(0.0, min(_LOOK_S, end - time.monotonic()))).done:
            # A machine that has vanished breaks no connection: the transport would wait for it until the
            # deadline.
            if lost := self._roll.lost():
                raise LostPeerError(f"the update of {', '.join(lost)} is missing: silent for too long")
            if time.monotonic() >= end:
                raise self._failure(f"no answer within {deadline_s:.0f} s")
        try:
            outcome = self._future.result()
        except TransportError as error:
            raise self._failure(str(error)) from error
        self.idle_s = outcome.idle_s
        self.exchange_s = outcome.exchange_s
        self.clipped = outcome.clipped
        return outcome.total, outcome.weight

    def _failure(self, reason: str) -> LostPeerError:
        missing = self._roll.missing(self._tag)
        names = (
            ", ".join(missing) if missing else "at least one participant (all had arrived: lost on the way)"
        )
        return LostPeerError(f"the update of {names} is missing: {reason}")


class Exchange(ABC):
    """Subclasses give `_run`."""

    def __init__(self, transport: Transport, deadline_s: float, roll: RollCall | None = None):
        self._transport, self._deadline_s, self._roll = transport, deadline_s, roll or NoRollCall()
        self._tag = 0
        # One thread, so that the order of calls is the order of exchanges. Not an executor's: Python waits
        # for those when it ends, and this one may be waiting for a participant that is gone.
        self._orders: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, name="exchange", daemon=True).start()

    @property
    def bytes_sent(self) -> int:
        return self._transport.bytes_sent

    @property
    def max_wait_s(self) -> float:
        """How long `Handle.wait` should wait at most: longer than the exchange itself, which knows better
        what it lacks.
        """
        return self._deadline_s

    def start(self, vector: np.ndarray, weight: float, parts: Sequence[int] | None = None) -> Handle:
        """Begin an exchange. The vector is already multiplied by the weight; it must not change until `wait`
        returns.

        Args:
            vector: [n] float32 or float64; n and dtype equal on all participants.
            weight: this participant's share of the denominator; 0 with a zero vector for one that has nothing
                to give.
            parts: lengths of what belongs together in the vector, such as tensors, equal on all participants;
                they sum to n. What is of one size should be one part: exchanges that carry numbers of limited
                range give each part a range of its own.
        """
        parts = (vector.size,) if parts is None else tuple(parts)
        if vector.dtype not in DTYPES or vector.ndim != 1:
            raise ValueError(
                f"an exchange takes a float32 or float64 vector, not {vector.dtype} {vector.shape}"
            )
        if sum(parts) != vector.size:
            raise ValueError(f"parts of {sum(parts)} values together, in a vector of {vector.size}")
        tag = self._tag
        self._tag += 1
        self._roll.arrive(tag)
        future: futures.Future = futures.Future()
        self._orders.put((future, tag, vector, float(weight), parts))
        return Handle(future, tag, self._roll)

    def share(self, vector: np.ndarray, priority: float) -> np.ndarray | None:
        """What the participant with the highest priority says to all, in the clear: for what is no secret,
        such as the state that a run goes on from. Not while an exchange is under way.

        Args:
            vector: the content on those that have it; its length and dtype on all.
            priority: 0 on those that have none. Of equal ones the first speaks; if nobody has any, the answer
                is None.

        Raises:
            LostPeerError: a participant is missing.
            FedSpeedError: somebody claims a priority that is none: negative or not finite.
        """
        priorities = self.gather(np.array([float(priority)]))[:, 0]
        _check_amounts("a priority", priorities)
        if not priorities.any():
            return None
        return self.share_from(int(priorities.argmax()), vector)

    def share_from(self, giver: int, vector: np.ndarray) -> np.ndarray:
        """What one participant says to all, in the clear, where all know beforehand whose word counts: by
        the topology or the roster, and not by what somebody claims. Not while an exchange is under way.

        Args:
            giver: number of the participant that speaks, the same on all.
            vector: [n] the content on the giver; its length and dtype on all.

        Raises:
            LostPeerError: a participant is missing.
        """
        transport = self._transport
        if not 0 <= giver < transport.size:
            raise ValueError(f"participant {giver} is none of 0 to {transport.size - 1}")
        data = as_bytes(vector).copy()  # it may still be on its way to somebody when the caller goes on
        sizes = [data.size if i == giver else 0 for i in range(transport.size)]
        parts = [data] * transport.size if transport.rank == giver else [b""] * transport.size
        try:
            return transport.swap(parts, sizes, self._deadline_s)[giver].view(vector.dtype)
        except TransportError as error:
            raise LostPeerError(f"a participant is missing: {error}") from error

    def gather(self, mine: np.ndarray) -> np.ndarray:
        """What every participant says to all, in the clear: [participants, n] on everyone. Not while an
        exchange is under way.

        Args:
            mine: [n]; its length and dtype are the same on all.

        Raises:
            LostPeerError: a participant is missing.
        """
        try:
            return all_gather(self._transport, mine, self._deadline_s)
        except TransportError as error:
            raise LostPeerError(f"a participant is missing: {error}") from error

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            future, *exchange = order
            try:
                future.set_result(self._run(*exchange))
            except Exception as error:  # noqa: BLE001 - whoever waits gets it
                future.set_exception(error)

    @abstractmethod
    def _run(self, tag: int, vector: np.ndarray, weight: float, parts: tuple[int, ...]) -> Outcome:
        """Make one exchange, in the thread of the exchanges."""

    def close(self) -> None:
        self._orders.put(None)
        self._transport.close()


class PlainExchange(Exchange):
    """Sums in the clear, inside one trust domain.

    A vector is cut into one chunk per participant; each participant sums its chunk in participant order, in
    float64, and the summed chunks go to everyone. So all hold the same bits, and each sends 2 (n-1)/n of a
    vector, whatever n.
    """

    def _run(self, tag: int, vector: np.ndarray, weight: float, parts: tuple[int, ...]) -> Outcome:
        transport = self._transport
        begin = time.perf_counter()
        head = np.array([tag, vector.size, DTYPES.index(vector.dtype), weight])
        heads = all_gather(transport, head, self._deadline_s)
        arrived = time.perf_counter()
        if (heads[:, :3] != head[:3]).any():
            told = ", ".join(f"({tag:.0f}, {length:.0f}, {dtype:.0f})" for tag, length, dtype in heads[:, :3])
            raise FedSpeedError(
                f"participants disagree on the exchange: (tag, length, dtype) are [{told}]; "
                "all sites must run the same configuration and version"
            )
        _check_amounts("a weight", heads[:, 3])
        chunk = -(-vector.size // transport.size)
        parts = [vector[i * chunk : (i + 1) * chunk] for i in range(transport.size)]
        parts = [np.pad(p, (0, chunk - p.size)) if p.size < chunk else p for p in parts]
        mine = all_to_all(transport, parts, self._deadline_s)
        total = np.zeros(chunk)
        for part in mine:
            total += part
        whole = all_gather(transport, total.astype(vector.dtype), self._deadline_s).reshape(-1)[: vector.size]
        return Outcome(whole, float(heads[:, 3].sum()), arrived - begin, time.perf_counter() - arrived)


def _check_amounts(what: str, told: np.ndarray) -> None:
    """Refuse what participants say where one says what is no amount.

    Args:
        told: [participants] float64.

    Raises:
        FedSpeedError: one is negative or not finite; names the participant.
    """
    wrong = np.flatnonzero(~(np.isfinite(told) & (told >= 0)))
    if wrong.size:
        raise FedSpeedError(
            f"participant {wrong[0]} tells {what} of {told[wrong[0]]}, which is none; all "
            "must run the same version of FedSpeed"
        )
