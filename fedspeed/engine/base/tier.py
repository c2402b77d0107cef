"""The interface of a tier (a place where the frozen base is stored), and the tier that loads nothing."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import ProcessGroup

from fedspeed.engine.base.layout import Unit
from fedspeed.engine.device_events import DeviceEvent


class LoadHandle(Protocol):
    """Describe a load in progress."""

    def wait(self) -> int:
        """Make the following computation wait for the load; returns how many bytes were loaded."""


class Tier(ABC):
    """Store units of the frozen base and load them into slots on the device.

    `put` takes each unit once, at the start. `fetch` starts to load a unit into a slot.

    Attributes:
        name: as in `engine.tier`.
        matched_group: the ranks that must fetch in the same order; None where every rank fetches
            independently.
    """

    name = ""
    matched_group: ProcessGroup | None = None

    @abstractmethod
    def put(self, index: int, data: torch.Tensor) -> None:
        """Store a unit's bytes [nbytes] uint8, given on the CPU."""

    def seal(self) -> None:
        """Finish writing: all units have been put, and from here on they are only read."""

    def resident(self, index: int) -> torch.Tensor | None:
        """Return the unit's bytes if it stays on the device permanently; such a unit is never fetched."""
        return None

    def host(self, index: int) -> torch.Tensor | None:
        """Return the unit's bytes in host memory if single rows of it can be read there without a load."""
        return None

    def slot_bytes(self, unit: Unit) -> int:
        """Return the bytes that the unit needs in a slot."""
        return unit.nbytes

    @abstractmethod
    def fetch(self, index: int, into: torch.Tensor, free: DeviceEvent | None) -> LoadHandle:
        """Start to load a unit.

        Args:
            into: the slot [slot_bytes] uint8.
            free: the event after which nothing reads the slot's previous content; None on a CPU.
        """

    def away(self) -> list[torch.Tensor]:
        """Return the host memory that stores units."""
        return []

    def close(self) -> None:
        """Release the memory, files and threads of the tier."""


class ResidentTier(Tier):
    """Keep all units on the device permanently."""

    name = "resident"

    def __init__(self) -> None:
        self._units: dict[int, torch.Tensor] = {}

    def put(self, index: int, data: torch.Tensor) -> None:
        self._units[index] = data.to(get_accelerator().current_device_name(), copy=True)

    def resident(self, index: int) -> torch.Tensor:
        return self._units[index]

    def fetch(self, index: int, into: torch.Tensor, free: DeviceEvent | None) -> LoadHandle:
        raise AssertionError(f"unit {index} is resident")

    def close(self) -> None:
        self._units.clear()
