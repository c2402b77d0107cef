"""Participants as ranks of an MPI job. The only module that imports mpi4py. It makes buffer calls only, so
that nothing is ever unpickled.

Under `mpirun --with-ft mpi` (Open MPI 5, ULFM) a rank that dies costs the others its messages and nothing
else, because messages between two ranks need no third one. Otherwise mpirun ends the whole job.
"""

import time
from collections.abc import Sequence

import mpi4py
import numpy as np

from fedspeed.cluster.discover import mpi_is_fault_tolerant
from fedspeed.errors import FedSpeedError
from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.opening import TransportContext
from fedspeed.routing.transport import Payload, as_bytes
from fedspeed.routing.transports.frames import Crashed, Frame, FrameTransport, Gone, Header, Step

# MPI's finalisation has been seen to wait for dead ranks for ever.
mpi4py.rc.finalize = not mpi_is_fault_tolerant()

from mpi4py import MPI  # noqa: E402

_CALL_BYTES = 1 << 26  # of one call. MPI counts in 32 bits, and a content that nobody needs takes so much
# MPI's own wait spins on a core that training needs. We test and sleep instead; the sleep doubles from the
# first of these to the second.
POLL_S = (0.0002, 0.01)
_HEADER = 3  # int64: attempt, phase, bytes of the content


class MpiTransport(FrameTransport):
    """A transport over ranks of MPI.COMM_WORLD.

    All of them must construct it together; those that do not take part only call `close`.
    """

    def __init__(self, participants: list[int]):
        """Make a communicator of the participants: world ranks, the same list everywhere."""
        world = MPI.COMM_WORLD
        takes_part = world.rank in participants
        self._world = world
        self._comm = world.Split(
            0 if takes_part else MPI.UNDEFINED, participants.index(world.rank) if takes_part else 0
        )
        self._sending: dict[int, list[tuple[MPI.Request, np.ndarray]]] = {}
        super().__init__(self._comm.rank if takes_part else -1, len(participants))

    def swap(
        self, parts: Sequence[Payload], sizes: Sequence[int], deadline_s: float, step: Step = (0, 1)
    ) -> list[Payload]:
        """See `Transport.swap`."""
        end = time.monotonic() + deadline_s
        try:
            return super().swap(parts, sizes, deadline_s, step)
        finally:
            self._flush(end)

    def _flush(self, end: float) -> None:
        """Wait until large messages have left: they do so only during calls of MPI, and the next one of this
        rank may be far away.
        """
        for peer, sending in self._sending.items():
            try:
                self._wait(peer, [request for request, _ in sending], end)
            except Gone as gone:
                self._note(peer, gone)
        self._sending.clear()

    def send_frame(self, peer: int, frame: Frame, deadline_s: float) -> None:
        """See `FrameTransport.send_frame`. Pieces are joined: the receiver does not know their number."""
        header = np.array([*frame.step, frame.nbytes], np.int64)
        try:
            for buffer in (header, *_calls(as_bytes(frame.pieces))):
                self._sending.setdefault(peer, []).append((self._comm.Isend(buffer, peer), buffer))
        except MPI.Exception as error:
            raise Crashed(f"participant {peer}: {_reason(error)}") from error

    def receive_header(self, peer: int, end: float) -> Header:
        """See `FrameSource.receive_header`."""
        header = np.empty(_HEADER, np.int64)
        self._read(peer, [header], end)
        attempt, phase, nbytes = header.tolist()
        return Header((attempt, phase), nbytes)

    def receive_content(self, peer: int, nbytes: int, end: float) -> np.ndarray:
        """See `FrameSource.receive_content`."""
        content = BUFFERS.take(nbytes)
        self._read(peer, _calls(content), end)
        return content

    def discard_content(self, peer: int, nbytes: int, end: float) -> None:
        """See `FrameSource.discard_content`."""
        unneeded = np.empty(min(nbytes, _CALL_BYTES), np.uint8)
        while nbytes > 0:
            self._read(peer, [unneeded[:nbytes]], end)
            nbytes -= unneeded.size

    def _read(self, peer: int, buffers: Sequence[np.ndarray], end: float) -> None:
        """Fill buffers with the next calls of a peer, one each. Raises Gone if they do not come in time."""
        try:
            self._wait(peer, [self._comm.Irecv(buffer, peer) for buffer in buffers], end)
        except MPI.Exception as error:
            raise Crashed(f"participant {peer}: {_reason(error)}") from error

    def _wait(self, peer: int, requests: list[MPI.Request], end: float) -> None:
        """Wait for calls to end; cancel them at `end`. Raises Gone if they do not."""
        pause = POLL_S[0]
        try:
            while not MPI.Request.Testall(requests):
                if time.monotonic() > end:
                    for request in requests:
                        request.Cancel()
                    raise Gone(f"participant {peer} did not answer in time")
                time.sleep(pause)
                pause = min(2 * pause, POLL_S[1])
        except MPI.Exception as error:
            raise Crashed(f"participant {peer}: {_reason(error)}") from error

    def abort(self, code: int) -> None:
        """End every rank of the job with an exit code: if one rank just left, the others would wait for their
        deadlines.
        """
        self._world.Abort(code)

    def close(self) -> None:
        """Wait for the others: MPI's own finalisation would spin on a core until they come.

        Ranks without work may wait here for the whole run. What ends their wait early is mpirun, which ends
        every rank when one dies, or MPI itself where it survives that. If ranks were lost, there is nothing
        to wait for together.
        """
        if self._gone and mpi_is_fault_tolerant():
            return
        try:
            request = self._world.Ibarrier()
            while not request.Test():
                time.sleep(0.05)
        except MPI.Exception:
            if not mpi_is_fault_tolerant():
                raise


def _calls(content: np.ndarray) -> list[np.ndarray]:
    """Return what one call sends or receives each: sender and receiver cut at the same bytes."""
    return [content[start : start + _CALL_BYTES] for start in range(0, content.size, _CALL_BYTES)]


def _reason(error: MPI.Exception) -> str:
    return "its process is gone" if error.Get_error_class() == MPI.ERR_PROC_FAILED else f"MPI: {error}"


def open_transport(context: TransportContext) -> MpiTransport:
    """Build the transport; all ranks of the job call it together.

    Raises:
        FedSpeedError: MPI did not start these ranks. It sees one rank if it was initialised outside an MPI
            job, however many another launcher has started.
    """
    seen = MPI.COMM_WORLD.size
    if seen != context.world_size:
        raise FedSpeedError(
            f"routing.transport={context.asked}: MPI sees {seen} ranks, the launcher started "
            f"{context.world_size}; start with mpirun, or set routing.transport=gloo"
        )
    return MpiTransport(list(context.participants))
