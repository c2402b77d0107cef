"""Streams, events and deferred work of the fake accelerator, and what is known of memory."""

import weakref
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tests.fake_cuda.accelerator import FakeCuda


class Line:
    """A sequence of operations: of a stream or of a host thread.

    `clock` is its vector clock: line number -> how many steps of that line are known to have happened.
    """

    def __init__(self, name: str, number: int):
        self.name = name
        self.number = number
        self.clock: dict[int, int] = {number: 0}

    def learn(self, clock: dict[int, int]) -> None:
        for number, epoch in clock.items():
            if self.clock.get(number, 0) < epoch:
                self.clock[number] = epoch

    def tick(self) -> None:
        self.clock[self.number] += 1


class FakeStream(Line):
    def __init__(self, fake: "FakeCuda", device=None, priority=0, name: str = ""):
        number = fake.new_number()
        super().__init__(name or f"stream {number}", number)
        self._fake = fake
        self.queue: deque[Node] = deque()  # what is deferred; always empty in the default stream
        fake.streams.append(self)

    def wait_event(self, event: "FakeEvent") -> None:
        self._fake.wait(self, event)

    def wait_stream(self, other: "FakeStream") -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: "FakeEvent | None" = None) -> "FakeEvent":
        event = event or FakeEvent(self._fake)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def query(self) -> bool:
        return not self.queue


class FakeEvent:
    """An event as CUDA's: if recorded again, it represents the later moment."""

    def __init__(self, fake: "FakeCuda", enable_timing: bool = False, **_):
        self._fake = fake
        self._timing = enable_timing
        self.clock: dict[int, int] = {}
        self.node: Node | None = None  # what must have been done
        self._ms: list[float] = []

    def record(self, stream: FakeStream | None = None) -> None:
        stream = stream or self._fake.current_stream()
        with self._fake.lock:
            self._fake.launch(stream)
            self.clock = dict(stream.clock)
            self._ms = []
            self.node = self._fake.after(stream, partial(self._stamp, self._ms))

    def _stamp(self, ms: list[float]) -> None:
        ms.append(self._fake.ms)

    def wait(self, stream: FakeStream | None = None) -> None:
        self._fake.wait(stream or self._fake.current_stream(), self)

    def synchronize(self) -> None:
        with self._fake.lock:
            self._fake.run(self.node)
            self._fake.stops.append("synchronize")
            self._fake.host().learn(self.clock)

    def query(self) -> bool:
        with self._fake.lock:
            done = self.node is None or self.node.done
            if done:
                self._fake.host().learn(self.clock)
            return done

    def elapsed_time(self, end: "FakeEvent") -> float:
        """Milliseconds of the fake's own time: each copy takes one. As CUDA, it refuses events that are not
        over for this thread.
        """
        known = self._fake.host().clock
        for event in (self, end):
            if not event._timing or not event._ms:
                raise RuntimeError("an event without timing, or that has not been recorded or is not over")
            if any(known.get(number, 0) < epoch for number, epoch in event.clock.items()):
                raise RuntimeError("device not ready: nobody has waited for this event")
        return end._ms[0] - self._ms[0]


@dataclass(eq=False)
class Node:
    """A deferred action of a stream."""

    stream: FakeStream
    action: object
    deps: list["Node"] = field(default_factory=list)
    parts: list["Part"] = field(default_factory=list)
    done: bool = False


class Part:
    """A tensor that a deferred copy needs; its memory is kept only where a GPU's allocator would keep it."""

    def __init__(self, tensor: torch.Tensor, record: "Record", stream: FakeStream):
        storage = tensor.untyped_storage()
        self.record = record
        self._ref = weakref.ref(storage)
        self._strong = None
        self._shape = (tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if record.kind == "pinned" or stream in (record.stream, *record.also):
            self.keep()

    def keep(self) -> None:
        self._strong = self._ref()

    def tensor(self) -> torch.Tensor | None:
        storage = self._ref()
        if storage is None:
            return None
        dtype, *place = self._shape
        return torch.empty(0, dtype=dtype).set_(storage, *place)


@dataclass(eq=False)
class Record:
    """The history of a storage.

    Attributes:
        kind: "device", "pinned" (by torch, whose allocator waits for copies before it gives the memory out
        again) or "host".
        stream: in which it was made.
        also: streams that its freeing waits for (record_stream).
        spans: (start, end) in bytes -> [last write, {line: read}], each (line number, epoch, operation).
    """

    ref: object
    kind: str
    stream: FakeStream
    nbytes: int
    also: set = field(default_factory=set)
    spans: dict = field(default_factory=dict)
