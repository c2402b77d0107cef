"""An accelerator that is none: the order of streams, events and host threads as on a card, while every tensor
stays on the CPU.

    with fake_cuda(seed) as fake:
        ...  # get_accelerator() is the fake: streams, events, pinned memory
    assert fake.races == []

It finds errors of order in two ways. Vector clocks: two accesses to the same bytes, of which one writes, by
streams or host threads that nothing has put in order are a race, however the run went; so is memory that is
freed while another stream may still use it. Deferred copies: what is copied in a stream other than the
    default
one is copied later, at random moments, but not before what its stream waited for, and at the latest when
somebody waits for it; so a wait that is missing gives wrong numbers. (A copy that comes too early is shown by
the
clocks only: what the default stream does is done at once.)

What is memory of the device and what of the host, nothing but their history tells, since all of it is on the
CPU:
- made by an operation: of the device, and of the stream in which the operation ran;
- pinned (`pin_memory`, or registered with the driver): of the host, and copied without waiting where
  `non_blocking` says so;
- made outside torch's operations (numpy, mapped files): plain memory of the host, with which every copy
  waits.
"""

import random
import threading
import traceback
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

CHANCES = (
    0.0,
    0.003,
    0.03,
    0.3,
)  # that an operation is followed by a deferred copy; one of them for each schedule
OUT_OF_MEMORY = 2  # CUDA's own number
ALREADY_REGISTERED, NOT_REGISTERED = 712, 713  # CUDA's own numbers
WAITING_OPS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
)  # the host waits for what they give


class Line:
    """Things that happen one after the other: a stream's or a host thread's. `clock` says how much of every
    line is known to have happened.
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
    """Recorded again, it stands for the later moment, as CUDA's do."""

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
    """Something deferred."""

    stream: FakeStream
    action: object
    deps: list["Node"] = field(default_factory=list)
    parts: list["Part"] = field(default_factory=list)
    done: bool = False


class Part:
    """A tensor that a deferred copy needs. Its memory is kept for it only where a card's allocator would."""

    def __init__(self, tensor: torch.Tensor, record: "Record", stream: FakeStream):
        storage = tensor.untyped_storage()
        self.record, self._ref, self._strong = record, weakref.ref(storage), None
        self._shape = tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
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
    """What is known of a storage.

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


class FakeCuda(CPU_Accelerator):
    """See the module's docstring.

    Attributes:
        races: sentences, one a race.
        copies: deferred copies that have been made. ms: the fake's own time, one for each copy.
        registered: address -> bytes of memory that is registered with the driver, which registers
        `lockable_bytes` (None: all).
    """

    def __init__(
        self,
        seed: int = 0,
        chance: float | None = None,
        total_bytes: int = 1 << 30,
        lockable_bytes: int | None = None,
    ):
        super().__init__()
        self.lock = threading.RLock()
        self.races: list[str] = []
        self.stops: list[str] = []
        self.streams: list[FakeStream] = []
        self.registered: dict[int, int] = {}
        self.copies = 0
        self.ms = 0.0
        self._numbers = 0
        self._total = total_bytes
        self._lockable = lockable_bytes
        self._records: dict[int, Record] = {}
        self._line_names: dict[int, str] = {}
        self.reseed(seed, chance)
        self._local = threading.local()
        self._now = 0
        self._peak = 0
        self._default = FakeStream(self, name="the default stream")
        self._gathers = FakeStream(self, name="the collectives' stream")
        self.open = True

    def reseed(self, seed: int, chance: float | None = None) -> None:
        """Begin another schedule.

        Args:
            chance: that an operation is followed by a deferred copy; None: drawn too.
        """
        self._random = random.Random(seed)
        self._chance = self._random.choice(CHANCES) if chance is None else chance

    # What DeepSpeed's accelerators have.

    def is_synchronized_device(self):
        return False

    @property
    def Stream(self):
        return partial(FakeStream, self)

    @property
    def Event(self):
        return partial(FakeEvent, self)

    def current_stream(self, device_index=None):
        return getattr(self._local, "stream", None) or self._default

    def default_stream(self, device_index=None):
        return self._default

    @contextmanager
    def stream(self, stream: FakeStream | None):
        before = getattr(self._local, "stream", None)
        with self.watching():
            self._local.stream = stream or before
            try:
                yield
            finally:
                self._local.stream = before

    def synchronize(self, device_index=None):
        for stream in self.streams:
            stream.synchronize()

    def pin_memory(self, tensor, make_copy=True, match_shape=True):
        return self.pinned_copy(tensor)

    def total_memory(self, device_index=None):
        return self._total

    def available_memory(self, device_index=None):
        return self._total - self._now

    def memory_allocated(self, device_index=None):
        return self._now

    memory_reserved = memory_cached = memory_allocated

    def max_memory_allocated(self, device_index=None):
        return self._peak

    max_memory_reserved = max_memory_cached = max_memory_allocated

    def reset_peak_memory_stats(self, device_index=None):
        self._peak = self._now

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

    def memory_stats(self, device_index=None):
        return {"allocated_bytes.all.current": self._now, "allocated_bytes.all.peak": self._peak}

    # Lines of execution.

    def new_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def host(self) -> Line:
        """This thread's."""
        if not hasattr(self._local, "host"):
            with self.lock:
                self._local.host = Line(f"host thread {threading.current_thread().name}", self.new_number())
                self._local.host.tick()
        return self._local.host

    def launch(self, stream: FakeStream) -> None:
        """What the host has seen comes before what it asks a stream to do; what it does afterwards need
        not.
        """
        host = self.host()
        stream.learn(host.clock)
        stream.tick()
        host.tick()

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        with self.lock:
            self.launch(stream)
            stream.learn(event.clock)
            if event.node is None or event.node.done:
                return
            if stream is self._default:
                self.run(event.node)
                return
            for node in self._before(event.node):
                for part in node.parts:
                    if part.record.stream is stream:
                        part.keep()
            self.after(stream, None, [event.node])

    def after(self, stream: FakeStream, action, deps=()) -> Node | None:
        """Do something when the stream has come so far: now, where nothing is deferred."""
        if stream.queue or deps:
            node = Node(stream, action, list(deps))
            stream.queue.append(node)
            return node
        if action:
            action()
        return None

    def run(self, node: Node | None) -> None:
        """Do what is deferred up to `node`."""
        while node is not None and not node.done:
            head = node.stream.queue[0]
            for dep in head.deps:
                self.run(dep)
            if not head.done:
                node.stream.queue.popleft()
                head.done = True
                if head.action:
                    head.action()

    def _before(self, node: Node):
        """Nodes that are not done and that `node` waits for, and itself."""
        for other in node.stream.queue:
            yield other
            for dep in other.deps:
                if not dep.done:
                    yield from self._before(dep)
            if other is node:
                return

    def _pump(self) -> None:
        """Perhaps do something that is deferred."""
        if self._random.random() < self._chance:
            ready = [s for s in self.streams if s.queue and all(dep.done for dep in s.queue[0].deps)]
            if ready:
                self.run(self._random.choice(ready).queue[0])

    # Memory.

    def record_of(self, tensor: torch.Tensor, made: bool = False) -> Record:
        """What is known of the tensor's storage.

        Args:
            made: whether an operation of the current stream has just made it, if it is not known yet.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        record = self._records.get(key)
        if record is None:
            ref = weakref.ref(storage, partial(self._freed, key))
            record = Record(ref, "device" if made else "host", self.current_stream(), storage.nbytes())
            self._records[key] = record
            if made:
                self._now += record.nbytes
                self._peak = max(self._peak, self._now)
        return record

    def _freed(self, key: int, _ref) -> None:
        with self.lock:
            record = self._records.pop(key)
            if record.kind != "device" or not self.open:
                return
            self._now -= record.nbytes
            known = Line("", record.stream.number)
            known.learn(record.stream.clock)
            known.learn(self.host().clock)
            streams = (
                {s.number for s in self.streams} - {record.stream.number} - {s.number for s in record.also}
            )
            for write, reads in record.spans.values():
                for number, epoch, name in filter(None, (write, *reads.values())):
                    if number in streams and known.clock.get(number, 0) < epoch:
                        self._race(
                            f"memory of {record.stream.name} is freed while {name} in "
                            f"{self._line_name(number)} may use it"
                        )

    def pinned_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._quiet():
            copied = tensor.clone()
            self.mark_pinned(copied)
        return copied

    def mark_pinned(self, tensor: torch.Tensor) -> None:
        with self.lock:
            record = self.record_of(tensor)
            if record.kind == "device":
                self._now -= record.nbytes
            record.kind = "pinned"

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether the driver could copy from or to it by itself."""
        if self.record_of(tensor).kind == "pinned":
            return True
        start = tensor.data_ptr()
        end = start + _span(tensor)[1] - _span(tensor)[0]
        return any(at <= start and end <= at + nbytes for at, nbytes in self.registered.items())

    def register(self, address: int, nbytes: int, flags: int = 0) -> int:
        """CudaHostRegister."""
        with self.lock:
            if any(address < at + count and at < address + nbytes for at, count in self.registered.items()):
                return ALREADY_REGISTERED
            if self._lockable is not None and sum(self.registered.values()) + nbytes > self._lockable:
                return OUT_OF_MEMORY
            self.registered[address] = nbytes
            return 0

    def unregister(self, address: int) -> int:
        """CudaHostUnregister. Memory that a copy may still read is a race."""
        with self.lock:
            if address not in self.registered:
                return NOT_REGISTERED
            end = address + self.registered.pop(address)
            known = self.host().clock
            for record in self._records.values():
                storage = record.ref()
                base = 0 if storage is None else storage.data_ptr()
                for (low, high), (write, reads) in record.spans.items():
                    if base + low < end and address < base + high:
                        for number, epoch, name in filter(None, (write, *reads.values())):
                            if known.get(number, 0) < epoch:
                                self._race(
                                    f"memory is unregistered while {name} in "
                                    f"{self._line_name(number)} may use it"
                                )
            return 0

    def record_stream(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        with self.lock:
            record = self.record_of(tensor)
            record.also.add(stream)
            for part in (part for node in stream.queue for part in node.parts if part.record is record):
                part.keep()

    def host_access(self, tensor: torch.Tensor, write: bool = True, name: str = "the host") -> None:
        """This thread reads or writes the tensor itself."""
        with self.lock:
            host = self.host()
            host.tick()
            self._access(tensor, write, host, name)

    def _access(self, tensor: torch.Tensor, write: bool, line: Line, name: str) -> None:
        start, end = _span(tensor)
        if start == end:
            return
        record = self.record_of(tensor)
        known = line.clock
        covered = []
        for (low, high), (last, reads) in record.spans.items():
            if low < end and start < high:
                for number, epoch, other in filter(None, (last, *(reads.values() if write else ()))):
                    if known.get(number, 0) < epoch:
                        self._race(
                            f"{'write' if write else 'read'} by {name} in {line.name} and {other} in "
                            f"{self._line_name(number)} are in no order (bytes {max(low, start)}:"
                            f"{min(high, end)} of {record.nbytes}, {record.kind} memory)"
                        )
                if write and start <= low and high <= end:
                    covered.append((low, high))
        for span in covered:
            del record.spans[span]
        entry = line.number, known[line.number], name
        found = record.spans.setdefault((start, end), [None, {}])
        self._line_names[line.number] = line.name
        if write:
            found[0] = entry
        else:
            found[1][line.number] = entry

    def _race(self, sentence: str) -> None:
        where = next(
            (
                f"{frame.filename.rpartition('/fedspeed/')[2]}:{frame.lineno}"
                for frame in reversed(traceback.extract_stack())
                if "/fedspeed/" in frame.filename
            ),
            "",
        )
        self.races.append(f"{sentence} [{where}]" if where else sentence)

    def _line_name(self, number: int) -> str:
        return self._line_names.get(number, f"line {number}")

    # Operations.

    @contextmanager
    def watching(self):
        """See the operations of this thread."""
        if getattr(self._local, "watched", False):
            yield
            return
        self._local.watched = True
        try:
            with _Watch(self):
                yield
        finally:
            self._local.watched = False

    @contextmanager
    def _quiet(self):
        before = self.quiet
        self._local.quiet = True
        try:
            yield
        finally:
            self._local.quiet = before

    @property
    def quiet(self) -> bool:
        return getattr(self._local, "quiet", False) or not self.open

    def operate(self, func, args, kwargs):
        if func._schema.name == "aten::copy_":
            return self._copy(func, args, kwargs)
        pinned = kwargs.get("pin_memory")
        if pinned:
            kwargs = {**kwargs, "pin_memory": False}
        name = func._schema.name
        stream = self.current_stream()
        with self.lock:
            for tensor in _tensors((*args, *kwargs.values())):
                self.record_of(tensor)  # a view of it is not new
            uses = list(_uses(func, args, kwargs))
            if uses and stream.queue:
                self.run(stream.queue[-1])
            self.launch(stream)
            for tensor, write in uses:
                self._access(tensor, write, stream, name)
        out = func(*args, **kwargs)
        with self.lock:
            for tensor in _tensors(out):
                new = tensor.untyped_storage()._cdata not in self._records
                self.record_of(tensor, made=True)
                if pinned:
                    self.mark_pinned(tensor)
                # also where nothing is written: what had the memory before may still be at work in this
                # stream
                elif new:
                    self._access(tensor, True, stream, name)
            if name in WAITING_OPS:
                self.stops.append(name)
                self.host().learn(stream.clock)
            self._pump()
        return out

    def _copy(self, func, args, kwargs):
        into, source, *rest = args
        free = bool(rest[0] if rest else kwargs.get("non_blocking", False))
        stream = self.current_stream()
        with self.lock:
            records = [self.record_of(tensor) for tensor in (into, source)]
            if all(
                record.kind != "device" for record in records
            ):  # host to host: the device has no part in it
                self.host_access(source, write=False)
                self.host_access(into)
                return func(*args, **kwargs)
            pinned = [
                record.kind != "device" and self.is_pinned(tensor)
                for record, tensor in zip(records, (into, source))
            ]
            plain = any(record.kind != "device" and not mine for record, mine in zip(records, pinned))
            waits = plain or (any(pinned) and not free)
            if waits and stream.queue:
                self.run(stream.queue[-1])
            self.launch(stream)
            self._access(source, False, stream, "copy_")
            self._access(into, True, stream, "copy_")
            if stream is not self._default and not waits:
                parts = [Part(tensor, record, stream) for tensor, record in zip((into, source), records)]
                stream.queue.append(Node(stream, partial(self._copy_now, *parts), parts=parts))
                self._pump()
                return into
        out = func(*args, **kwargs)
        with self.lock:
            self.ms += 1.0
            if waits:
                self.stops.append("copy_")
                self.host().learn(stream.clock)
            self._pump()
        return out

    def _copy_now(self, into: Part, source: Part) -> None:
        self.copies += 1
        self.ms += 1.0
        to = into.tensor()
        what = source.tensor()
        with self._quiet(), torch.no_grad():
            if to is not None and what is not None:
                to.copy_(what)
            elif to is not None:  # what was to be copied has been freed: who knows what is there now
                to.view(torch.uint8).fill_(0xFF)


class _Watch(TorchDispatchMode):
    def __init__(self, fake: FakeCuda):
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._fake.quiet:
            return func(*args, **(kwargs or {}))
        return self._fake.operate(func, args, kwargs or {})


@contextmanager
def fake_cuda(seed: int = 0, **options):
    """The fake in the place of DeepSpeed's accelerator, for all threads; `options` are FakeCuda's."""
    fake = FakeCuda(seed, **options)
    to = torch.Tensor.to
    cpu = torch.Tensor.cpu
    numpy = torch.Tensor.numpy
    submit = ThreadPoolExecutor.submit
    result = Future.result
    gather = torch.distributed.all_gather_into_tensor

    def moved(tensor, *args, **kwargs):
        named = any(isinstance(word, str | torch.device) for word in (*args, kwargs.get("device")))
        if named and fake.is_pinned(tensor):
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(
                tensor, non_blocking=kwargs.get("non_blocking", False)
            )
        return to(tensor, *args, **kwargs)

    def to_host(tensor, *args, **kwargs):
        fake.current_stream().synchronize()
        return cpu(tensor, *args, **kwargs)

    def as_numpy(tensor, *args, **kwargs):
        if not fake.quiet and fake.is_pinned(tensor):
            fake.host_access(tensor)
        return numpy(tensor, *args, **kwargs)

    def submitted(pool, function, /, *args, **kwargs):
        handed = dict(fake.host().clock)
        ends = []
        fake.host().tick()

        def run():
            fake.host().learn(handed)
            try:
                with fake.watching():
                    return function(*args, **kwargs)
            finally:
                ends.append(dict(fake.host().clock))
                fake.host().tick()

        future = submit(pool, run)
        future.fake_ends = ends
        return future

    def awaited(future, timeout=None):
        try:
            return result(future, timeout)
        finally:
            for clock in getattr(future, "fake_ends", ()):
                fake.host().learn(clock)

    def gathered(output, own, group=None, async_op=False):
        if not async_op:
            return gather(output, own, group=group)
        fake._gathers.wait_stream(fake.current_stream())
        with fake.stream(fake._gathers):
            work = gather(output, own, group=group, async_op=True)
        return _Work(fake, work, fake._gathers.record_event(), own)

    cudart = SimpleNamespace(cudaHostRegister=fake.register, cudaHostUnregister=fake.unregister)
    with ExitStack() as stack:
        for owner, name, value in (
            (real_accelerator, "ds_accelerator", fake),
            (torch.Tensor, "to", moved),
            (torch.Tensor, "cpu", to_host),
            (torch.Tensor, "numpy", as_numpy),
            (torch.Tensor, "pin_memory", lambda tensor, device=None: fake.pinned_copy(tensor)),
            (torch.Tensor, "is_pinned", lambda tensor, device=None: fake.is_pinned(tensor)),
            (torch.Tensor, "record_stream", lambda tensor, stream: fake.record_stream(tensor, stream)),
            (torch.cuda, "cudart", lambda: cudart),
            (ThreadPoolExecutor, "submit", submitted),
            (Future, "result", awaited),
            (torch.distributed, "all_gather_into_tensor", gathered),
        ):
            stack.enter_context(patch.object(owner, name, value))
        with fake.watching():
            try:
                yield fake
            finally:
                fake.synchronize()
                fake.open = False


class _Work:
    """A collective that is under way, as NCCL's: waiting for it holds up the stream. It keeps what it reads
    until then.
    """

    def __init__(self, fake: FakeCuda, work, event: FakeEvent, own: torch.Tensor):
        self._fake = fake
        self._work = work
        self._event = event
        self._own = own

    def wait(self, *deadline) -> bool:
        done = self._work.wait(*deadline)
        self._event.wait()
        self._own = None
        return done


# What an operation reads and writes.

NO_READ = frozenset({
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty_strided",
    "is_same_size",
    "size",
    "stride",
})


@cache
def _ways(func) -> tuple[str, ...]:
    """For each argument of an operation: "write", "read", or "" where its memory is not touched."""
    schema = func._schema
    given = set()
    for value in schema.returns:
        if value.alias_info is not None and not value.alias_info.is_write:
            given |= set(value.alias_info.before_set)
    ways = []
    for argument in schema.arguments:
        alias = argument.alias_info
        if alias is not None and alias.is_write or schema.name.startswith("c10d::"):
            ways.append("write")
        elif (
            alias is not None and given & set(alias.before_set) or schema.name.rpartition("::")[2] in NO_READ
        ):
            ways.append("")
        else:
            ways.append("read")
    return tuple(ways)


def _uses(func, args, kwargs):
    """(tensor, whether it is written) of an operation's arguments."""
    ways = _ways(func)
    for way, value in zip(ways, args):
        if way:
            for tensor in _tensors(value):
                yield tensor, way == "write"
    if kwargs:
        names = {argument.name: way for argument, way in zip(func._schema.arguments, ways)}
        for name, value in kwargs.items():
            if names[name]:
                for tensor in _tensors(value):
                    yield tensor, names[name] == "write"


def _tensors(value):
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu" and value.layout is torch.strided:
            yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """(first byte, byte behind the last) in its storage."""
    size = tensor.element_size()
    start = tensor.storage_offset()
    if tensor.numel() == 0:
        return 0, 0
    last = start + sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride()))
    return start * size, (last + 1) * size
