"""Store the inputs of blocks between the forward and the backward pass, on the device or in host memory.

Copies to and from the host have streams of their own. In the stream that loads weights each copy would wait
behind the weights, which are many times larger.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.compute.uploads import pinned_tensor
from fedspeed.engine.device_events import DeviceEvent, DeviceStream, event_after_queued_work
from fedspeed.schedule.limits import CARRIED


@dataclass
class StoredInput:
    """One input of a block.

    Attributes:
        host: its copy in host memory, if it is stored there.
        device: the tensor on the device; None while it is on the host only.
        arrived: the event after which the copy back to the device is done.
    """

    host: torch.Tensor | None
    device: torch.Tensor | None
    arrived: DeviceEvent | None = None

    def take(self) -> torch.Tensor:
        """Remove and return the input on the device; computation with it waits until it has arrived."""
        if self.arrived is not None:
            get_accelerator().current_stream().wait_event(self.arrived)
        taken = self.device
        assert taken is not None, "an input on the host must be brought back before it is taken"
        self.host = None
        self.device = None
        return taken


@dataclass
class _Offload:
    """The copies to the host of one block's inputs. The inputs are kept alive until the computation waits for
    the event after the last copy.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    sent: DeviceEvent | None = None


class BlockInputs:
    """Store inputs on the device or in host memory, and bring them back. On a CPU, device and host memory are
    the same and nothing is copied.
    """

    def __init__(self) -> None:
        separate = not get_accelerator().is_synchronized_device()
        self._down: DeviceStream | None = get_accelerator().Stream() if separate else None
        self._up: DeviceStream | None = get_accelerator().Stream() if separate else None
        self._offloads: deque[_Offload] = deque()

    def begin_block(self) -> None:
        """Expect the next block's inputs. Copies of at most two blocks are in progress, so that a bounded
        number of inputs takes device memory.
        """
        while len(self._offloads) >= CARRIED:
            self._wait_for(self._offloads.popleft())
        self._offloads.append(_Offload())

    def put(self, hidden: torch.Tensor, on_host: bool) -> StoredInput:
        """Store a block's input; with `on_host` its copy to host memory begins."""
        if self._down is None or not on_host:
            return StoredInput(None, hidden)
        accelerator = get_accelerator()
        host = pinned_tensor(hidden.shape, hidden.dtype, "the inputs of blocks")
        self._down.wait_event(event_after_queued_work())
        with accelerator.stream(self._down):
            host.copy_(hidden, non_blocking=True)
            sent = accelerator.Event()
            sent.record(self._down)
        self._offloads[-1].sent = sent
        self._offloads[-1].inputs.append(hidden)
        return StoredInput(host, None)

    def end_forward(self) -> None:
        """End the forward pass, after which no more inputs are stored."""
        while self._offloads:
            self._wait_for(self._offloads.popleft())

    def forget(self) -> None:
        """Release the inputs in progress after a pass that has failed. The device must have been
        synchronised.
        """
        self._offloads.clear()

    def _wait_for(self, offload: _Offload) -> None:
        """Let the computation wait until a block's inputs are copied; only then may it overwrite them."""
        if offload.sent is not None:
            get_accelerator().current_stream().wait_event(offload.sent)

    def prefetch(self, inputs: Sequence[StoredInput]) -> None:
        """Start to copy a block's inputs back. Call this one block early."""
        offloaded = [(stored, stored.host) for stored in inputs if stored.device is None]
        if not offloaded:
            return
        assert self._up is not None, "without an accelerator all inputs stay on the device"
        accelerator = get_accelerator()
        device = accelerator.current_device_name()
        copies = []
        for stored, host in offloaded:
            assert host is not None, "an input that was taken cannot be brought back"
            stored.device = torch.empty(host.shape, dtype=host.dtype, device=device)
            copies.append((stored, stored.device, host))
        # The memory of the new tensors may have belonged to tensors that queued work still reads. The queued
        # work includes waiting until these are copied to the host (`end_forward`).
        self._up.wait_event(event_after_queued_work())
        with accelerator.stream(self._up):
            for stored, target, host in copies:
                target.copy_(host, non_blocking=True)
                stored.arrived = accelerator.Event()
                stored.arrived.record(self._up)
