"""A participant's way to one other, on all of its ranks: its gateway speaks, and all of them hear what
came.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load, save

from fedspeed.errors import LostPeerError, connection_text
from fedspeed.federation.arrays import Arrays
from fedspeed.routing.channel import Channel

if TYPE_CHECKING:  # torch stays away from whoever only gives it on
    from fedspeed.engine.client_engine import ClientEngine


class SharedChannel:
    """Carries messages between a method's server and its clients (`routing.channel.Channel`), beside the
    exchange. All ranks of a participant call it alike.

    Args:
        engine: for words between the participant's own ranks. channel: of its gateway; None on the others.

    Attributes:
        server: number of the participant that is the server. speakers: by client, the number of the one that
            speaks for it.
    """

    def __init__(
        self, engine: "ClientEngine", channel: Channel | None, *, server: int, speakers: Sequence[int]
    ):
        self._engine = engine
        self._channel = channel
        self.server, self.speakers = server, tuple(speakers)

    def send(self, peer: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Give participant `peer` some arrays by name: those of this participant's gateway, alone.

        Raises:
            LostPeerError: the peer, or this participant's gateway, is gone.
        """

        def speak(channel: Channel) -> bytes:
            channel.send(peer, arrays)
            return b""

        self._from_gateway(speak)

    def receive(self, peer: int) -> Arrays:
        """Wait for the next arrays that participant `peer` sends, of whatever types, and return them on all
        ranks of this one.

        Raises:
            LostPeerError: nothing came within the deadline, or the peer or this participant's gateway is
                gone.
            FedSpeedError: what came is no set of arrays.
        """
        return load(self._from_gateway(lambda channel: save(channel.receive(peer))))

    def _from_gateway(self, speak: Callable[[Channel], bytes]) -> bytes:
        """Let the gateway speak, and return what came of it on all ranks. Where it fails, they hear so
        too.
        """
        failure = None
        said = b""
        if self._channel is not None:
            try:
                said = speak(self._channel)
            except Exception as error:  # noqa: BLE001 - told to the participant's other ranks, then raised
                failure = error
        length = len(said) if failure is None else -1
        try:
            length = int(self._engine.share_from_gateway(np.array([length], dtype=np.int64))[0])
            if failure is not None:
                raise failure
            if length < 0:
                raise LostPeerError(
                    "this rank's gateway could not speak with another participant; its message says more"
                )
            if length == 0:
                return b""
            own = said if self._channel is not None else bytes(length)
            return self._engine.share_from_gateway(np.frombuffer(bytearray(own), np.uint8)).tobytes()
        except RuntimeError as error:  # torch's only kind for a lost connection
            raise LostPeerError(f"the gateway of this rank was lost: {connection_text(error)}") from error
