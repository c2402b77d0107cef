"""What every place of the frozen base has in common, and the one where nothing is loaded."""

from abc import ABC, abstractmethod

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.base.layout import Unit


class Tier(ABC):
    """What all tiers have: `put` takes a unit once, at the start; `fetch` begins to bring it into a slot and
    returns a handle whose `wait` gives the bytes that were moved.

    Attributes:
        matched_group: the ranks that must fetch in the same order; None where every rank may go on alone.
    """

    name = ""
    matched_group = None

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


class ResidentTier(Tier):
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
