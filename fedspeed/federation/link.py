"""A rank's way into the exchange: the gateway speaks for its client, the client's other ranks hear the
result from it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.errors import LostPeerError, connection_text
from fedspeed.federation.layout import Layout


@dataclass(frozen=True)
class Sum:
    """What an exchange gave, and what it cost: seconds of waiting for the last participant and of travelling,
    bytes this rank sent. clipped: values of all participants that were beyond what the exchange carries.
    """

    vector: np.ndarray
    weight: float
    idle_s: float
    exchange_s: float
    clipped: int
    bytes_sent: int


@dataclass(frozen=True)
class Started:
    """A sum under way; the handle is None on ranks that do not speak for their client."""

    vector: np.ndarray
    handle: object
    sent_before: int


class ClientLink:
    """Args:
    engine: for words between the client's own ranks.
    exchange: the gateway's exchange; None on the client's other ranks.
    deadline_s: longest wait for the other participants.
    """

    def __init__(self, engine, exchange, deadline_s: float):
        self._engine = engine
        self._exchange = exchange
        self._deadline_s = deadline_s

    def share(self, vector: np.ndarray, priority: float) -> np.ndarray | None:
        """What the participant with the highest priority says to every rank of every client, None if nobody
        has any. In the clear.

        Raises:
            LostPeerError: a participant is missing.
        """
        told = self._exchange.share(vector, priority) if self._exchange is not None else None
        if not self._engine.share_from_gateway(np.array([float(told is not None)]))[0]:
            return None
        return self._engine.share_from_gateway(vector if told is None else told)

    def gather(self, mine: np.ndarray) -> np.ndarray:
        """Return what every participant says to all, on every rank of every client: [participants, n]. In the
        clear.

        Args:
            mine: [n] of the gateway, which alone counts; its length and dtype are the same on all.

        Raises:
            LostPeerError: a participant is missing.
        """
        told = self._exchange.gather(mine) if self._exchange is not None else None
        rows = int(self._engine.share_from_gateway(np.array([0 if told is None else len(told)]))[0])
        own = np.zeros((rows, mine.size), mine.dtype) if told is None else told
        return self._engine.share_from_gateway(own)

    def any_of_client(self, found: bool) -> bool:
        """Return what the client's gateway has found, on all its ranks. Collective over the client."""
        return bool(self._engine.share_from_gateway(np.array([float(found)]))[0])

    def arrays_from_gateway(self, arrays: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """Return what the client's gateway has, on all its ranks: float32 arrays by name, of whatever shapes.

        Args:
            arrays: of the gateway; None on the client's other ranks.
        """
        layout = None if arrays is None else Layout.of(arrays)
        text = b"" if layout is None else json.dumps([layout.names, layout.shapes]).encode()
        length = int(self._engine.share_from_gateway(np.array([len(text)], dtype=np.int64))[0])
        told = np.frombuffer(text, dtype=np.uint8) if layout is not None else np.zeros(length, dtype=np.uint8)
        names, shapes = json.loads(self._engine.share_from_gateway(told.copy()).tobytes())
        layout = Layout(tuple(names), tuple(map(tuple, shapes)))
        vector = np.zeros(layout.size, dtype=np.float32) if arrays is None else layout.flatten(arrays)
        return layout.unflatten(self._engine.share_from_gateway(vector))

    def sum(self, vector: np.ndarray, weight: float) -> Sum:
        """Sum over all participants, known afterwards to every rank of every client. Only the gateway's
        vector counts.

        Raises:
            LostPeerError: a participant is missing.
        """
        return self.finish(self.start(vector, weight))

    def start(self, vector: np.ndarray, weight: float, parts: Sequence[int] | None = None) -> "Started":
        """Begin a sum that goes on beside what the caller does next. The vector must not change until
        `finish` returns.

        Args:
            parts: lengths of what belongs together in the vector, see `Exchange.start`.
        """
        if self._exchange is None:
            return Started(vector, None, 0)
        return Started(vector, self._exchange.start(vector, weight, parts), self._exchange.bytes_sent)

    def finish(self, started: "Started") -> Sum:
        """The sum that was started. Raises as `sum` does."""
        sent = 0
        failure = None
        head = np.zeros(5)
        total = np.zeros_like(started.vector)
        if self._exchange is not None:
            handle = started.handle
            try:
                total, weight_sum = handle.wait(self._deadline_s)
                head = np.array([1.0, weight_sum, handle.idle_s, handle.exchange_s, handle.clipped])
            except Exception as error:  # noqa: BLE001 - told to the client's other ranks, then raised
                failure = error
            sent = self._exchange.bytes_sent - started.sent_before
        try:
            # The head first: where the exchange has failed, the client's other ranks hear so from their
            # gateway.
            head = self._engine.share_from_gateway(head)
            if failure is not None:
                raise failure
            if not head[0]:
                raise LostPeerError(
                    "this client's gateway could not finish the exchange; its message says who is missing"
                )
            total = self._engine.share_from_gateway(total)
        except RuntimeError as error:  # torch's only kind for a lost connection
            reason = connection_text(error)
            raise LostPeerError(f"the gateway of this rank's client was lost: {reason}") from error
        weight, idle_s, exchange_s, clipped = (float(x) for x in head[1:])
        return Sum(total, weight, idle_s, exchange_s=exchange_s, clipped=round(clipped), bytes_sent=sent)
