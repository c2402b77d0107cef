"""Participants as processes that share a TCP store: a gloo group of their own beside the clusters' torch
worlds.
"""

import time
from datetime import timedelta

import numpy as np
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo
from torch.distributed.distributed_c10d import AllToAllOptions

from fedspeed.errors import connection_text
from fedspeed.routing.opening import TransportContext
from fedspeed.routing.transport import TransportError, as_bytes
from fedspeed.routing.transports.frames import MAX_BYTES

MESSAGE_TAG = 1
_MIN_S = 0.001  # gloo waits for ever where a wait has no millisecond


class GlooTransport:
    """Cannot go on once a participant is lost. Trusts whoever reaches the store's port: for use inside one
    trust domain.

    Args:
        store: a torch.distributed store common to all participants, used under a prefix of its own.
        rank, size: this participant among the participants (not world ranks).
    """

    def __init__(self, store, rank: int, size: int, start_timeout_s: float):
        self.rank = rank
        self.size = size
        self.bytes_sent = 0
        try:
            self._group = ProcessGroupGloo(
                PrefixStore("gloo-transport", store), rank, size, timedelta(seconds=start_timeout_s)
            )
        except RuntimeError as error:
            raise TransportError(
                f"the participants could not connect within {start_timeout_s:.0f} s "
                f"({connection_text(error)}); if a host has several network interfaces, set "
                "GLOO_SOCKET_IFNAME to the right one"
            ) from error

    def swap(self, parts, sizes, deadline_s, step=(0, 1)):
        data = [as_bytes(part) for part in parts]
        sent = torch.from_numpy(np.concatenate(data))
        lengths = [part.size for part in data]
        out = torch.empty(sum(sizes), dtype=torch.uint8)
        options = AllToAllOptions()
        options.timeout = timedelta(seconds=deadline_s)
        self._wait(
            lambda: self._group.alltoall_base(out, sent, list(sizes), lengths, options),
            time.monotonic() + deadline_s,
        )
        self.bytes_sent += sent.numel() - lengths[self.rank]
        return np.split(out.numpy(), np.cumsum(sizes)[:-1])

    def send(self, peer, data, deadline_s):
        end = time.monotonic() + deadline_s
        data = as_bytes(data)
        for content in (np.array([data.size], np.int64).view(np.uint8), data):
            tensor = torch.from_numpy(content)
            self._wait(lambda tensor=tensor: self._group.send([tensor], peer, MESSAGE_TAG), end)
        self.bytes_sent += data.size

    def receive(self, peer, deadline_s):
        end = time.monotonic() + deadline_s
        head = torch.empty(8, dtype=torch.uint8)
        self._wait(lambda: self._group.recv([head], peer, MESSAGE_TAG), end)
        length = int(head.numpy().view(np.int64)[0])
        if not 0 <= length <= MAX_BYTES:
            raise TransportError(
                f"participant {peer} announced a message of {length} bytes; one has at most {MAX_BYTES}"
            )
        try:
            data = torch.empty(length, dtype=torch.uint8)
        except RuntimeError as error:
            raise TransportError(
                f"participant {peer} announced a message of {length} bytes, for which there is no memory"
            ) from error
        self._wait(lambda: self._group.recv([data], peer, MESSAGE_TAG), end)
        return data.numpy()

    def _wait(self, call, end):
        """Wait for what a call begins, until a time of `time.monotonic`. Raises: TransportError."""
        try:
            call().wait(timedelta(seconds=max(_MIN_S, end - time.monotonic())))
        except RuntimeError as error:  # gloo has one kind for time-outs and broken connections
            raise TransportError(connection_text(error)) from error

    def close(self):
        self._group = None


def open_transport(context: TransportContext) -> GlooTransport:
    """Connect to the other participants of this job. Raises TransportError: somebody did not come."""
    place = context.participants.index(context.me)
    size = len(context.participants)
    return GlooTransport(context.connect("exchange"), place, size, context.timeout_s)
