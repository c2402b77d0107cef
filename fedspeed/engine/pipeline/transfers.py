"""Activations and gradients between ranks of a pipeline, sent and received beside the arithmetic.

DeepSpeed's own point-to-point calls wait for the other side and know neighbours only. Here a rank posts its receives ahead, in the order in which the
other one's stream sends; so nothing depends on tags, which NCCL does not have.
"""

from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch import distributed as dist

from fedspeed.engine.world import lost_connection
from fedspeed.errors import LostPeerError
from fedspeed.planner.pipeline.instructions import Kind, Send, Stream

AHEAD = 4  # receives of one kind from one rank that are posted before they are needed
SENDS = 32  # that may be under way before the oldest is waited for


class Routes:
    """The process groups that carry each kind, for as long as the engine lives. Collective over the world."""

    def __init__(self, deadline: timedelta):
        everyone = list(range(dist.get_world_size()))
        self.groups = {kind: dist.new_group(everyone, timeout=deadline) for kind in ("activation", "gradient")}
        self.deadline = deadline


class Transfers:
    """Of one pass.

    Args:
        streams: of all ranks. shape_of: of the activation of a micro-batch, known to all.

    `send` and `receive` raise LostPeerError, which names the other rank and what was waited for.
    """

    def __init__(self, routes: Routes, streams: Sequence[Stream], me: int, shape_of: Callable[[int], torch.Size], dtype: torch.dtype, device: torch.device):
        self._routes, self._shape_of, self._dtype, self._device = routes, shape_of, dtype, device
        self._due: dict[tuple[int, Kind], deque] = {}  # (source, kind) -> (micro, hop) not posted yet
        self._posted: dict[tuple[int, Kind], deque] = {}
        self._early: dict[tuple, torch.Tensor] = {}  # (micro, kind, hop) -> what has come and was not asked for yet
        self._sends: deque = deque()
        for source, stream in enumerate(streams):
            for work in stream:
                if isinstance(work, Send) and work.to == me:
                    self._due.setdefault((source, work.kind), deque()).append((work.micro, work.hop))
        for channel in self._due:
            self._posted[channel] = deque()
            self._post(channel)

    def _post(self, channel: tuple[int, Kind]) -> None:
        (source, kind), due, posted = channel, self._due[channel], self._posted[channel]
        while due and len(posted) < AHEAD:
            micro, hop = due.popleft()
            room = torch.empty(self._shape_of(micro), dtype=self._dtype, device=self._device)
            posted.append((micro, hop, room, self._guarded(source, "receive", dist.irecv, room, source, self._routes.groups[kind])))

    def receive(self, micro: int, kind: Kind, hop: int, source: int) -> torch.Tensor:
        channel, wanted = (source, kind), (micro, kind, hop)
        while wanted not in self._early:  # what the other rank sent before has come before
            *which, room, work = self._posted[channel].popleft()
            self._guarded(source, f"{kind} {which[1]} of micro-batch {which[0]}", self._finished, work)
            self._early[which[0], kind, which[1]] = room
            self._post(channel)
        return self._early.pop(wanted)

    def send(self, tensor: torch.Tensor, micro: int, kind: Kind, hop: int, to: int) -> None:
        tensor = tensor.contiguous()
        what = f"room for {kind} {hop} of micro-batch {micro}"
        self._sends.append((to, what, tensor, self._guarded(to, what, dist.isend, tensor, to, self._routes.groups[kind])))
        while len(self._sends) > SENDS:
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
            raise LostPeerError(f"rank {other} of this pipeline was lost while {what} was waited for: {str(error).splitlines()[0]}") from error
