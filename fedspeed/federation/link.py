"""One rank's access to the exchange: the gateway takes part for its clients, and passes each result on to the
clients' other ranks.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedspeed.errors import LostPeerError, connection_text
from fedspeed.federation.gateway_call import gateway_result
from fedspeed.federation.layout import Layout
from fedspeed.routing.exchange import Exchange, Handle

if TYPE_CHECKING:  # torch is not imported by modules that only pass a link on
    from fedspeed.engine.client_engine import ClientEngine


@dataclass(frozen=True, kw_only=True)
class Sum:
    """Hold the result of an exchange, and its cost.

    Attributes:
        vector: the sum over all participants. weight: the sum of their weights.
        idle_s: seconds until the last participant had sent its vector. exchange_s: seconds of the transfer.
        participants: how many participants are in the sum.
        clipped: values, over all participants, that were beyond the range of the exchange.
        skipped: whether nothing was summed (`routing.exchange.Outcome`).
        bytes_sent: by this rank.
    """

    vector: np.ndarray
    weight: float
    idle_s: float
    exchange_s: float
    participants: int
    clipped: int
    skipped: bool
    bytes_sent: int


@dataclass(frozen=True)
class PendingSum:
    """A sum in progress.

    Attributes:
        vector: this rank's, which must not change meanwhile.
        handle: of the gateway's exchange; None on the clients' other ranks.
        sent_before: bytes that this rank's exchange had sent before it.
    """

    vector: np.ndarray
    handle: Handle | None
    sent_before: int


class ClientLink:
    """Connects one rank to the exchange between participants. All ranks of a client call each method
    together.

    Args:
        engine: for collectives between the client's own ranks.
        exchange: of the gateway; None on the client's other ranks.
        deadline_s: longest wait for the other participants.

    Attributes:
        bytes_shared: that this rank's exchange has sent in `share` since the start.
    """

    def __init__(self, engine: "ClientEngine", exchange: Exchange | None, deadline_s: float):
        self._engine = engine
        self._exchange = exchange
        self._deadline_s = deadline_s
        self.bytes_shared = 0

    def share(self, vector: np.ndarray, priority: float) -> np.ndarray | None:
        """Return the vector of the participant with the highest priority, on every rank of every client; None
        if no participant has a priority above 0. Sent in the clear.

        Raises:
            LostPeerError: a participant is missing.
        """
        shared = None
        if self._exchange is not None:
            before = self._exchange.bytes_sent
            shared = self._exchange.share(vector, priority)
            self.bytes_shared += self._exchange.bytes_sent - before
        if not self._engine.share_from_gateway(np.array([float(shared is not None)]))[0]:
            return None
        return self._engine.share_from_gateway(vector if shared is None else shared)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Return the values of all participants, on every rank of every client: [participants, n]. Sent in
        the clear.

        Args:
            values: [n], of the same length and dtype on all ranks; only the gateways' are used.

        Raises:
            LostPeerError: a participant is missing.
        """
        gathered = self._exchange.gather(values) if self._exchange is not None else None
        rows = int(self._engine.share_from_gateway(np.array([0 if gathered is None else len(gathered)]))[0])
        buffer = np.zeros((rows, values.size), values.dtype) if gathered is None else gathered
        return self._engine.share_from_gateway(buffer)

    def any_of_client(self, flag: bool) -> bool:
        """Return the gateway's flag on all ranks of the client. Collective over the client."""
        return bool(self._engine.share_from_gateway(np.array([float(flag)]))[0])

    def from_gateway(self, call: Callable[[], bytes], failed: str) -> bytes:
        """Make a call on the gateway, and return its result on all ranks of the client. Collective over the
        client.

        Args:
            failed: what the client's other ranks raise a LostPeerError with if the gateway's call fails.
        """
        return gateway_result(self._engine, None if self._exchange is None else call, failed)

    def arrays_from_gateway(self, arrays: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """Return the gateway's float32 arrays by name, of any shapes, on all ranks of the client.

        Args:
            arrays: of the gateway; None on the client's other ranks.
        """
        layout = None if arrays is None else Layout.of(arrays)
        text = b"" if layout is None else json.dumps([layout.names, layout.shapes]).encode()
        length = int(self._engine.share_from_gateway(np.array([len(text)], dtype=np.int64))[0])
        header = (
            np.frombuffer(text, dtype=np.uint8) if layout is not None else np.zeros(length, dtype=np.uint8)
        )
        names, shapes = json.loads(self._engine.share_from_gateway(header.copy()).tobytes())
        layout = Layout(tuple(names), tuple(map(tuple, shapes)))
        vector = np.zeros(layout.size, dtype=np.float32) if arrays is None else layout.flatten(arrays)
        return layout.unflatten(self._engine.share_from_gateway(vector))

    def bounds_of(self, vector: np.ndarray, segments: Sequence[int]) -> np.ndarray:
        """Return the norm bounds of the gateway's update (`Exchange.bounds_of`), on all ranks of the client:
        [k] float64. Collective over the client.

        Args:
            vector, segments: as for `start`.
        """
        bounds = None if self._exchange is None else self._exchange.bounds_of(vector, segments)
        size = int(self._engine.share_from_gateway(np.array([0 if bounds is None else bounds.size]))[0])
        return self._engine.share_from_gateway(np.zeros(size) if bounds is None else bounds)

    def sum(self, vector: np.ndarray, weight: float, *, label: str = "") -> Sum:
        """Return the sum over all participants, on every rank of every client. Only the gateways' vectors are
        used.

        Args:
            label: see `Exchange.start`.

        Raises:
            LostPeerError: a participant is missing.
        """
        return self.finish(self.start(vector, weight, label=label))

    def start(
        self,
        vector: np.ndarray,
        weight: float,
        segments: Sequence[int] | None = None,
        *,
        bounds: np.ndarray | None = None,
        label: str = "",
        state: bytes = b"",
    ) -> PendingSum:
        """Start a sum in the background. The vector must not change until `finish` returns.

        Args:
            segments: lengths of the consecutive segments of the vector that have ranges of their own, see
                `Exchange.start`.
            bounds, label, state: see `Exchange.start`.
        """
        exchange = self._exchange
        if exchange is None:
            return PendingSum(vector, None, 0)
        handle = exchange.start(vector, weight, segments, bounds=bounds, label=label, state=state)
        return PendingSum(vector, handle, exchange.bytes_sent)

    def finish(self, pending: PendingSum) -> Sum:
        """Wait for a sum that was started, and return it.

        Raises:
            LostPeerError: a participant, or this rank's gateway, is missing.
        """
        sent = 0
        failure = None
        header = np.zeros(7)
        total = np.zeros_like(pending.vector)
        if self._exchange is not None and pending.handle is not None:
            handle = pending.handle
            try:
                total, weight_sum = handle.wait(self._deadline_s)
                seconds = (handle.idle_s, handle.exchange_s)
                counts = (handle.participants, handle.clipped, handle.skipped)
                header = np.array([1.0, weight_sum, *seconds, *counts])
            except Exception as error:  # noqa: BLE001 - the client's other ranks are informed, then it is raised
                failure = error
            sent = self._exchange.bytes_sent - pending.sent_before
        try:
            # The header comes first: it says to the client's other ranks whether the exchange has failed.
            header = self._engine.share_from_gateway(header)
            if failure is not None:
                raise failure
            if not header[0]:
                raise LostPeerError(
                    "this client's gateway could not finish the exchange; its message says who is missing"
                )
            total = self._engine.share_from_gateway(total)
        except RuntimeError as error:  # the only type that torch raises for a lost connection
            reason = connection_text(error)
            raise LostPeerError(f"the gateway of this rank's client was lost: {reason}") from error
        weight, idle_s, exchange_s, participants, clipped, skipped = (float(value) for value in header[1:])
        return Sum(
            vector=total,
            weight=weight,
            idle_s=idle_s,
            exchange_s=exchange_s,
            participants=round(participants),
            clipped=round(clipped),
            skipped=bool(skipped),
            bytes_sent=sent,
        )
