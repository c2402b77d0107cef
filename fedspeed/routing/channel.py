"""Messages from one participant to one other, beside the exchange that all make together: what split learning
needs.

A message is a set of named arrays in the safetensors format, so nothing that was received is ever executed.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.transport import Transport, TransportError


class Channel:
    """Point-to-point messages over a transport. Not while an exchange over the same transport is under way.

    Args:
        deadline_s: longest wait for a message to come, or to be taken.
        names: of all participants, for messages.
    """

    def __init__(self, transport: Transport, deadline_s: float, *, names: Sequence[str] = ()):
        self._transport, self._deadline_s, self._names = transport, deadline_s, tuple(names)

    @property
    def rank(self) -> int:
        """This participant's number."""
        return self._transport.rank

    @property
    def size(self) -> int:
        """How many participants there are."""
        return self._transport.size

    def send(self, peer: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Give participant `peer` some arrays by name.

        Raises:
            LostPeerError: the peer is gone.
        """
        data = bytearray(
            save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        )  # torch takes no read-only ones
        try:
            self._transport.send(peer, np.frombuffer(data, np.uint8), self._deadline_s)
        except TransportError as error:
            raise LostPeerError(f"{self._named(peer)} took no message: {error}") from error

    def receive(self, peer: int) -> dict[str, np.ndarray]:
        """Wait for the next arrays that participant `peer` sends.

        Raises:
            LostPeerError: nothing came within the deadline, or the peer is gone.
            FedSpeedError: what came is no set of arrays.
        """
        try:
            data = self._transport.receive(peer, self._deadline_s)
        except TransportError as error:
            raise LostPeerError(f"{self._named(peer)} sent no message: {error}") from error
        try:
            return load(data.tobytes())
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FedSpeedError(
                f"{self._named(peer)} sent a message that holds no arrays ({error}); all must run the same "
                "version "
                "of FedSpeed"
            ) from error

    def _named(self, peer: int) -> str:
        return self._names[peer] if self._names else f"participant {peer}"
