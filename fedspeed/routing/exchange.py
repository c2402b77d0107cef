"""The exchange of a round: every participant contributes a vector and a weight, and gets the sums. There is
no server process.

`Exchange` is the base class of all kinds of exchange. `PlainExchange` hides nothing.
"""

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent import futures
from dataclasses import dataclass, field

import numpy as np

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.arrivals import ArrivalTracker, NoArrivalTracker
from fedspeed.routing.transport import Payload, Transport, TransportError, all_gather, as_bytes, swap_among
from fedspeed.routing.zero_runs import decode, encode

DTYPES = (np.float32, np.float64)
WORD = 4  # bytes; every message of a sum consists of whole words
# What a participant tells another one before a sum; `words` follow from it to that one.
HEAD = np.dtype([
    ("number", np.float64),
    ("length", np.float64),
    ("dtype", np.int32),
    ("words", np.uint32),
    ("weight", np.float64),
])
_POLL_S = 1.0  # how often a wait asks who has been lost


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Hold the result of an exchange.

    Attributes:
        total: sum of the vectors [n]. weight: sum of the weights.
        idle_s: seconds until the last participant had arrived. exchange_s: seconds from then on.
        clipped: how many values of all participants were larger than the exchange can carry, and count for
            less than they should.
        participants: how many participants are in the sum.
        skipped: whether all weights were zero because a sum with this label had been settled before, so that
            no participant adds its vector once more. Equal on all participants; for float32 vectors only.
    """

    total: np.ndarray
    weight: float
    idle_s: float
    exchange_s: float
    participants: int
    clipped: int = 0
    skipped: bool = False


class Handle:
    """An exchange under way."""

    def __init__(self, future: "futures.Future[Outcome]", number: int, arrivals: ArrivalTracker):
        """Wait for the outcome of exchange `number`. The other attributes are those of `Outcome`, once `wait`
        has returned.
        """
        self._future = future
        self._number = number
        self._arrivals = arrivals
        self.idle_s = 0.0
        self.exchange_s = 0.0
        self.participants = 0
        self.clipped = 0
        self.skipped = False

    def wait(self, deadline_s: float) -> tuple[np.ndarray, float]:
        """Return (sum of the vectors, sum of the weights).

        Raises:
            LostPeerError: some participant did not arrive or was lost during the exchange; names those that
                are known to be missing.
        """
        end = time.monotonic() + deadline_s
        while not futures.wait([self._future], max(0.0, min(_POLL_S, end - time.monotonic()))).done:
            # A machine that loses power closes no connection: the transport would wait for it until the
            # deadline.
            if lost := self._arrivals.lost():
                raise LostPeerError(f"the update of {', '.join(lost)} is missing: silent for too long")
            if time.monotonic() >= end:
                raise self._failure(f"no answer within {deadline_s:.0f} s")
        try:
            outcome = self._future.result()
        except TransportError as error:
            raise self._failure(str(error)) from error
        self.idle_s = outcome.idle_s
        self.exchange_s = outcome.exchange_s
        self.participants = outcome.participants
        self.clipped = outcome.clipped
        self.skipped = outcome.skipped
        return outcome.total, outcome.weight

    def _failure(self, reason: str) -> LostPeerError:
        missing = self._arrivals.missing(self._number)
        names = (
            ", ".join(missing) if missing else "at least one participant (all had arrived: lost on the way)"
        )
        return LostPeerError(f"the update of {names} is missing: {reason}")


@dataclass(frozen=True, kw_only=True)
class SumRequest:
    """Hold the arguments of one `Exchange.start`, its number in the run, and the future of its outcome."""

    number: int
    vector: np.ndarray
    weight: float
    tensor_lengths: tuple[int, ...]
    bounds: np.ndarray | None = None
    label: str = ""
    state: bytes = b""
    future: "futures.Future[Outcome]" = field(default_factory=futures.Future)


class Exchange(ABC):
    """The exchanges of one participant, which run one after the other in a thread of their own.

    Subclasses give `_run`.
    """

    def __init__(self, transport: Transport, deadline_s: float, arrivals: ArrivalTracker | None = None):
        """Start the thread.

        Args:
            deadline_s: longest wait for the other participants to arrive at an exchange.
        """
        self._transport = transport
        self._deadline_s = deadline_s
        self._arrivals = arrivals or NoArrivalTracker()
        self._number = 0  # of the next exchange
        # One thread, so that exchanges run in the order of the calls. It is not an executor's: Python waits
        # for those when it ends, and this one may be waiting for a participant that is gone.
        self._requests: queue.SimpleQueue[SumRequest | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="exchange", daemon=True).start()

    @property
    def bytes_sent(self) -> int:
        """Bytes that this participant has sent to others since the start."""
        return self._transport.bytes_sent

    @property
    def max_wait_s(self) -> float:
        """Seconds that `Handle.wait` should wait at most: longer than the exchange itself, whose own error
        says more about what is missing.
        """
        return self._deadline_s

    def bounds_of(self, vector: np.ndarray, tensor_lengths: Sequence[int]) -> np.ndarray:
        """Return the norm bounds of an update, which participants sum exactly before they `start` its sum:
        [k] float64, none of them negative, k equal on all participants. The same vector has the same ones in
        every call.

        Empty for an exchange that needs none.

        Args:
            vector, tensor_lengths: as for `start`.
        """
        return np.zeros(0)

    def start(
        self,
        vector: np.ndarray,
        weight: float,
        tensor_lengths: Sequence[int] | None = None,
        *,
        bounds: np.ndarray | None = None,
        label: str = "",
        state: bytes = b"",
    ) -> Handle:
        """Begin an exchange.

        Args:
            vector: [n] float32 or float64, already multiplied by the weight; n and dtype equal on all
                participants. It must not change until `wait` returns.
            weight: this participant's share of the denominator; 0 with a zero vector for one that has nothing
                to contribute.
            tensor_lengths: lengths of the tensors that the vector consists of, equal on all participants;
                they sum to n. An exchange that carries numbers of limited range gives each of them a range of
                its own. None: one tensor.
            bounds: the sum of all participants' `bounds_of` the vector, equal on all; None: the exchange sums
                them itself, before the vector.
            label: what the sum is, such as "update of round 3": equal on all participants, and never given
                to another sum of the run. A float32 vector is summed under its label over one set of
                participants only; see `Outcome.skipped`.
            state: digest of the state that the vector was computed from, equal on all participants. The
                masked modes compare it before anything is sent.
        """
        lengths = (vector.size,) if tensor_lengths is None else tuple(tensor_lengths)
        if vector.dtype not in DTYPES or vector.ndim != 1:
            raise ValueError(
                f"an exchange takes a float32 or float64 vector, not {vector.dtype} {vector.shape}"
            )
        if sum(lengths) != vector.size:
            raise ValueError(f"tensors of {sum(lengths)} values together, in a vector of {vector.size}")
        request = SumRequest(
            number=self._number,
            vector=vector,
            weight=float(weight),
            tensor_lengths=lengths,
            bounds=bounds,
            label=label,
            state=state,
        )
        self._number += 1
        self._arrivals.arrive(request.number)
        self._requests.put(request)
        return Handle(request.future, request.number, self._arrivals)

    def share(self, vector: np.ndarray, priority: float) -> np.ndarray | None:
        """Return the vector of the participant with the highest priority, sent in the clear: for what is no
        secret, such as the state that a run goes on from. Not while an exchange is under way.

        Args:
            vector: the content on participants that have it; its length and dtype on all.
            priority: 0 on participants that have no content. Of equal priorities the first one counts. If all
                are 0, the result is None.

        Raises:
            LostPeerError: a participant is missing.
            FedSpeedError: somebody sends a priority that is negative or not finite.
        """
        priorities = self.gather(np.array([float(priority)]))[:, 0]
        _check_amounts("a priority", priorities)
        if not priorities.any():
            return None
        return self.share_from(int(priorities.argmax()), vector)

    def share_from(self, sender: int, vector: np.ndarray) -> np.ndarray:
        """Return the vector of one participant, sent in the clear, where all know beforehand whose it is:
        from the topology or the roster, not from what somebody claims. Not while an exchange is under way.

        Args:
            sender: number of the participant that sends, the same on all.
            vector: [n] the content on the sender; its length and dtype on all.

        Raises:
            LostPeerError: a participant is missing.
        """
        transport = self._transport
        if not 0 <= sender < transport.size:
            raise ValueError(f"participant {sender} is none of 0 to {transport.size - 1}")
        data = as_bytes(vector).copy()  # it may still be on its way to somebody when the caller goes on
        sizes = [data.size if i == sender else 0 for i in range(transport.size)]
        part: Payload = data if transport.rank == sender else b""
        try:
            arrived = transport.swap([part] * transport.size, sizes, self._deadline_s)
            return as_bytes(arrived[sender]).view(vector.dtype)
        except TransportError as error:
            raise LostPeerError(f"a participant is missing: {error}") from error

    def gather(self, own: np.ndarray) -> np.ndarray:
        """Return the vectors of all participants, sent in the clear: [participants, n]. Not while an exchange
        is under way.

        Args:
            own: [n]; its length and dtype are the same on all.

        Raises:
            LostPeerError: a participant is missing.
        """
        try:
            return all_gather(self._transport, own, self._deadline_s)
        except TransportError as error:
            raise LostPeerError(f"a participant is missing: {error}") from error

    @property
    def present(self) -> tuple[int, ...]:
        """Numbers of the participants that are left."""
        return tuple(range(self._transport.size))

    def swap(self, parts: Sequence[Payload], sizes: Sequence[int]) -> list[Payload]:
        """Exchange messages with the participants that are left, outside of a sum. Not while an exchange is
        under way.

        Args:
            parts, sizes: `parts[i]` is sent to participant `present[i]`, which sends `sizes[i]` bytes.

        Raises:
            PeersLost: some do not answer; with their places in `present`.
            TransportError: as `Transport.swap` does.
        """
        step = self._next_step()
        return swap_among(self._transport, self.present, parts, sizes, deadline_s=self._deadline_s, step=step)

    def _next_step(self) -> tuple[int, int]:
        """Return the (attempt, phase) of a swap outside of a sum, the same on all that are left."""
        return (0, 1)

    def _work(self) -> None:
        """Run exchanges until `close`."""
        while (request := self._requests.get()) is not None:
            try:
                request.future.set_result(self._run(request))
            except Exception as error:  # noqa: BLE001 - whoever waits gets it
                request.future.set_exception(error)

    @abstractmethod
    def _run(self, request: SumRequest) -> Outcome:
        """Make one exchange, in the thread of the exchanges."""

    def close(self) -> None:
        """End the thread, and close the transport."""
        self._requests.put(None)
        self._transport.close()


class PlainExchange(Exchange):
    """Sums in the clear, inside one trust domain.

    A vector is cut into one chunk for each participant. Each participant sums its chunk in participant order,
    in float64, and the summed chunks go to everyone. So all have the same bits, and each sends 2 (n-1)/n of a
    vector, whatever n; less if its float32 vector has runs of zeros, which are not sent (`zero_runs`).
    """

    def _run(self, request: SumRequest) -> Outcome:
        transport = self._transport
        vector = request.vector
        begin = time.perf_counter()
        length = -(-vector.size // transport.size)
        chunks = [vector[i * length : (i + 1) * length] for i in range(transport.size)]
        chunks = [
            np.pad(chunk, (0, length - chunk.size)) if chunk.size < length else chunk for chunk in chunks
        ]
        parts = [encode(chunk) if vector.dtype == np.float32 else as_bytes(chunk) for chunk in chunks]
        ready = time.perf_counter()
        heads = self._heads(request, [part.size for part in parts], length * vector.itemsize)
        arrived = time.perf_counter()
        due = (heads["words"].astype(np.int64) * WORD).tolist()
        total = np.zeros(length)
        for data in transport.swap(parts, due, self._deadline_s):
            total += decode(as_bytes(data), length, vector.dtype)
        whole = all_gather(transport, total.astype(vector.dtype), self._deadline_s).reshape(-1)[: vector.size]
        return Outcome(
            total=whole,
            weight=float(heads["weight"].sum()),
            idle_s=arrived - ready,
            exchange_s=time.perf_counter() - arrived + ready - begin,
            participants=transport.size,
        )

    def _weights(self, request: SumRequest) -> np.ndarray:
        """Return the weights of all participants [participants] float64, once all have reached the exchange;
        see `_heads`.
        """
        return self._heads(request, [0] * self._transport.size, 0)["weight"]

    def _heads(self, request: SumRequest, sizes: Sequence[int], most: int) -> np.ndarray:
        """Return what all participants announce [participants] HEAD, once all have reached the exchange.

        Args:
            sizes: bytes that this participant sends next, by receiver. most: that one may announce.

        Raises:
            FedSpeedError: they disagree on what is summed, or a weight or a number of bytes is invalid.
        """
        vector = request.vector
        own = (request.number, vector.size, DTYPES.index(vector.dtype), 0, request.weight)
        sent = np.array([own] * len(sizes), HEAD)
        sent["words"] = np.array(sizes) // WORD
        arrived = self._transport.swap(
            [as_bytes(head) for head in sent], [HEAD.itemsize] * len(sizes), self._deadline_s
        )
        heads = np.concatenate([as_bytes(data) for data in arrived]).view(HEAD)
        alike = ["number", "length", "dtype"]
        if any((heads[key] != sent[key]).any() for key in alike):
            rows = ", ".join(f"({n:.0f}, {length:.0f}, {dtype:.0f})" for n, length, dtype in heads[alike])
            raise FedSpeedError(
                f"participants disagree on the exchange: (number, length, dtype) are [{rows}]; "
                "all sites must run the same configuration and version"
            )
        _check_amounts("a weight", heads["weight"])
        larger = np.flatnonzero(heads["words"].astype(np.int64) * WORD > most)
        if larger.size:
            raise FedSpeedError(
                f"participant {larger[0]} announces more than the {most} bytes of a chunk, which is invalid; "
                "all must run the same version of FedSpeed"
            )
        return heads


def _check_amounts(name: str, amounts: np.ndarray) -> None:
    """Refuse amounts [participants] float64 that are negative or not finite.

    Raises:
        FedSpeedError: names the first participant that has sent one.
    """
    wrong = np.flatnonzero(~(np.isfinite(amounts) & (amounts >= 0)))
    if wrong.size:
        raise FedSpeedError(
            f"participant {wrong[0]} sends {name} of {amounts[wrong[0]]}, which is invalid; all must run the "
            "same version of FedSpeed"
        )
