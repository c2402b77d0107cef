"""Participants as processes that share a TCP store: a gloo group of their own, besides the clusters' torch
worlds.
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store
from torch.distributed.distributed_c10d import AllToAllOptions

from fedspeed.errors import connection_text
from fedspeed.routing.opening import TransportContext
from fedspeed.routing.transport import Payload, TransportError, as_bytes

MESSAGE_TAG = 1
_MIN_WAIT_S = 0.001  # gloo takes a timeout of 0 for none


class _Work(Protocol):
    """A call of a process group that is under way."""

    def wait(self, timeout: timedelta) -> object: ...


class GlooTransport:
    """A transport that cannot go on once a participant is lost.

    It trusts whoever reaches the store's port or its own: it is for use inside one trust domain.
    """

    def __init__(self, store: Store, rank: int, size: int, start_timeout_s: float, *, interfaces: str):
        """Connect to the other participants.

        Args:
            store: common to all participants; used under a prefix of its own.
            rank, size: this participant among the participants (not world ranks).
            interfaces: names of the network interfaces to listen on, separated by commas.

        Raises:
            TransportError: somebody did not connect in time.
        """
        self.rank = rank
        self.size = size
        self.bytes_sent = 0
        # Any: torch's stubs leave out the options, and the methods that a process group inherits.
        gloo: Any = ProcessGroupGloo
        self._group: Any = None
        options = gloo._Options()
        options._timeout = timedelta(seconds=start_timeout_s)
        try:
            options._devices = [gloo.create_device(interface=name) for name in interfaces.split(",")]
            self._group = gloo(PrefixStore("gloo-transport", store), rank, size, options)
        except RuntimeError as error:
            raise TransportError(
                f"the participants could not connect within {start_timeout_s:.0f} s "
                f"({connection_text(error)}); if a host has several network interfaces, set "
                "GLOO_SOCKET_IFNAME to the right one"
            ) from error

    def swap(
        self,
        parts: Sequence[Payload],
        sizes: Sequence[int],
        deadline_s: float,
        step: tuple[int, int] = (0, 1),
    ) -> list[Payload]:
        """See `Transport.swap`."""
        end = time.monotonic() + deadline_s
        data = [as_bytes(part) for part in parts]
        outgoing = torch.from_numpy(np.concatenate(data))
        lengths = [part.size for part in data]
        incoming = torch.empty(sum(sizes), dtype=torch.uint8)
        options = AllToAllOptions()
        options.timeout = timedelta(seconds=deadline_s)
        self._wait(lambda: self._group.alltoall_base(incoming, outgoing, list(sizes), lengths, options), end)
        self.bytes_sent += outgoing.numel() - lengths[self.rank]
        return list(np.split(incoming.numpy(), np.cumsum(sizes)[:-1]))

    def send(self, peer: int, data: np.ndarray, deadline_s: float) -> None:
        """See `Transport.send`."""
        end = time.monotonic() + deadline_s
        data = as_bytes(data)
        for content in (np.array([data.size], np.int64).view(np.uint8), data):
            tensor = torch.from_numpy(content)
            self._wait(partial(self._group.send, [tensor], peer, MESSAGE_TAG), end)
        self.bytes_sent += data.size

    def receive(self, peer: int, deadline_s: float, max_bytes: int) -> np.ndarray:
        """See `Transport.receive`."""
        end = time.monotonic() + deadline_s
        header = torch.empty(8, dtype=torch.uint8)
        self._wait(lambda: self._group.recv([header], peer, MESSAGE_TAG), end)
        length = int(header.numpy().view(np.int64)[0])
        if not 0 <= length <= max_bytes:
            raise TransportError(
                f"participant {peer} announced a message of {length} bytes; at most {max_bytes} are accepted"
            )
        try:
            data = torch.empty(length, dtype=torch.uint8)
        except RuntimeError as error:
            raise TransportError(
                f"participant {peer} announced a message of {length} bytes, for which there is no memory"
            ) from error
        self._wait(lambda: self._group.recv([data], peer, MESSAGE_TAG), end)
        return data.numpy()

    def _wait(self, call: Callable[[], _Work], end: float) -> None:
        """Make a call and wait for it until `end`, a time of `time.monotonic`. Raises TransportError."""
        try:
            call().wait(timedelta(seconds=max(_MIN_WAIT_S, end - time.monotonic())))
        except RuntimeError as error:  # gloo raises the same for a timeout and a broken connection
            raise TransportError(connection_text(error)) from error

    def end_run(self) -> None:
        """See `Transport.end_run`."""

    def close(self) -> None:
        """See `Transport.close`."""
        self._group = None


def open_transport(context: TransportContext) -> GlooTransport:
    """Connect to the other participants of this job. Raises TransportError if one does not in time."""
    assert context.connect and context.interfaces, "the ranks of a job share a store"
    number = context.participants.index(context.me)
    size = len(context.participants)
    return GlooTransport(
        context.connect("exchange"), number, size, context.timeout_s, interfaces=context.interfaces()
    )
