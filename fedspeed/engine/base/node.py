"""The frozen base in a node's RAM or on its disk, or a part of it there, once for all ranks of the node."""

import os
from abc import abstractmethod
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.base import copies
from fedspeed.engine.base.layout import Unit
from fedspeed.engine.base.page_locks import PageLocks, pinned_empty
from fedspeed.engine.base.shards import ShardReader, ShardServer, shards_of
from fedspeed.engine.base.shared import NodeFile, nodes_of, share
from fedspeed.engine.base.tier import Tier
from fedspeed.errors import FedSpeedError
from fedspeed.net.ports import reachable_address
from fedspeed.schedule.limits import READ_BYTES, READ_STAGES, READERS, UNIT_ALIGN


class NodeTier(Tier):
    """What the tiers of a node have in common: units, or this node's parts of them, one behind the other in
    one file of the node.

    Args:
        spans: (start, end) of the bytes of each unit that lie on this node.
    """

    def __init__(self, units: dict[int, Unit], spans: dict[int, tuple[int, int]], folder: Path | None, group):
        self._units = units
        self._spans = spans
        self._at = {}
        at = 0
        for index, (start, end) in spans.items():
            self._at[index] = at
            at += end - start
        self._file = NodeFile(at, folder, group)
        self._stream = (
            None if get_accelerator().is_synchronized_device() else get_accelerator().Stream()
        )  # of copies to an accelerator

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
        return self._memory[self._at[index] :][: end - start]

    def host(self, index: int) -> torch.Tensor | None:
        here = self._here(index)
        return here if len(here) == self._units[index].nbytes else None


def whole(units: dict[int, Unit]) -> dict[int, tuple[int, int]]:
    """Spans of units that lie on a node from end to end."""
    return {index: (0, unit.nbytes) for index, unit in units.items()}


class RamTier(NodeTier):
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

    def fetch(self, index: int, into: torch.Tensor, free) -> copies.Done | copies.Copied | copies.Passed:
        source = self.host(index)
        if self._stream is None:
            return copies.Done([self._thread.submit(copies.copy, into, source)])
        if self._locks.held:
            return copies.copy_in_stream(self._stream, into, source, free)
        # From ordinary memory a copy stops who asks for it, until the slot is free and the copy is made.
        return copies.Passed(self._thread.submit(copies.copy_in_stream, self._stream, into, source, free))

    def close(self) -> None:
        self._thread.shutdown()
        if self._locks is not None:
            self._locks.close()
        self._file.close()


@dataclass
class _Stage:
    """Host memory that units pass through, and the last copy from it."""

    memory: torch.Tensor
    copied: copies.Copied | None = None

    def settle(self) -> None:
        """Wait until nothing is copied from it any more."""
        if self.copied is not None:
            self.copied.synchronize()


class StagedReadTier(NodeTier):
    """Units that threads read into host memory: the slot itself, or one of two page-locked stages where the
    slots are an accelerator's. One is read into while the other is copied from.
    """

    def __init__(self, units, spans, folder, group):
        super().__init__(units, spans, folder, group)
        self._one = ThreadPoolExecutor(1, "base-stage")
        self._stages: deque[_Stage] = deque()  # the next to be used first

    def seal(self) -> None:
        super().seal()
        if self._stream is not None:
            largest = max(unit.nbytes for unit in self._units.values())
            memory = pinned_empty(
                READ_STAGES * largest + UNIT_ALIGN, f"the stages of engine.tier={self.name}"
            )
            start = -memory.data_ptr() % UNIT_ALIGN
            self._stages.extend(_Stage(memory[start + i * largest :][:largest]) for i in range(READ_STAGES))

    def fetch(self, index: int, into: torch.Tensor, free) -> copies.Done | copies.Passed:
        if self._stream is None:
            return copies.Done(self._read(index, into))
        return copies.Passed(self._one.submit(self._through, index, into, free))

    @abstractmethod
    def _read(self, index: int, into: torch.Tensor) -> list:
        """Begin to read the unit into host memory [nbytes] uint8; the futures give how many bytes each has
        read.
        """

    def _through(self, index: int, into: torch.Tensor, free) -> copies.Copied:
        """Read the unit into a stage and ask for its copy."""
        stage = self._stages[0]
        self._stages.rotate(-1)
        stage.settle()
        memory = stage.memory[: self._units[index].nbytes]
        for future in self._read(index, memory):
            future.result()
        stage.copied = copies.copy_in_stream(self._stream, into, memory, free)
        return stage.copied

    def close(self) -> None:
        self._one.shutdown()
        for stage in self._stages:
            stage.settle()
        self._stages.clear()
        self._file.close()


class NvmeTier(StagedReadTier):
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
        unit = self._units[index]
        view = memoryview(into.numpy())
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
    """Divided over the nodes of a group, in proportion to their ranks; each part waits in its node's RAM,
    once, and is read by whoever needs it. No rank waits for another's pass.
    """

    def __init__(self, units: dict[int, Unit], group, name: str, deadline_s: float):
        self.name = name
        self._group = group
        self._deadline_s = deadline_s
        self._nodes = nodes_of(group)
        self._me = next(i for i, node in enumerate(self._nodes) if dist.get_rank() in node)
        self._parts = {
            index: shards_of(unit.nbytes, [len(node) for node in self._nodes], UNIT_ALIGN)
            for index, unit in units.items()
        }
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
            self._server = ShardServer(
                self._memory, reachable_address(os.environ["MASTER_ADDR"], self._me == 0), self._deadline_s
            )
        mine = [self._me, *self._server.address, self._server.token.hex()] if self._server else None
        for node, host, port, token in filter(None, share(mine, self._group)):
            if node != self._me:
                self._readers[node] = ShardReader((host, port), bytes.fromhex(token), self._deadline_s)

    def _read(self, index: int, into: torch.Tensor) -> list:
        view = memoryview(into.numpy())
        reads = []
        for node, (start, end) in enumerate(self._parts[index]):
            if node == self._me:
                reads.append(self._threads[node].submit(copies.copy, into[start:end], self._here(index)))
            elif end > start:
                reads.append(
                    self._threads[node].submit(
                        self._readers[node].read, self._places[node][index], view[start:end]
                    )
                )
        return reads

    def close(self) -> None:
        super().close()
        for thread in self._threads:
            thread.shutdown()
        for reader in filter(None, self._readers):
            reader.close()
        if self._server:
            self._server.close()
