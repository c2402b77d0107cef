"""Send and receive activations and gradients between ranks of a pipeline while they compute.

DeepSpeed's own point-to-point calls are synchronous and reach neighbours only. Here a rank posts its receives
ahead of time, in the order in which the other rank's stream sends. So nothing depends on tags, which NCCL
does not have.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from threading import Thread
from typing import Protocol, TypeVar

import torch
from torch import distributed as dist

from fedspeed.engine.world import lost_connection
from fedspeed.errors import LostPeerError
from fedspeed.schedule.instructions import Kind, Send, Stream

POSTED_RECEIVES = 4  # receives of one kind from one rank that are posted before they are needed
KINDS: tuple[Kind, ...] = ("activation", "gradient")

Result = TypeVar("Result")


class Work(Protocol):
    """Describe a transfer in progress."""

    def wait(self, timeout: timedelta, /) -> object: ...

    def is_completed(self) -> bool: ...


class Routes:
    """Process groups for each kind of transfer in each direction. Building them is collective over the world.

    Each direction has a group of its own, because NCCL has one queue per pair of ranks and group: receives
    that are posted ahead would block the sends that the other rank waits for.

    Attributes:
        deadline: how long a transfer may take.
    """

    def __init__(self, deadline: timedelta, device: torch.device):
        ranks = dist.get_world_size()
        rank = dist.get_rank()
        self._groups = {
            (kind, up): dist.new_group(list(range(ranks)), timeout=deadline)
            for kind in KINDS
            for up in (True, False)
        }
        self.deadline = deadline
        self._queue: SimpleQueue[tuple[Work, Future[object]]] = SimpleQueue()
        self._watches = device.type == "cpu"
        if self._watches:
            Thread(target=self._watch, daemon=True).start()
        # The first message of a pair opens the connection and waits for the other rank, so all ranks open
        # connections in the same order.
        for kind, source, to in (
            (kind, *pair)
            for a in range(ranks)
            for b in range(a + 1, ranks)
            for kind in KINDS
            for pair in ((a, b), (b, a))
        ):
            if rank == source:
                dist.send(torch.zeros(1, device=device), to, group=self.group(kind, source, to))
            elif rank == to:
                dist.recv(torch.zeros(1, device=device), source, group=self.group(kind, source, to))

    def group(self, kind: Kind, source: int, to: int) -> dist.ProcessGroup:
        """Return the group for transfers of a kind from one rank to another."""
        return self._groups[kind, source < to]

    def watched(self, work: Work) -> Work:
        """Return a handle that knows when a send is complete. With gloo a send completes only while a thread
        waits for it, so a thread does that.
        """
        if not self._watches:
            return work
        done: Future[object] = Future()
        self._queue.put((work, done))
        return _WatchedWork(done)

    def _watch(self) -> None:
        while True:
            work, done = self._queue.get()
            try:
                done.set_result(work.wait(self.deadline))
            except RuntimeError as error:
                done.set_exception(error)
            del work


class _WatchedWork:
    """A send that the watching thread waits for."""

    def __init__(self, done: Future[object]):
        self._done = done

    def is_completed(self) -> bool:
        return self._done.done()

    def wait(self, _timeout: timedelta, /) -> object:
        return self._done.result()


@contextmanager
def naming_lost_ranks(when: str) -> Iterator[None]:
    """Raise LostPeerError with a description of the moment if another rank is lost inside."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostPeerError) or not lost_connection(error):
            raise
        raise LostPeerError(
            f"a rank of this pipeline was lost or silent: {str(error).splitlines()[0]} ({when}); the same "
            "command resumes from the journal"
        ) from error


@dataclass
class _Posted:
    """A receive in progress."""

    micro: int
    hop: int
    buffer: torch.Tensor
    work: Work


@dataclass
class _Sent:
    """A send in progress, whose tensor must stay alive."""

    to: int
    what: str
    tensor: torch.Tensor
    work: Work


class Transfers:
    """The transfers of one pass. `send` and `receive` raise LostPeerError, which names the other rank and
    what was waited for.

    Args:
        streams: of all ranks.
        rank: this rank.
        shape_of: returns the shape of a micro-batch's activation.
        dtype: of activations and gradients.
    """

    def __init__(
        self,
        routes: Routes,
        streams: Sequence[Stream],
        rank: int,
        shape_of: Callable[[int], torch.Size],
        dtype: torch.dtype,
        *,
        device: torch.device,
    ):
        self._routes = routes
        self._rank = rank
        self._shape_of = shape_of
        self._dtype = dtype
        self._device = device
        # By (source, kind), the (micro-batch, hop) of receives that are not posted yet, and those that are.
        self._due: dict[tuple[int, Kind], deque[tuple[int, int]]] = {}
        self._posted: dict[tuple[int, Kind], deque[_Posted]] = {}
        # By (micro-batch, kind, hop), tensors that were received before they were needed.
        self._early: dict[tuple[int, Kind, int], torch.Tensor] = {}
        self._sends: deque[_Sent] = deque()
        for source, stream in enumerate(streams):
            for instruction in stream:
                if isinstance(instruction, Send) and instruction.to == rank:
                    due = self._due.setdefault((source, instruction.kind), deque())
                    due.append((instruction.micro, instruction.hop))

    def begin(self) -> None:
        """Post the first receives."""
        for channel in self._due:
            self._posted[channel] = deque()
            self._post(channel)

    def _post(self, channel: tuple[int, Kind]) -> None:
        source, kind = channel
        due = self._due[channel]
        posted = self._posted[channel]
        while due and len(posted) < POSTED_RECEIVES:
            micro, hop = due.popleft()
            buffer = torch.empty(self._shape_of(micro), dtype=self._dtype, device=self._device)
            group = self._routes.group(kind, source, self._rank)
            with self._naming(source, "receive"):
                work = dist.irecv(buffer, source, group)
            assert work is not None, "both ranks are members of the group"
            posted.append(_Posted(micro, hop, buffer, work))

    def receive(self, micro: int, kind: Kind, hop: int, source: int) -> torch.Tensor:
        """Wait for a tensor from another rank and return it."""
        channel = (source, kind)
        wanted = (micro, kind, hop)
        while wanted not in self._early:  # tensors arrive in the order in which they were sent
            first = self._posted[channel].popleft()
            with self._naming(source, f"{kind} {first.hop} of micro-batch {first.micro}"):
                first.work.wait(self._routes.deadline)
            self._early[first.micro, kind, first.hop] = first.buffer
            self._post(channel)
        return self._early.pop(wanted)

    def send(self, tensor: torch.Tensor, micro: int, kind: Kind, hop: int, to: int) -> None:
        """Start to send a tensor, without waiting: the other rank may post its receive only after it has
        received something from this rank. Tensors whose send is complete are released.
        """
        tensor = tensor.contiguous()
        what = f"room for {kind} {hop} of micro-batch {micro}"
        with self._naming(to, what):
            work = dist.isend(tensor, to, self._routes.group(kind, self._rank, to))
        assert work is not None, "both ranks are members of the group"
        self._sends.append(_Sent(to, what, tensor, self._routes.watched(work)))
        while self._sends and self._sends[0].work.is_completed():
            self._complete_first()

    def finish(self) -> None:
        """Wait until all sends are complete."""
        while self._sends:
            self._complete_first()

    def _complete_first(self) -> None:
        first = self._sends.popleft()
        with self._naming(first.to, first.what):
            first.work.wait(self._routes.deadline)

    @contextmanager
    def _naming(self, other: int, what: str) -> Iterator[None]:
        """Raise LostPeerError with the other rank and what was waited for if that rank is lost inside."""
        try:
            yield
        except RuntimeError as error:
            if not lost_connection(error):
                raise
            how = "was silent" if "imed out" in str(error) else "was lost"
            raise LostPeerError(
                f"rank {other} of this pipeline {how} while {what} was waited for: "
                f"{str(error).splitlines()[0]}"
            ) from error
