"""The accesses to memory that the fake accelerator records, and the races that it finds."""

import traceback
import weakref
from functools import partial

import torch

from tests.fake_cuda.scheduling import Scheduling
from tests.fake_cuda.streams import FakeStream, Line, Record
from tests.fake_cuda.uses import span_of

# Error numbers of CUDA.
OUT_OF_MEMORY = 2
ALREADY_REGISTERED = 712
NOT_REGISTERED = 713


class Memory(Scheduling):
    """Records who has accessed which bytes, and reports unordered accesses as races."""

    def record_of(self, tensor: torch.Tensor, made: bool = False) -> Record:
        """Return what is known of the tensor's storage.

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
        """Return whether the driver could copy from or to it by itself."""
        if self.record_of(tensor).kind == "pinned":
            return True
        start = tensor.data_ptr()
        end = start + span_of(tensor)[1] - span_of(tensor)[0]
        return any(at <= start and end <= at + nbytes for at, nbytes in self.registered.items())

    def register(self, address: int, nbytes: int, flags: int = 0) -> int:
        """Do what cudaHostRegister does; return its error number."""
        with self.lock:
            if any(address < at + count and at < address + nbytes for at, count in self.registered.items()):
                return ALREADY_REGISTERED
            if self._lockable is not None and sum(self.registered.values()) + nbytes > self._lockable:
                return OUT_OF_MEMORY
            self.registered[address] = nbytes
            return 0

    def unregister(self, address: int) -> int:
        """Do what cudaHostUnregister does. If a copy may still read the memory, that is a race."""
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
        """Record that this thread reads or writes the tensor itself."""
        with self.lock:
            host = self.host()
            host.tick()
            self._access(tensor, write, host, name)

    def _access(self, tensor: torch.Tensor, write: bool, line: Line, name: str) -> None:
        start, end = span_of(tensor)
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
