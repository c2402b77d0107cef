"""The frozen base divided over the ranks of a group, which gather it unit by unit."""

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.base.layout import Unit
from fedspeed.engine.base.page_locks import report_unpinned
from fedspeed.engine.base.tier import Tier


class GatheredTier(Tier):
    """Each rank of a group holds an equal slice of every unit; loading is a gather that all of them make in
    the same order.
    """

    def __init__(self, units: dict[int, Unit], group, name: str, offload: bool):
        self._units = units
        self._group = group
        self.name = name
        self._ranks, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._slices: dict[int, torch.Tensor] = {}
        self._home = torch.device("cpu") if offload else torch.device(get_accelerator().current_device_name())
        self._offload = self._pins = offload
        self.matched_group = group if self._ranks > 1 else None

    def put(self, index: int, data: torch.Tensor) -> None:
        size = self.slot_bytes(self._units[index]) // self._ranks
        mine = data[self._rank * size : (self._rank + 1) * size]
        own = torch.zeros(size, dtype=torch.uint8)
        own[: len(mine)] = mine
        self._slices[index] = self._pinned(own) if self._offload else own.to(self._home)

    def _pinned(self, own: torch.Tensor) -> torch.Tensor:
        """A slice in page-locked memory, as long as there is some."""
        if self._pins:
            try:
                return get_accelerator().pin_memory(own)
            except RuntimeError as error:
                self._pins = False
                whole = sum(self.slot_bytes(unit) for unit in self._units.values()) // self._ranks
                report_unpinned(f"engine.tier={self.name}", whole, str(error).partition("\n")[0])
        return own

    def away(self) -> list[torch.Tensor]:
        return list(self._slices.values()) if self._offload else []

    def slot_bytes(self, unit: Unit) -> int:
        return -(-unit.nbytes // self._ranks) * self._ranks

    def fetch(self, index: int, into: torch.Tensor, free):
        own = self._slices[index].to(into.device, non_blocking=True)
        work = torch.distributed.all_gather_into_tensor(
            into[: self.slot_bytes(self._units[index])], own, group=self._group, async_op=True
        )
        return _Gathered(work, own, self._units[index].nbytes)

    def close(self) -> None:
        self._slices.clear()


class _Gathered:
    def __init__(self, work, source: torch.Tensor, nbytes: int):
        self._work = work
        self._source = source
        self._nbytes = nbytes

    def wait(self) -> int:
        self._work.wait()
        return self._nbytes
