"""The execution of instruction streams against a model of time instead of on machines. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedspeed.schedule.instructions import Instruction, Load, Loaded, Receive, Release, Send, Step, Stream

COMPUTE = "compute"
SEND = "send"
WAIT = "wait"
LOAD = "load"
STEP = "step"
Message = tuple[int, int, str, int, int]  # receiver, sender, kind, hop, micro-batch


class Times(Protocol):
    """The seconds that instructions take."""

    @property
    def slots(self) -> int:
        """Return how many chunks fit on a device at the same time, if chunks are loaded."""
        ...

    def compute(self, work: Instruction, rank: int) -> float:
        """Return the seconds of an Embed, Forward, Head, Backward or Step."""
        ...

    def transfer(self, work: Send, rank: int) -> tuple[float, tuple[object, ...]]:
        """Return (seconds, links used); a link carries one transfer at a time."""
        ...

    def load(self, chunk: Loaded, rank: int) -> float:
        """Return the seconds of loading a chunk."""
        ...


@dataclass(frozen=True)
class Span:
    """The activity of a rank, or of a link for sends and loads, from `begin` to `end` [s]."""

    rank: int
    kind: str
    begin: float
    end: float
    name: str


@dataclass
class Timeline:
    """The activities of all ranks in a step."""

    ranks: int
    spans: list[Span] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the duration of the step."""
        return max((span.end for span in self.spans), default=0.0)

    def busy(self, rank: int) -> float:
        """Return the seconds in which a rank computes."""
        return sum(
            span.end - span.begin for span in self.spans if span.rank == rank and span.kind in (COMPUTE, STEP)
        )

    @property
    def bubble(self) -> float:
        """Return the share of all ranks' time in which they do not compute."""
        return 1 - sum(map(self.busy, range(self.ranks))) / (self.ranks * self.seconds) if self.spans else 0.0


class Deadlock(Exception):
    """Every rank that has instructions left waits for something that no rank will send."""


def execute(streams: Sequence[Stream], times: Times) -> Timeline:
    """Execute the streams of all ranks and return the timeline.

    Every rank executes its stream in order. A send begins when its links are free, and the rank continues
    meanwhile. Loads are prefetched one after the other in the order of the stream, each as soon as fewer than
    `slots` chunks are loaded.

    Raises:
        Deadlock: a Receive never gets its Send.
    """
    ranks = [_Rank(number, stream, times) for number, stream in enumerate(streams)]
    timeline = Timeline(len(streams))
    links_free: dict[object, float] = {}
    arrived: dict[Message, float] = {}
    while any(rank.left for rank in ranks):
        begin, number = min((rank.can_begin(arrived), rank.number) for rank in ranks if rank.left)
        if begin == float("inf"):
            raise Deadlock(
                "; ".join(f"rank {rank.number} waits in {rank.next}" for rank in ranks if rank.left)
            )
        rank = ranks[number]
        work = rank.next
        if isinstance(work, Send):
            seconds, taken = times.transfer(work, number)
            start = max([begin, *(links_free.get(link, 0.0) for link in taken)])
            links_free.update(dict.fromkeys(taken, start + seconds))
            arrived[work.to, number, work.kind, work.hop, work.micro] = start + seconds
            timeline.spans.append(Span(number, SEND, start, start + seconds, str(work)))
            rank.done(rank.now)
            continue
        if begin > rank.now:
            timeline.spans.append(Span(number, WAIT, rank.now, begin, str(work)))
        end = begin
        if not isinstance(work, Receive | Load | Release):
            end += times.compute(work, number)
            timeline.spans.append(
                Span(number, STEP if isinstance(work, Step) else COMPUTE, begin, end, str(work))
            )
        rank.done(end)
    for rank in ranks:
        timeline.spans += rank.loads
    return timeline


class _Rank:
    """The progress of one rank in its stream."""

    def __init__(self, number: int, stream: Stream, times: Times):
        self.number = number
        self._stream = stream
        self._at = 0
        self.now = 0.0
        self.loads: list[Span] = []
        self._times = times
        self._released: list[float] = []
        self._to_load = [work.chunk for work in stream if isinstance(work, Load)]
        self._ready: list[float] = []  # when each load ends, as far as its slot is known to be free
        self._loaded = 0  # loads that the stream has waited for
        self._plan_loads()

    @property
    def left(self) -> bool:
        """Tell whether instructions are left."""
        return self._at < len(self._stream)

    @property
    def next(self) -> Instruction:
        """Return the next instruction."""
        return self._stream[self._at]

    def can_begin(self, arrived: dict[Message, float]) -> float:
        """Return when the next instruction can begin; infinite until its input is sent or loaded."""
        work = self.next
        if isinstance(work, Receive):
            return max(
                self.now,
                arrived.get((self.number, work.source, work.kind, work.hop, work.micro), float("inf")),
            )
        if isinstance(work, Load):
            return (
                max(self.now, self._ready[self._loaded]) if self._loaded < len(self._ready) else float("inf")
            )
        return self.now

    def done(self, end: float) -> None:
        """Finish the next instruction."""
        work = self.next
        self.now = end
        self._at += 1
        if isinstance(work, Load):
            self._loaded += 1
        elif isinstance(work, Release):
            self._released.append(end)
            self._plan_loads()

    def _plan_loads(self) -> None:
        while (i := len(self._ready)) < len(self._to_load) and i - len(self._released) < self._times.slots:
            free = self._released[i - self._times.slots] if i >= self._times.slots else 0.0
            begin = max(free, self._ready[-1] if self._ready else 0.0)
            self._ready.append(begin + self._times.load(self._to_load[i], self.number))
            self.loads.append(
                Span(self.number, LOAD, begin, self._ready[-1], f"Load(chunk={self._to_load[i]})")
            )
