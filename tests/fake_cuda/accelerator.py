"""The fake accelerator itself: DeepSpeed's interface, and the operations of torch."""

import random
import threading
from contextlib import contextmanager
from functools import partial

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_cuda.memory import Memory
from tests.fake_cuda.streams import FakeEvent, FakeStream, Node, Part, Record
from tests.fake_cuda.uses import tensors_in, uses_of

# Probabilities that an operation is followed by a deferred copy. Each schedule draws one of them.
CHANCES = (0.0, 0.003, 0.03, 0.3)
# Operations for whose result the host waits.
WAITING_OPS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")


class FakeCuda(Memory, CPU_Accelerator):
    """See the package's docstring.

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

    memory_reserved = memory_allocated
    memory_cached = memory_allocated

    def max_memory_allocated(self, device_index=None):
        return self._peak

    max_memory_reserved = max_memory_allocated
    max_memory_cached = max_memory_allocated

    def reset_peak_memory_stats(self, device_index=None):
        self._peak = self._now

    reset_max_memory_allocated = reset_peak_memory_stats
    reset_max_memory_cached = reset_peak_memory_stats

    def memory_stats(self, device_index=None):
        return {"allocated_bytes.all.current": self._now, "allocated_bytes.all.peak": self._peak}

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
            for tensor in tensors_in((*args, *kwargs.values())):
                self.record_of(tensor)  # a view of it is not new
            uses = list(uses_of(func, args, kwargs))
            if uses and stream.queue:
                self.run(stream.queue[-1])
            self.launch(stream)
            for tensor, write in uses:
                self._access(tensor, write, stream, name)
        out = func(*args, **kwargs)
        with self.lock:
            for tensor in tensors_in(out):
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
