"""Instruction streams executed against a model of time instead of on machines. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedspeed.schedule.instructions import Instruction, Load, Receive, Release, Send, Step, Stream

COMPUTE = "compute"
SEND = "send"
WAIT = "wait"
LOAD = "load"
STEP = "step"


class Times(Protocol):
    """How long things take. `slots`: chunks that fit on a device at a time, where chunks are loaded."""

    slots: int

    def compute(self, work: Instruction, rank: int) -> float:
        """Seconds of an Embed, Forward, Head, Backward or Step."""
        ...

    def transfer(self, work: Send, rank: int) -> tuple[float, tuple[object, ...]]:
        """(seconds, the links it takes, each of which carries one transfer at a time)."""
        ...

    def load(self, chunk: int, rank: int) -> float: ...


@dataclass(frozen=True)
class Span:
    """What a rank (or, for sends and loads, a link beside it) did from `begin` to `end`, in seconds."""

    rank: int
    kind: str
    begin: float
    end: float
    name: str


@dataclass
class Timeline:
    ranks: int
    spans: list[Span] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return max((span.end for span in self.spans), default=0.0)

    def busy(self, rank: int) -> float:
        """Seconds in which a rank computed."""
        return sum(
            span.end - span.begin for span in self.spans if span.rank == rank and span.kind in (COMPUTE, STEP)
        )

    @property
    def bubble(self) -> float:
        """Part of all ranks' time in which they did not compute."""
        return 1 - sum(map(self.busy, range(self.ranks))) / (self.ranks * self.seconds) if self.spans else 0.0


class Deadlock(Exception):
    """Every rank that has something left to do waits for what nobody will send."""


def execute(streams: Sequence[Stream], times: Times) -> Timeline:
    """Every rank goes through its stream in order. A send begins when its links are free, and the rank goes
    on meanwhile. Loads are fetched one after the other in the order of the stream, each as soon as fewer than
    `slots` chunks are held.

    Raises:
        Deadlock: a Receive without its Send before it.
    """
    ranks = [_Rank(number, stream, times) for number, stream in enumerate(streams)]
    line = Timeline(len(streams))
    links = {}
    arrived = {}
    while any(rank.left for rank in ranks):
        able = [(rank.can_begin(arrived), rank.number) for rank in ranks if rank.left]
        begin, number = min(able)
        if begin == float("inf"):
            raise Deadlock(
                "; ".join(f"rank {rank.number} waits in {rank.next}" for rank in ranks if rank.left)
            )
        rank = ranks[number]
        work = rank.next
        if isinstance(work, Send):
            seconds, taken = times.transfer(work, number)
            start = max([begin, *(links.get(link, 0.0) for link in taken)])
            links.update(dict.fromkeys(taken, start + seconds))
            arrived[work.to, number, work.kind, work.hop, work.micro] = start + seconds
            line.spans.append(Span(number, SEND, start, start + seconds, str(work)))
            rank.done(rank.now)
            continue
        if begin > rank.now:
            line.spans.append(Span(number, WAIT, rank.now, begin, str(work)))
        end = begin
        if not isinstance(work, Receive | Load | Release):
            end += times.compute(work, number)
            line.spans.append(
                Span(number, STEP if isinstance(work, Step) else COMPUTE, begin, end, str(work))
            )
        rank.done(end)
    for rank in ranks:
        line.spans += rank.loads
    return line


class _Rank:
    def __init__(self, number: int, stream: Stream, times: Times):
        self.number = number
        self._stream = stream
        self._at = 0
        self.now = 0.0
        self.loads: list[Span] = []
        self._times = times
        self._released = []
        self._to_load = [work.chunk for work in stream if isinstance(work, Load)]
        self._ready: list[float] = []  # when the loads that could be planned so far have come
        self._loaded = 0  # of them, how many the stream has waited for
        self._plan_loads()

    @property
    def left(self) -> bool:
        return self._at < len(self._stream)

    @property
    def next(self) -> Instruction:
        return self._stream[self._at]

    def can_begin(self, arrived: dict) -> float:
        """When the next instruction can begin, infinite while what it needs is not under way."""
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
