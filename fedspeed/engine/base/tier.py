"""What a tier is: where units of the frozen base may live, and how one comes onto the device."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.base.layout import Unit


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


def copy_bytes(into: torch.Tensor, source: torch.Tensor) -> int:
    np.copyto(into.numpy()[:len(source)], source.numpy())  # in this thread alone: torch would take the cores of the arithmetic
    return len(source)


def copy_in_stream(stream, into: torch.Tensor, source: torch.Tensor, free) -> Copied:
    """Copy in `stream`, after `free` (the event after which the slot's last content is no longer read)."""
    with get_accelerator().stream(stream):
        if free is not None:
            stream.wait_event(free)
        into[:len(source)].copy_(source, non_blocking=True)
        event = get_accelerator().Event()
        event.record(stream)
    return Copied(event, len(source))
