"""Where units of the frozen base may live, and how one comes onto the device."""

import os
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.base.layout import Unit
from fedspeed.engine.base.parts import PartReader, PartServer, parts_of
from fedspeed.engine.base.shared import NodeFile, nodes_of, share
from fedspeed.engine.pinned import PageLocks, pinned_empty, told_ordinary
from fedspeed.errors import FedSpeedError
from fedspeed.net.ports import own_address
from fedspeed.schedule.limits import READ_BYTES, READ_STAGES, READERS, UNIT_ALIGN


class Done:
    """Handle of a load that a thread makes."""

    def __init__(self, futures):
        self._futures = futures

    def wait(self) -> int:
        return sum(future.result() for future in self._futures)


class Copied:
    """Handle of copies in an accelerator's own stream: waiting holds up the device's arithmetic, not the host."""

    def __init__(self, event, nbytes: int):
        self._event, self._nbytes = event, nbytes

    def wait(self) -> int:
        get_accelerator().current_stream().wait_event(self._event)
        return self._nbytes

    def synchronize(self) -> None:
        """Hold up the host too."""
        self._event.synchronize()


class Passed:
    """Handle of copies that a thread asks an accelerator's stream for."""

    def __init__(self, future):
        self._future = future

    def wait(self) -> int:
        return self._future.result().wait()


class Tier(ABC):
    """What all tiers have: `put` takes a unit once, at the start; `fetch` begins to bring it into a slot and returns a handle whose `wait` gives
    the bytes that were moved.

    Attributes:
        matched: group of the ranks that must fetch in the same order; None where every rank may go on alone.
    """

    name = ""
    matched = None

    @abstractmethod
    def put(self, index: int, data: torch.Tensor) -> None:
        """Take a unit's bytes [nbytes] uint8, on the CPU."""

    def seal(self) -> None:
        """All units have been put."""

    def resident(self, index: int) -> torch.Tensor | None:
        """The unit's memory if it is on the device for good; such a unit is never fetched."""
        return None

    def host(self, index: int) -> torch.Tensor | None:
        """The unit's memory if this rank can read single rows of it without loading all."""
        return None

    def slot_bytes(self, unit: Unit) -> int:
        """What the unit takes in a slot."""
        return unit.nbytes

    @abstractmethod
    def fetch(self, index: int, into: torch.Tensor, free):
        """Begin to load; `free` is the event after which the slot's last content is no longer read."""

    def away(self) -> list[torch.Tensor]:
        """The host memory that units wait in."""
        return []

    def close(self) -> None:
        """Give back what the tier holds."""


class Device(Tier):
    """Resident: units stay where they are computed with."""

    name = "resident"

    def __init__(self):
        self._units: dict[int, torch.Tensor] = {}

    def put(self, index: int, data: torch.Tensor) -> None:
        self._units[index] = data.to(get_accelerator().current_device_name(), copy=True)

    def resident(self, index: int) -> torch.Tensor:
        return self._units[index]

    def fetch(self, index: int, into: torch.Tensor, free):
        raise AssertionError(f"unit {index} is resident")

    def close(self) -> None:
        self._units.clear()


class Quantised(Tier):
    """On the device in 8 or 4 bits; loading computes the model's own type anew. Only matrices: norms and biases keep all their bits.

    By bitsandbytes: int8 with one scale for 256 weights, or NF4 (Dettmers et al., 2023) with one for 64.

    Raises:
        FedSpeedError: bitsandbytes is not installed.
    """

    def __init__(self, units: dict[int, Unit], name: str):
        try:
            import bitsandbytes.functional
        except ImportError as error:
            raise FedSpeedError(f"engine.tier={name} needs bitsandbytes: pip install -r requirements-quantised.txt ({error})") from error
        self.name, self._units, self._library = name, units, bitsandbytes.functional
        self._parts: dict[int, list[tuple]] = {}  # of each piece: (values, state); the state is None where the values are exact

    def put(self, index: int, data: torch.Tensor) -> None:
        data, unit = data.to(get_accelerator().current_device_name()), self._units[index]
        self._parts[index] = [self._quantise(unit.view(data, piece)) for piece in unit.pieces]

    def _quantise(self, weight: torch.Tensor) -> tuple:
        if weight.dim() < 2:
            return weight.clone(), None
        if self.name == "int8":
            return self._library.quantize_blockwise(weight, blocksize=256)
        return self._library.quantize_4bit(weight, blocksize=64, quant_type="nf4")

    def _write(self, values: torch.Tensor, state, into: torch.Tensor) -> None:
        """Compute a piece's own values where they are needed; without another copy where bitsandbytes can."""
        if state is None:
            into.copy_(values)
            return
        name = "dequantize_blockwise" if self.name == "int8" else "dequantize_4bit"
        dequantise = getattr(self._library, name)
        device = into.device.type.upper()
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{name}.out", device):
            dequantise(values, state, out=into)
        else:  # it has none for CPUs
            into.copy_(dequantise(values, state))

    def fetch(self, index: int, into: torch.Tensor, free) -> "_Dequantised":
        return _Dequantised(self, index, into)

    def write(self, index: int, into: torch.Tensor) -> int:
        """Compute the unit's own bytes into a slot; returns how many bytes were read for it."""
        for piece, (values, state) in zip(self._units[index].pieces, self._parts[index]):
            self._write(values, state, self._units[index].view(into, piece))
        return sum(values.numel() * values.element_size() for values, _ in self._parts[index])

    def close(self) -> None:
        self._parts.clear()


@dataclass
class _Dequantised:
    """There is nothing to run ahead with: it is the device's own arithmetic, made when it is needed."""

    tier: Quantised
    index: int
    into: torch.Tensor

    def wait(self) -> int:
        return self.tier.write(self.index, self.into)


class _Placed(Tier):
    """What the tiers of a node have in common: units, or this node's parts of them, one behind the other in one file of the node.

    Args:
        spans: (start, end) of the bytes of each unit that lie on this node.
    """

    def __init__(self, units: dict[int, Unit], spans: dict[int, tuple[int, int]], folder: Path | None, group):
        self._units, self._spans, self._at, at = units, spans, {}, 0
        for index, (start, end) in spans.items():
            self._at[index] = at
            at += end - start
        self._file = NodeFile(at, folder, group)
        self._stream = None if get_accelerator().is_synchronized_device() else get_accelerator().Stream()  # of copies to an accelerator

    def put(self, index: int, data: torch.Tensor) -> None:
        start, end = self._spans[index]
        self._file.write(self._at[index], data[start:end])

    def seal(self) -> None:
        self._file.settle()
        self._memory = self._file.map()

    def away(self) -> list[torch.Tensor]:
        return [self._memory]

    def _here(self, index: int) -> torch.Tensor:
        """The unit's bytes that lie on this node."""
        start, end = self._spans[index]
        return self._memory[self._at[index]:][:end - start]

    def host(self, index: int) -> torch.Tensor | None:
        here = self._here(index)
        return here if len(here) == self._units[index].nbytes else None


def whole(units: dict[int, Unit]) -> dict[int, tuple[int, int]]:
    """Spans of units that lie on a node from end to end."""
    return {index: (0, unit.nbytes) for index, unit in units.items()}


class Ram(_Placed):
    """Node RAM: one copy for all ranks of a node, page-locked where there is an accelerator to copy it to."""

    name = "ram"

    def __init__(self, units: dict[int, Unit], group):
        super().__init__(units, whole(units), None, group)
        self._thread = ThreadPoolExecutor(1, "base-copy")
        self._locks = None

    def seal(self) -> None:
        super().seal()
        if self._stream is not None:
            spans = [(self._at[index], self._at[index] + unit.nbytes) for index, unit in self._units.items()]
            self._locks = PageLocks(self._memory, spans, f"engine.tier={self.name}")

    def fetch(self, index: int, into: torch.Tensor, free) -> Done | Copied | Passed:
        source = self.host(index)
        if self._stream is None:
            return Done([self._thread.submit(_copy, into, source)])
        if self._locks.held:
            return _copy_in_stream(self._stream, into, source, free)
        # From ordinary memory a copy stops who asks for it, until the slot is free and the copy is made.
        return Passed(self._thread.submit(_copy_in_stream, self._stream, into, source, free))

    def close(self) -> None:
        self._thread.shutdown()
        if self._locks is not None:
            self._locks.close()
        self._file.close()


@dataclass
class _Stage:
    """Host memory that units pass through, and the last copy from it."""

    memory: torch.Tensor
    copied: Copied | None = None

    def settle(self) -> None:
        """Wait until nothing is copied from it any more."""
        if self.copied is not None:
            self.copied.synchronize()


class _Read(_Placed):
    """Units that threads read into host memory: the slot itself, or one of two page-locked stages where the
    slots are an accelerator's. One is read into while the other is copied from."""

    def __init__(self, units, spans, folder, group):
        super().__init__(units, spans, folder, group)
        self._one = ThreadPoolExecutor(1, "base-stage")
        self._stages: deque[_Stage] = deque()  # the next to be used first

    def seal(self) -> None:
        super().seal()
        if self._stream is not None:
            largest = max(unit.nbytes for unit in self._units.values())
            memory = pinned_empty(READ_STAGES * largest + UNIT_ALIGN, f"the stages of engine.tier={self.name}")
            start = -memory.data_ptr() % UNIT_ALIGN
            self._stages.extend(_Stage(memory[start + i * largest:][:largest]) for i in range(READ_STAGES))

    def fetch(self, index: int, into: torch.Tensor, free) -> Done | Passed:
        if self._stream is None:
            return Done(self._read(index, into))
        return Passed(self._one.submit(self._through, index, into, free))

    @abstractmethod
    def _read(self, index: int, into: torch.Tensor) -> list:
        """Begin to read the unit into host memory [nbytes] uint8; the futures give how many bytes each has read."""

    def _through(self, index: int, into: torch.Tensor, free) -> Copied:
        """Read the unit into a stage and ask for its copy."""
        stage = self._stages[0]
        self._stages.rotate(-1)
        stage.settle()
        memory = stage.memory[:self._units[index].nbytes]
        for future in self._read(index, memory):
            future.result()
        stage.copied = _copy_in_stream(self._stream, into, memory, free)
        return stage.copied

    def close(self) -> None:
        self._one.shutdown()
        for stage in self._stages:
            stage.settle()
        self._stages.clear()
        self._file.close()


class Disk(_Read):
    """NVMe: read past the page cache, which would fill the RAM that this tier is there to spare."""

    name = "nvme"

    def __init__(self, units: dict[int, Unit], folder: Path, group):
        super().__init__(units, whole(units), folder, group)
        self._threads = ThreadPoolExecutor(READERS, "base-read")

    def seal(self) -> None:
        os.fsync(self._file.fd)
        super().seal()
        try:
            self._direct = os.open(f"/proc/self/fd/{self._file.fd}", os.O_RDONLY | os.O_DIRECT)
        except OSError:  # a file system without it (tmpfs): then reads go through the page cache
            self._direct = os.open(f"/proc/self/fd/{self._file.fd}", os.O_RDONLY)

    def _read(self, index: int, into: torch.Tensor) -> list:
        unit, view = self._units[index], memoryview(into.numpy())
        return [self._threads.submit(self._pread, view[at:min(at + READ_BYTES, unit.nbytes)], self._at[index] + at)
                for at in range(0, unit.nbytes, READ_BYTES)]

    def _pread(self, view: memoryview, at: int) -> int:
        done = 0
        while done < len(view):
            n = os.preadv(self._direct, [view[done:]], at + done)
            if n == 0:
                raise FedSpeedError(f"the base on disk ends before byte {at + done + 1}; was its file cut by another process?")
            done += n
        return done

    def close(self) -> None:
        super().close()
        self._threads.shutdown()
        os.close(self._direct)


class Served(_Read):
    """Divided over the nodes of a group, in proportion to their ranks; each part waits in its node's RAM, once, and is read by whoever needs it.
    No rank waits for another's pass."""

    def __init__(self, units: dict[int, Unit], group, name: str, deadline_s: float):
        self.name, self._group, self._deadline_s = name, group, deadline_s
        self._nodes = nodes_of(group)
        self._me = next(i for i, node in enumerate(self._nodes) if dist.get_rank() in node)
        self._parts = {index: parts_of(unit.nbytes, [len(node) for node in self._nodes], UNIT_ALIGN) for index, unit in units.items()}
        super().__init__(units, {index: parts[self._me] for index, parts in self._parts.items()}, None, group)
        self._threads = [ThreadPoolExecutor(1, "base-part") for _ in self._nodes]
        self._places = []  # of each node: where units begin in its memory
        for node in range(len(self._nodes)):
            sizes = [parts[node][1] - parts[node][0] for parts in self._parts.values()]
            self._places.append(dict(zip(units, accumulate(sizes, initial=0))))

    def seal(self) -> None:
        super().seal()
        self._server, self._readers = None, [None] * len(self._nodes)
        if len(self._nodes) == 1:
            return
        if self._file.writes:
            self._server = PartServer(self._memory, own_address(os.environ["MASTER_ADDR"], self._me == 0), self._deadline_s)
        mine = [self._me, *self._server.address, self._server.token.hex()] if self._server else None
        for node, host, port, token in filter(None, share(mine, self._group)):
            if node != self._me:
                self._readers[node] = PartReader((host, port), bytes.fromhex(token), self._deadline_s)

    def _read(self, index: int, into: torch.Tensor) -> list:
        view, reads = memoryview(into.numpy()), []
        for node, (start, end) in enumerate(self._parts[index]):
            if node == self._me:
                reads.append(self._threads[node].submit(_copy, into[start:end], self._here(index)))
            elif end > start:
                reads.append(self._threads[node].submit(self._readers[node].read, self._places[node][index], view[start:end]))
        return reads

    def close(self) -> None:
        super().close()
        for thread in self._threads:
            thread.shutdown()
        for reader in filter(None, self._readers):
            reader.close()
        if self._server:
            self._server.close()


class Partitioned(Tier):
    """Each rank of a group holds an equal slice of every unit; loading is a gather that all of them make in the same order."""

    def __init__(self, units: dict[int, Unit], group, name: str, offload: bool):
        self._units, self._group, self.name = units, group, name
        self._ranks, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._slices: dict[int, torch.Tensor] = {}
        self._home = torch.device("cpu") if offload else torch.device(get_accelerator().current_device_name())
        self._offload = self._pins = offload
        self.matched = group if self._ranks > 1 else None

    def put(self, index: int, data: torch.Tensor) -> None:
        size = self.slot_bytes(self._units[index]) // self._ranks
        mine = data[self._rank * size:(self._rank + 1) * size]
        own = torch.zeros(size, dtype=torch.uint8)
        own[:len(mine)] = mine
        self._slices[index] = self._pinned(own) if self._offload else own.to(self._home)

    def _pinned(self, own: torch.Tensor) -> torch.Tensor:
        """A slice in page-locked memory, as long as there is some."""
        if self._pins:
            try:
                return get_accelerator().pin_memory(own)
            except RuntimeError as error:
                self._pins = False
                whole = sum(self.slot_bytes(unit) for unit in self._units.values()) // self._ranks
                told_ordinary(f"engine.tier={self.name}", whole, str(error).partition("\n")[0])
        return own

    def away(self) -> list[torch.Tensor]:
        return list(self._slices.values()) if self._offload else []

    def slot_bytes(self, unit: Unit) -> int:
        return -(-unit.nbytes // self._ranks) * self._ranks

    def fetch(self, index: int, into: torch.Tensor, free):
        own = self._slices[index].to(into.device, non_blocking=True)
        work = torch.distributed.all_gather_into_tensor(into[:self.slot_bytes(self._units[index])], own, group=self._group, async_op=True)
        return _Gathered(work, own, self._units[index].nbytes)

    def close(self) -> None:
        self._slices.clear()


class _Gathered:
    def __init__(self, work, source: torch.Tensor, nbytes: int):
        self._work, self._source, self._nbytes = work, source, nbytes

    def wait(self) -> int:
        self._work.wait()
        return self._nbytes


def _copy(into: torch.Tensor, source: torch.Tensor) -> int:
    np.copyto(into.numpy()[:len(source)], source.numpy())  # in this thread alone: torch would take the cores of the arithmetic
    return len(source)


def _copy_in_stream(stream, into: torch.Tensor, source: torch.Tensor, free) -> Copied:
    """Copy in `stream`, after `free` (the event after which the slot's last content is no longer read)."""
    with get_accelerator().stream(stream):
        if free is not None:
            stream.wait_event(free)
        into[:len(source)].copy_(source, non_blocking=True)
        event = get_accelerator().Event()
        event.record(stream)
    return Copied(event, len(source))
