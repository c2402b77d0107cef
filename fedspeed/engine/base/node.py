"""Tiers that store the frozen base, or a shard of it, once per node: in RAM or on disk, for all ranks of the
node.
"""

import os
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import ProcessGroup

from fedspeed.engine.base import copies
from fedspeed.engine.base.layout import Unit
from fedspeed.engine.base.node_file import NodeFile, nodes_of, share
from fedspeed.engine.base.page_locks import PageLocks, pinned_empty
from fedspeed.engine.base.shards import ShardReader, ShardServer, shards_of
from fedspeed.engine.base.tier import LoadHandle, Tier
from fedspeed.engine.device_events import DeviceEvent, DeviceStream
from fedspeed.errors import FedSpeedError
from fedspeed.net.interfaces import address_facing
from fedspeed.schedule.limits import READ_BYTES, READ_STAGES, READERS, UNIT_ALIGN


class NodeTier(Tier):
    """Store units, or this node's shards of them, one after the other in one file of the node.

    Args:
        spans: (start, end) of the bytes of each unit that this node stores.
        folder: where the file lies on disk; None for RAM.
        group: the ranks that share the base.
    """

    def __init__(
        self,
        units: Mapping[int, Unit],
        spans: Mapping[int, tuple[int, int]],
        folder: Path | None,
        group: ProcessGroup,
    ):
        self._units = units
        self._spans = spans
        self._at = {}  # offset of each unit in the file
        at = 0
        for index, (start, end) in spans.items():
            self._at[index] = at
            at += end - start
        self._file = NodeFile(at, folder, group)
        # Copies to an accelerator have a stream of their own.
        self._stream: DeviceStream | None = (
            None if get_accelerator().is_synchronized_device() else get_accelerator().Stream()
        )

    def put(self, index: int, data: torch.Tensor) -> None:
        start, end = self._spans[index]
        self._file.write(self._at[index], data[start:end])

    def seal(self) -> None:
        self._file.settle()
        self._memory = self._file.map()

    def away(self) -> list[torch.Tensor]:
        return [self._memory]

    def _stored(self, index: int) -> torch.Tensor:
        """Return the unit's bytes that this node stores."""
        start, end = self._spans[index]
        return self._memory[self._at[index] :][: end - start]

    def host(self, index: int) -> torch.Tensor | None:
        stored = self._stored(index)
        return stored if len(stored) == self._units[index].nbytes else None


def whole_units(units: Mapping[int, Unit]) -> dict[int, tuple[int, int]]:
    """Return the spans of units that a node stores completely."""
    return {index: (0, unit.nbytes) for index, unit in units.items()}


class RamTier(NodeTier):
    """Store units in node RAM: one copy for all ranks of the node, page-locked if there is an accelerator."""

    name = "ram"

    def __init__(self, units: Mapping[int, Unit], group: ProcessGroup):
        super().__init__(units, whole_units(units), None, group)
        self._thread = ThreadPoolExecutor(1, "base-copy")
        self._locks: PageLocks | None = None

    def seal(self) -> None:
        super().seal()
        if self._stream is not None:
            spans = [(self._at[index], self._at[index] + unit.nbytes) for index, unit in self._units.items()]
            self._locks = PageLocks(self._memory, spans, f"engine.tier={self.name}")

    def fetch(self, index: int, into: torch.Tensor, free: DeviceEvent | None) -> LoadHandle:
        source = self._stored(index)
        if self._stream is None:
            return copies.HostCopy([self._thread.submit(copies.copy, into, source)])
        if self._locks is not None and self._locks.locked:
            return copies.copy_in_stream(self._stream, into, source, free)
        # A copy from ordinary memory blocks its caller until the slot is free and the copy is made.
        queued = self._thread.submit(copies.copy_in_stream, self._stream, into, source, free)
        return copies.ThreadedStreamCopy(queued)

    def close(self) -> None:
        self._thread.shutdown()
        if self._locks is not None:
            self._locks.close()
        self._file.close()


@dataclass
class _StagingBuffer:
    """A host buffer that units pass through, and the last copy from it."""

    memory: torch.Tensor
    copied: copies.StreamCopy | None = None

    def settle(self) -> None:
        """Wait until the last copy from the buffer is done."""
        if self.copied is not None:
            self.copied.synchronize()


class StagedReadTier(NodeTier):
    """Read units into host memory by threads: into the slot itself on a CPU. For an accelerator there are two
    page-locked staging buffers: one is filled while the other is copied to the device.
    """

    def __init__(
        self,
        units: Mapping[int, Unit],
        spans: Mapping[int, tuple[int, int]],
        folder: Path | None,
        group: ProcessGroup,
    ):
        super().__init__(units, spans, folder, group)
        self._staging_thread = ThreadPoolExecutor(1, "base-stage")
        self._buffers: deque[_StagingBuffer] = deque()  # the next one to use comes first

    def seal(self) -> None:
        super().seal()
        if self._stream is not None:
            largest = max(unit.nbytes for unit in self._units.values())
            memory = pinned_empty(
                READ_STAGES * largest + UNIT_ALIGN, f"the stages of engine.tier={self.name}"
            )
            start = -memory.data_ptr() % UNIT_ALIGN
            self._buffers.extend(
                _StagingBuffer(memory[start + i * largest :][:largest]) for i in range(READ_STAGES)
            )

    def fetch(self, index: int, into: torch.Tensor, free: DeviceEvent | None) -> LoadHandle:
        if self._stream is None:
            return copies.HostCopy(self._read(index, into))
        queued = self._staging_thread.submit(self._stage, self._stream, index, into, free)
        return copies.ThreadedStreamCopy(queued)

    @abstractmethod
    def _read(self, index: int, into: torch.Tensor) -> list[Future[int]]:
        """Start to read a unit into host memory [nbytes] uint8; each future gives how many bytes it has
        read.
        """

    def _stage(
        self, stream: DeviceStream, index: int, into: torch.Tensor, free: DeviceEvent | None
    ) -> copies.StreamCopy:
        """Read a unit into a staging buffer and queue its copy to the slot."""
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        buffer.settle()
        memory = buffer.memory[: self._units[index].nbytes]
        for future in self._read(index, memory):
            future.result()
        buffer.copied = copies.copy_in_stream(stream, into, memory, free)
        return buffer.copied

    def close(self) -> None:
        self._staging_thread.shutdown()
        for buffer in self._buffers:
            buffer.settle()
        self._buffers.clear()
        self._file.close()


class NvmeTier(StagedReadTier):
    """Store units on NVMe. Reads bypass the page cache, which would fill the RAM that this tier saves."""

    name = "nvme"

    def __init__(self, units: Mapping[int, Unit], folder: Path, group: ProcessGroup):
        super().__init__(units, whole_units(units), folder, group)
        self._threads = ThreadPoolExecutor(READERS, "base-read")

    def seal(self) -> None:
        os.fsync(self._file.fd)
        super().seal()
        try:
            self._direct = os.open(f"/proc/self/fd/{self._file.fd}", os.O_RDONLY | os.O_DIRECT)
        except OSError:  # a file system without O_DIRECT (tmpfs): reads use the page cache
            self._direct = os.open(f"/proc/self/fd/{self._file.fd}", os.O_RDONLY)

    def _read(self, index: int, into: torch.Tensor) -> list[Future[int]]:
        unit = self._units[index]
        view = into.numpy().data
        return [
            self._threads.submit(
                self._pread, view[at : min(at + READ_BYTES, unit.nbytes)], self._at[index] + at
            )
            for at in range(0, unit.nbytes, READ_BYTES)
        ]

    def _pread(self, view: memoryview, at: int) -> int:
        done = 0
        while done < len(view):
            n = os.preadv(self._direct, [view[done:]], at + done)
            if n == 0:
                raise FedSpeedError(
                    f"the base on disk ends before byte {at + done + 1}; was its file cut by another process?"
                )
            done += n
        return done

    def close(self) -> None:
        super().close()
        self._threads.shutdown()
        os.close(self._direct)


class OneSidedTier(StagedReadTier):
    """Divide units over the nodes of a group in proportion to their ranks. Each shard is stored once, in its
    node's RAM, and any rank reads it when it needs it, without waiting for another rank's pass.

    Args:
        deadline_s: seconds after which a read fails.
    """

    def __init__(self, units: Mapping[int, Unit], group: ProcessGroup, name: str, deadline_s: float):
        self.name = name
        self._group = group
        self._deadline_s = deadline_s
        self._nodes = nodes_of(group)
        self._node = next(i for i, node in enumerate(self._nodes) if dist.get_rank() in node)
        self._shards = {
            index: shards_of(unit.nbytes, [len(node) for node in self._nodes], UNIT_ALIGN)
            for index, unit in units.items()
        }
        spans = {index: shards[self._node] for index, shards in self._shards.items()}
        super().__init__(units, spans, None, group)
        self._threads = [ThreadPoolExecutor(1, "base-part") for _ in self._nodes]
        self._offsets = []  # by node: where the shard of each unit begins in its memory
        for node in range(len(self._nodes)):
            sizes = [shards[node][1] - shards[node][0] for shards in self._shards.values()]
            self._offsets.append(dict(zip(units, accumulate(sizes, initial=0))))
        self._server: ShardServer | None = None
        self._readers: dict[int, ShardReader] = {}  # by node, of the other nodes

    def seal(self) -> None:
        super().seal()
        if len(self._nodes) == 1:
            return
        if self._file.writes:
            first = os.environ["MASTER_ADDR"]  # on its own node the address that its store listens on
            host = first if self._node == 0 else address_facing(first)
            self._server = ShardServer(self._memory, host, self._deadline_s)
        address = [self._node, *self._server.address, self._server.token.hex()] if self._server else None
        for node, host, port, token in filter(None, share(address, self._group)):
            if node != self._node:
                self._readers[node] = ShardReader((host, port), bytes.fromhex(token), self._deadline_s)

    def _read(self, index: int, into: torch.Tensor) -> list[Future[int]]:
        view = into.numpy().data
        reads = []
        for node, (start, end) in enumerate(self._shards[index]):
            thread = self._threads[node]
            if node == self._node:
                reads.append(thread.submit(copies.copy, into[start:end], self._stored(index)))
            elif end > start:
                read = self._readers[node].read
                reads.append(thread.submit(read, self._offsets[node][index], view[start:end]))
        return reads

    def close(self) -> None:
        super().close()
        for thread in self._threads:
            thread.shutdown()
        for reader in self._readers.values():
            reader.close()
        if self._server:
            self._server.close()
