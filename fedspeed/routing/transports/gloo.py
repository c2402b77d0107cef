"""Participants as processes that share a TCP store: a gloo group of their own beside the clusters' torch worlds."""

from datetime import timedelta

import numpy as np
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

from fedspeed.errors import connection_text
from fedspeed.routing.transport import TransportError


class GlooTransport:
    """Trusts whoever reaches the store's port: for use inside one trust domain.

    Args:
        store: a torch.distributed store common to all participants, used under a prefix of its own.
        rank, size: this participant among the participants (not world ranks).
    """

    def __init__(self, store, rank: int, size: int, start_timeout_s: float):
        self.rank, self.size, self.bytes_sent = rank, size, 0
        try:
            self._group = ProcessGroupGloo(PrefixStore("gloo-transport", store), rank, size,
                                           timedelta(seconds=start_timeout_s))
        except RuntimeError as error:
            raise TransportError(f"the participants could not connect within {start_timeout_s:.0f} s ({connection_text(error)}); "
                                 "if a host has several network interfaces, set GLOO_SOCKET_IFNAME to the right one") from error

    def all_gather(self, mine, deadline_s):
        out = torch.empty((self.size, mine.size), dtype=torch.from_numpy(mine[:0]).dtype)
        options = AllgatherOptions()
        options.timeout = timedelta(seconds=deadline_s)
        self._wait(lambda: self._group.allgather([list(out.unbind())], [_tensor(mine)], options), deadline_s)
        self.bytes_sent += mine.nbytes * (self.size - 1)
        return out.numpy()

    def all_to_all(self, parts, deadline_s):
        sent = _tensor(np.concatenate(parts))
        out = torch.empty((self.size, parts[self.rank].size), dtype=sent.dtype)
        options = AllToAllOptions()
        options.timeout = timedelta(seconds=deadline_s)
        self._wait(lambda: self._group.alltoall_base(out.view(-1), sent, [out.shape[1]] * self.size, [p.size for p in parts], options),
                   deadline_s)
        self.bytes_sent += sum(p.nbytes for i, p in enumerate(parts) if i != self.rank)
        return out.numpy()

    def _wait(self, call, deadline_s):
        try:
            call().wait(timedelta(seconds=deadline_s))
        except RuntimeError as error:  # gloo has one kind for time-outs and broken connections
            raise TransportError(connection_text(error)) from error

    def close(self):
        self._group = None


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
