"""The frozen base partitioned over the ranks of a group, which all-gather it unit by unit."""

from typing import Protocol

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import ProcessGroup

from fedspeed.engine.base.layout import Unit
from fedspeed.engine.base.page_locks import report_unpinned
from fedspeed.engine.base.tier import Tier
from fedspeed.engine.device_events import DeviceEvent


class _Work(Protocol):
    """Describe a collective in progress."""

    def wait(self) -> object: ...


class GatheredTier(Tier):
    """Store an equal slice of every unit on each rank of a group. A load is an all-gather, which all ranks
    make in the same order.

    Args:
        offload: whether slices are stored in host RAM instead of on the device.
    """

    def __init__(self, units: dict[int, Unit], group: ProcessGroup, name: str, offload: bool):
        self._units = units
        self._group = group
        self.name = name
        self._ranks = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        self._slices: dict[int, torch.Tensor] = {}
        self._home = torch.device("cpu") if offload else torch.device(get_accelerator().current_device_name())
        self._offload = offload
        self._pins = offload
        self.matched_group = group if self._ranks > 1 else None

    def put(self, index: int, data: torch.Tensor) -> None:
        size = self.slot_bytes(self._units[index]) // self._ranks
        part = data[self._rank * size : (self._rank + 1) * size]
        padded = torch.zeros(size, dtype=torch.uint8)
        padded[: len(part)] = part
        self._slices[index] = self._pinned(padded) if self._offload else padded.to(self._home)

    def _pinned(self, data: torch.Tensor) -> torch.Tensor:
        """Move a slice to page-locked memory; after the first failure slices stay in ordinary memory."""
        if self._pins:
            try:
                return get_accelerator().pin_memory(data)
            except RuntimeError as error:
                self._pins = False
                total = sum(self.slot_bytes(unit) for unit in self._units.values()) // self._ranks
                report_unpinned(f"engine.tier={self.name}", total, str(error).partition("\n")[0])
        return data

    def away(self) -> list[torch.Tensor]:
        return list(self._slices.values()) if self._offload else []

    def slot_bytes(self, unit: Unit) -> int:
        return -(-unit.nbytes // self._ranks) * self._ranks

    def fetch(self, index: int, into: torch.Tensor, free: DeviceEvent | None) -> "_Gathered":
        part = self._slices[index].to(into.device, non_blocking=True)
        work = torch.distributed.all_gather_into_tensor(
            into[: self.slot_bytes(self._units[index])], part, group=self._group, async_op=True
        )
        return _Gathered(work, part, self._units[index].nbytes)

    def close(self) -> None:
        self._slices.clear()


class _Gathered:
    """Handle of an all-gather. It keeps the source alive until the collective is done."""

    def __init__(self, work: _Work, source: torch.Tensor, nbytes: int):
        self._work = work
        self._source = source
        self._nbytes = nbytes

    def wait(self) -> int:
        """Wait for the all-gather; returns the unit's bytes."""
        self._work.wait()
        return self._nbytes
