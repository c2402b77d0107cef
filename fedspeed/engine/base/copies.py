"""Copies of a unit's bytes into its slot, made by a thread or in a stream of the accelerator."""

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.device_events import DeviceEvent, DeviceStream


class HostCopy:
    """Handle of a copy that threads make in host memory.

    Args:
        futures: give the number of bytes that each thread has copied.
    """

    def __init__(self, futures: Sequence[Future[int]]):
        self._futures = futures

    def wait(self) -> int:
        """Wait for the threads; returns the number of bytes."""
        return sum(future.result() for future in self._futures)


class StreamCopy:
    """Handle of a copy in a stream of the accelerator. Waiting delays the device's computation, not the
    host.
    """

    def __init__(self, event: DeviceEvent, nbytes: int):
        self._event = event
        self._nbytes = nbytes

    def wait(self) -> int:
        """Make the current stream wait for the copy; returns the number of bytes."""
        get_accelerator().current_stream().wait_event(self._event)
        return self._nbytes

    def synchronize(self) -> None:
        """Block the host until the copy is done."""
        self._event.synchronize()


class ThreadedStreamCopy:
    """Handle of a copy that a thread queues in a stream of the accelerator."""

    def __init__(self, future: Future[StreamCopy]):
        self._future = future

    def wait(self) -> int:
        """Wait until the copy is queued, and make the current stream wait for it; returns the number of
        bytes.
        """
        return self._future.result().wait()


def copy(into: torch.Tensor, source: torch.Tensor) -> int:
    """Copy [n] uint8 within host memory; returns n."""
    # numpy copies in this thread alone. torch would occupy the cores that compute.
    np.copyto(into.numpy()[: len(source)], source.numpy())
    return len(source)


def copy_in_stream(
    stream: DeviceStream, into: torch.Tensor, source: torch.Tensor, free: DeviceEvent | None
) -> StreamCopy:
    """Queue a copy of [n] uint8 in `stream`, after `free` (see `Tier.fetch`)."""
    with get_accelerator().stream(stream):
        if free is not None:
            stream.wait_event(free)
        into[: len(source)].copy_(source, non_blocking=True)
        event = get_accelerator().Event()
        event.record(stream)
    return StreamCopy(event, len(source))
