"""Messages from one participant to another, outside of the exchange that all make together: split learning
needs them.

A message is a set of named arrays in the safetensors format, so nothing that was received is ever executed.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.config import DEFAULT_MESSAGE_MIB
from fedspeed.routing.transport import Transport, TransportError
from fedspeed.text_safety import quoted


class Channel:
    """Point-to-point messages over a transport, over which no exchange may be under way meanwhile."""

    def __init__(
        self,
        transport: Transport,
        deadline_s: float,
        *,
        names: Sequence[str] = (),
        max_bytes: int = DEFAULT_MESSAGE_MIB << 20,
    ):
        """Use a transport.

        Args:
            deadline_s: longest wait for a message to arrive, or to be taken.
            names: of all participants, for messages.
            max_bytes: of one message that arrives.
        """
        self._transport = transport
        self._deadline_s = deadline_s
        self._names = tuple(names)
        self._max_bytes = max_bytes
        self.bytes_sent = 0  # to all peers, in messages

    @property
    def rank(self) -> int:
        """The number of this participant."""
        return self._transport.rank

    @property
    def size(self) -> int:
        """How many participants there are."""
        return self._transport.size

    def send(self, peer: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Send participant `peer` some arrays by name.

        Raises:
            LostPeerError: the peer is gone.
        """
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        data = bytearray(save(contiguous))  # a copy that can be written to, since torch takes no other
        try:
            self._transport.send(peer, np.frombuffer(data, np.uint8), self._deadline_s)
            self.bytes_sent += len(data)
        except TransportError as error:
            raise LostPeerError(f"{self._name_of(peer)} took no message: {error}") from error

    def receive(self, peer: int) -> dict[str, np.ndarray]:
        """Wait for the next arrays that participant `peer` sends.

        Raises:
            LostPeerError: nothing arrived within the deadline, or the peer is gone.
            FedSpeedError: what arrived is no set of arrays.
        """
        try:
            data = self._transport.receive(peer, self._deadline_s, self._max_bytes)
        except TransportError as error:
            raise LostPeerError(
                f"{self._name_of(peer)} sent no message of up to {self._max_bytes >> 20} MiB "
                f"(routing.message_mib): {error}"
            ) from error
        try:
            return load(data.tobytes())
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FedSpeedError(
                f"{self._name_of(peer)} sent a message that holds no arrays ({quoted(error)}); all must run "
                "the same version of FedSpeed"
            ) from error

    def _name_of(self, peer: int) -> str:
        return self._names[peer] if self._names else f"participant {peer}"
