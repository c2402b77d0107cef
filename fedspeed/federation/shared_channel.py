"""Messages between two participants, on all ranks of each: the gateway sends and receives, and passes what it
receives on to the participant's other ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load, save

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.gateway_call import gateway_result
from fedspeed.routing.channel import Channel

if TYPE_CHECKING:  # torch is not imported by modules that only pass a channel on
    from fedspeed.engine.client_engine import ClientEngine


class SharedChannel:
    """Carries messages between a method's server and its clients (`routing.channel.Channel`), separately from
    the exchange. All ranks of a participant call each method together.

    Args:
        engine: for collectives between the participant's own ranks. channel: of its gateway; None on its
            other ranks.

    Attributes:
        server: number of the participant that is the server.
        speakers: by client, the number of the participant whose gateway speaks for it.
        ranks: by client, how many ranks it has.
    """

    def __init__(
        self,
        engine: "ClientEngine",
        channel: Channel | None,
        *,
        server: int,
        speakers: Sequence[int],
        ranks: Sequence[int],
    ):
        self._engine = engine
        self._channel = channel
        self.server = server
        self.speakers = tuple(speakers)
        self.ranks = tuple(ranks)

    @property
    def bytes_sent(self) -> int:
        """Return the bytes of all messages that this rank has sent."""
        return 0 if self._channel is None else self._channel.bytes_sent

    def send(self, peer: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Send arrays by name to participant `peer`. Only the gateway's arrays are sent.

        Raises:
            LostPeerError: the peer, or this participant's gateway, is gone.
        """

        def send_arrays(channel: Channel) -> bytes:
            channel.send(peer, arrays)
            return b""

        self._on_gateway(send_arrays)

    def receive(self, peer: int) -> Arrays:
        """Wait for the next arrays that participant `peer` sends, of any types, and return them on all ranks.

        Raises:
            LostPeerError: nothing arrived within the deadline, or the peer or this participant's gateway is
                gone.
            FedSpeedError: the message is not a set of arrays.
        """
        return load(self._on_gateway(lambda channel: save(channel.receive(peer))))

    def _on_gateway(self, call: Callable[[Channel], bytes]) -> bytes:
        """Make a call on the gateway and return its result on all ranks. If it fails, all ranks raise."""
        channel = self._channel
        return gateway_result(
            self._engine,
            None if channel is None else partial(call, channel),
            "this rank's gateway could not speak with another participant",
        )
