"""How bytes of a unit come into its slot, and what is waited for: by a thread, or in an accelerator's own
stream.
"""

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


class Done:
    """Handle of a load that a thread makes."""

    def __init__(self, futures):
        self._futures = futures

    def wait(self) -> int:
        return sum(future.result() for future in self._futures)


class Copied:
    """Handle of copies in an accelerator's own stream: waiting holds up the device's arithmetic, not the
    host.
    """

    def __init__(self, event, nbytes: int):
        self._event = event
        self._nbytes = nbytes

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


def copy(into: torch.Tensor, source: torch.Tensor) -> int:
    np.copyto(
        into.numpy()[: len(source)], source.numpy()
    )  # in this thread alone: torch would take the cores of the arithmetic
    return len(source)


def copy_in_stream(stream, into: torch.Tensor, source: torch.Tensor, free) -> Copied:
    """Copy in `stream`, after `free` (the event after which the slot's last content is no longer read)."""
    with get_accelerator().stream(stream):
        if free is not None:
            stream.wait_event(free)
        into[: len(source)].copy_(source, non_blocking=True)
        event = get_accelerator().Event()
        event.record(stream)
    return Copied(event, len(source))
