"""Tiers of a base that is divided over the ranks of a group: gathered by all of them together, or read from each other."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.base.layout import Unit
from fedspeed.engine.base.node_tiers import Read
from fedspeed.engine.base.page_locks import told_ordinary
from fedspeed.engine.base.parts import PartReader, PartServer, parts_of
from fedspeed.engine.base.shared import nodes_of, share
from fedspeed.engine.base.tier import Tier, copy_bytes
from fedspeed.net.ports import own_address
from fedspeed.schedule.limits import UNIT_ALIGN


class Served(Read):
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
                reads.append(self._threads[node].submit(copy_bytes, into[start:end], self._here(index)))
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
