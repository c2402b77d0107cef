"""Activations and gradients between ranks of a pipeline, sent and received beside the arithmetic.

DeepSpeed's own point-to-point calls wait for the other side and know neighbours only. Here a rank posts its
receives ahead, in the order in which the other one's stream sends; so nothing depends on tags, which NCCL
does not have.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from queue import SimpleQueue
from threading import Thread

import torch
from torch import distributed as dist

from fedspeed.engine.world import lost_connection
from fedspeed.errors import LostPeerError
from fedspeed.schedule.instructions import Kind, Send, Stream

AHEAD = 4  # receives of one kind from one rank that are posted before they are needed


class Routes:
    """The process groups that carry each kind in each direction, for as long as the engine lives. Collective
    over the world.

    Directions have groups of their own because a pair of ranks has one queue in each of NCCL's: receives
    posted ahead would stand before the sends that the other side waits for.
    """

    def __init__(self, deadline: timedelta, device: torch.device):
        ranks = dist.get_world_size()
        me = dist.get_rank()
        self._groups = {
            (kind, up): dist.new_group(list(range(ranks)), timeout=deadline)
            for kind in ("activation", "gradient")
            for up in (True, False)
        }
        self.deadline = deadline
        self._queue: SimpleQueue[tuple[object, Future]] = SimpleQueue()
        if device.type == "cpu":
            Thread(target=self._watch, daemon=True).start()
        self._watches = device.type == "cpu"
        # Connections are made by the first message of a pair, which waits for the other side: in an order
        # that all ranks know.
        for kind, source, to in (
            (kind, *pair)
            for a in range(ranks)
            for b in range(a + 1, ranks)
            for kind in ("activation", "gradient")
            for pair in ((a, b), (b, a))
        ):
            if me == source:
                dist.send(torch.zeros(1, device=device), to, group=self.group(kind, source, to))
            elif me == to:
                dist.recv(torch.zeros(1, device=device), source, group=self.group(kind, source, to))

    def group(self, kind: Kind, source: int, to: int):
        return self._groups[kind, source < to]

    def watched(self, work):
        """A send that knows when it is complete. Those of gloo do only when somebody has waited for them: a
        thread does.
        """
        if not self._watches:
            return work
        done: Future = Future()
        self._queue.put((work, done))
        return _Watched(done)

    def _watch(self) -> None:
        while True:
            work, done = self._queue.get()
            try:
                done.set_result(work.wait(self.deadline))
            except RuntimeError as error:
                done.set_exception(error)
            del work


class _Watched:
    def __init__(self, done: Future):
        self._done = done

    def is_completed(self) -> bool:
        return self._done.done()

    def wait(self, _deadline: timedelta) -> None:
        self._done.result()


@contextmanager
def naming_lost_ranks(what: str):
    """A rank that is lost in here is a LostPeerError that says in what."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostPeerError) or not lost_connection(error):
            raise
        raise LostPeerError(
            f"a rank of this pipeline was lost or silent: {str(error).splitlines()[0]} ({what}); the same "
            "command resumes from the "
            "journal"
        ) from error


class Transfers:
    """Of one pass.

    Args:
        streams: of all ranks. shape_of: of the activation of a micro-batch, known to all.

    `send` and `receive` raise LostPeerError, which names the other rank and what was waited for.
    """

    def __init__(
        self,
        routes: Routes,
        streams: Sequence[Stream],
        me: int,
        shape_of: Callable[[int], torch.Size],
        dtype: torch.dtype,
        *,
        device: torch.device,
    ):
        self._routes = routes
        self._me = me
        self._shape_of = shape_of
        self._dtype = dtype
        self._device = device
        self._due: dict[tuple[int, Kind], deque] = {}  # (source, kind) -> (micro, hop) not posted yet
        self._posted: dict[tuple[int, Kind], deque] = {}
        self._early: dict[
            tuple, torch.Tensor
        ] = {}  # (micro, kind, hop) -> what has come and was not asked for yet
        self._sends: deque = deque()
        for source, stream in enumerate(streams):
            for work in stream:
                if isinstance(work, Send) and work.to == me:
                    self._due.setdefault((source, work.kind), deque()).append((work.micro, work.hop))

    def begin(self) -> None:
        """Post the first receives."""
        for channel in self._due:
            self._posted[channel] = deque()
            self._post(channel)

    def _post(self, channel: tuple[int, Kind]) -> None:
        (source, kind) = channel
        due = self._due[channel]
        posted = self._posted[channel]
        while due and len(posted) < AHEAD:
            micro, hop = due.popleft()
            room = torch.empty(self._shape_of(micro), dtype=self._dtype, device=self._device)
            posted.append((
                micro,
                hop,
                room,
                self._guarded(
                    source, "receive", dist.irecv, room, source, self._routes.group(kind, source, self._me)
                ),
            ))

    def receive(self, micro: int, kind: Kind, hop: int, source: int) -> torch.Tensor:
        channel = (source, kind)
        wanted = (micro, kind, hop)
        while wanted not in self._early:  # what the other rank sent before has come before
            *which, room, work = self._posted[channel].popleft()
            self._guarded(source, f"{kind} {which[1]} of micro-batch {which[0]}", self._finished, work)
            self._early[which[0], kind, which[1]] = room
            self._post(channel)
        return self._early.pop(wanted)

    def send(self, tensor: torch.Tensor, micro: int, kind: Kind, hop: int, to: int) -> None:
        """Never waits: the other rank may post its receive only after something that it expects from here.
        What has left is let go.
        """
        tensor = tensor.contiguous()
        what = f"room for {kind} {hop} of micro-batch {micro}"
        work = self._guarded(to, what, dist.isend, tensor, to, self._routes.group(kind, self._me, to))
        self._sends.append((to, what, tensor, self._routes.watched(work)))
        while self._sends and self._sends[0][3].is_completed():
            self._settle()

    def finish(self) -> None:
        """Until all that was sent has left."""
        while self._sends:
            self._settle()

    def _settle(self) -> None:
        to, what, _, work = self._sends.popleft()
        self._guarded(to, what, self._finished, work)

    def _finished(self, work) -> None:
        work.wait(self._routes.deadline)

    def _guarded(self, other: int, what: str, function, *args):
        try:
            return function(*args)
        except RuntimeError as error:
            if not lost_connection(error):
                raise
            how = "was silent" if "imed out" in str(error) else "was lost"
            raise LostPeerError(
                f"rank {other} of this pipeline {how} while {what} was waited for: "
                f"{str(error).splitlines()[0]}"
            ) from error
