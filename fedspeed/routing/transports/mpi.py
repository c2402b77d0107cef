"""Participants as ranks of an MPI job. The only module that imports mpi4py; buffer calls only, so nothing is ever unpickled."""

import time

import numpy as np
from mpi4py import MPI

from fedspeed.routing.transport import TransportError, as_bytes

MOST_BYTES = 1 << 30  # of one message; MPI counts in 32 bits
POLL_S = (0.0002, 0.01)  # MPI's own wait spins a core that training needs; sleeping between tests doubles from the first to the second


class MpiTransport:
    """All ranks of MPI.COMM_WORLD must construct it together; those that do not take part only answer `close`.

    Args:
        participants: world ranks that take part, the same list everywhere.
    """

    def __init__(self, participants: list[int]):
        world = MPI.COMM_WORLD
        takes_part = world.rank in participants
        self._world = world
        self._comm = world.Split(0 if takes_part else MPI.UNDEFINED, participants.index(world.rank) if takes_part else 0)
        self.rank = self._comm.rank if takes_part else -1
        self.size, self.bytes_sent = len(participants), 0

    def swap(self, parts, sizes, deadline_s, step=(0, 1)):
        data = [as_bytes(part) for part in parts]
        came = [np.empty(size, np.uint8) for size in sizes]
        came[self.rank] = data[self.rank]
        # One message for each pair: an all-to-all would need everything in one piece, and counts of more than 32 bits.
        requests = []
        for start in range(0, max(max(map(len, data)), *sizes), MOST_BYTES):
            piece = slice(start, start + MOST_BYTES)
            for peer in range(self.size):
                if peer != self.rank:
                    requests += [self._comm.Irecv(came[peer][piece], peer)] if len(came[peer][piece]) else []
                    requests += [self._comm.Isend(data[peer][piece], peer)] if len(data[peer][piece]) else []
        self._wait(requests, deadline_s)
        self.bytes_sent += sum(len(part) for peer, part in enumerate(data) if peer != self.rank)
        return came

    def _wait(self, requests, deadline_s):
        end, pause = time.monotonic() + deadline_s, POLL_S[0]
        try:
            while not MPI.Request.Testall(requests):
                if time.monotonic() > end:
                    raise TransportError(f"no answer within {deadline_s:.0f} s")
                time.sleep(pause)
                pause = min(2 * pause, POLL_S[1])
        except MPI.Exception as error:
            raise TransportError(f"MPI: {error}") from error

    def close(self):
        """Wait for the others: leaving MPI alone would spin a core in its finalisation until they come.

        Ranks without work may wait here for the whole run; what ends their wait early is mpirun, which ends every rank when one dies.
        """
        request = self._world.Ibarrier()
        while not request.Test():
            time.sleep(0.05)


def world_size() -> int:
    """1 where MPI was initialised outside an MPI job, whatever another launcher started."""
    return MPI.COMM_WORLD.size


def abort(code: int) -> None:
    """End every rank of the job with `code`: a rank that left quietly would let the others wait for their deadlines."""
    MPI.COMM_WORLD.Abort(code)
