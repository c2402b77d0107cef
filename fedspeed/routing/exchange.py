"""The exchange of a round: every participant gives a vector and a weight, and learns the sums.

There is no server process. A vector is cut into one chunk per participant; each participant sums its chunk in participant order, in
float64, and the summed chunks go to everyone. So all hold the same bits, and each sends 2 (n-1)/n of a vector, whatever n.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Protocol

import numpy as np

from fedspeed.errors import LostPeerError
from fedspeed.routing.transport import Transport, TransportError

DTYPES = (np.float32, np.float64)


class RollCall(Protocol):
    """Out-of-band knowledge of who has reached an exchange, used only to name the missing when one fails."""

    def arrive(self, tag: int) -> None: ...

    def missing(self, tag: int) -> list[str]: ...


class NoRollCall:
    """Knows nobody: the error says that someone is missing, not who."""

    def arrive(self, tag: int) -> None:
        pass

    def missing(self, tag: int) -> list[str]:
        return []


class Handle:
    """An exchange under way."""

    def __init__(self, future: Future, tag: int, roll: RollCall):
        self._future, self._tag, self._roll = future, tag, roll
        self.idle_s = 0.0      # seconds until the last participant had arrived
        self.exchange_s = 0.0  # seconds the vectors travelled

    def wait(self, deadline_s: float) -> tuple[np.ndarray, float]:
        """(sum of the vectors, sum of the weights).

        Raises:
            LostPeerError: some participant did not arrive or was lost on the way; names those that are known to be missing.
        """
        try:
            total, weight, self.idle_s, self.exchange_s = self._future.result(timeout=deadline_s)
            return total, weight
        except (FutureTimeout, TransportError) as error:
            missing = self._roll.missing(self._tag)
            names = ", ".join(missing) if missing else "at least one participant (all had arrived: lost on the way)"
            reason = f"no answer within {deadline_s:.0f} s" if isinstance(error, FutureTimeout) else str(error)
            raise LostPeerError(f"exchange {self._tag} is missing the update of {names}: {reason}") from error


class PlainExchange:
    """Sums in the clear, inside one trust domain."""

    def __init__(self, transport: Transport, deadline_s: float, roll: RollCall | None = None):
        self._transport, self._deadline_s, self._roll = transport, deadline_s, roll or NoRollCall()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="exchange")  # order of calls = order of exchanges
        self._tag = 0

    @property
    def bytes_sent(self) -> int:
        return self._transport.bytes_sent

    def start(self, vector: np.ndarray, weight: float) -> Handle:
        """Begin an exchange. The vector is already multiplied by the weight; it must not change until `wait` returns.

        Args:
            vector: [n] float32 or float64; n and dtype equal on all participants.
            weight: this participant's share of the denominator; 0 with a zero vector for one that has nothing to give.
        """
        if vector.dtype not in DTYPES or vector.ndim != 1:
            raise ValueError(f"an exchange takes a float32 or float64 vector, not {vector.dtype} {vector.shape}")
        tag = self._tag
        self._tag += 1
        self._roll.arrive(tag)
        return Handle(self._worker.submit(self._run, tag, vector, float(weight)), tag, self._roll)

    def _run(self, tag: int, vector: np.ndarray, weight: float):
        transport, begin = self._transport, time.perf_counter()
        head = np.array([tag, vector.size, DTYPES.index(vector.dtype), weight])
        heads = transport.all_gather(head, self._deadline_s)
        arrived = time.perf_counter()
        if (heads[:, :3] != head[:3]).any():
            raise ValueError("participants disagree on the exchange: (tag, length, dtype) are "
                             f"{[tuple(int(x) for x in h[:3]) for h in heads]}; all sites must run the same configuration and version")
        chunk = -(-vector.size // transport.size)
        parts = [vector[i * chunk:(i + 1) * chunk] for i in range(transport.size)]
        parts = [np.pad(p, (0, chunk - p.size)) if p.size < chunk else p for p in parts]
        mine = transport.all_to_all(parts, self._deadline_s)
        total = np.zeros(chunk)
        for part in mine:
            total += part
        whole = transport.all_gather(total.astype(vector.dtype), self._deadline_s).reshape(-1)[:vector.size]
        return whole, float(heads[:, 3].sum()), arrived - begin, time.perf_counter() - arrived

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._transport.close()
