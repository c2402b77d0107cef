"""How much device memory the activations of a step may take that are kept for its backward pass, and what
they take.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.cluster.devices import free_memory
from fedspeed.engine.compute.uploads import empty_host_cache

OF_FREE_RAM = (
    0.25  # where ranks compute in RAM, of what is free when the first step begins: others live there too
)
OF_FREE_DEVICE = 0.9  # of what a step has left free on a card: the allocator holds more than tensors take


class ActivationBudget:
    """Bytes for kept activations of one rank.

    Under auto a step on a card that is larger than any before it keeps nothing, and what it leaves free is
    the budget of those that follow.

    Args:
        gib: what the configuration says.
        sharers: ranks that share the device, or the host's memory where that is the device.

    Attributes:
        peak: the most device memory that was taken before the allocator's own count was last set back.
    """

    def __init__(self, gib: float | Literal["auto"], sharers: int):
        self._fixed = None if gib == "auto" else int(gib * 2**30)
        self._sharers = sharers
        self._found = 0
        self._largest = (0, 0)
        self._learns = False
        self.peak = 0

    def begin(self, inputs: Sequence[int]) -> int:
        """What may be kept in the step that begins now.

        Args:
            inputs: bytes of a block's input, of each micro-batch of the step.
        """
        if self._fixed is not None:
            return self._fixed
        accelerator = get_accelerator()
        size = max(inputs), sum(inputs)
        larger = any(now > before for now, before in zip(size, self._largest))
        if larger and accelerator.is_synchronized_device():
            self._found = int(free_memory() * OF_FREE_RAM / self._sharers)
        elif larger:
            self._learns = True
            self._found = 0
            self.peak = max(self.peak, accelerator.max_memory_allocated())
            accelerator.reset_peak_memory_stats()
        self._largest = tuple(map(max, size, self._largest))
        return self._found

    def step_done(self) -> None:
        """Learn from a step what the card has left."""
        if self._learns:
            self._learns = False
            empty_host_cache()  # inputs that waited on the host may stay on the device from now on
            self._found = max(
                0, int((self._obtainable_bytes() - get_accelerator().max_memory_allocated()) * OF_FREE_DEVICE)
            )

    def give_up(self) -> bool:
        """Keep nothing from now on, where something was kept because it seemed to fit; whether that was
        so.
        """
        if self._fixed is not None or not self._found:
            return False
        self._found = 0
        self._largest = (sys.maxsize, sys.maxsize)
        self._learns = False
        return True

    def _obtainable_bytes(self) -> int:
        """Bytes of the card that this process has or could get."""
        accelerator = get_accelerator()
        held = accelerator.memory_reserved()
        if accelerator.device_name() != "cuda":
            return held + accelerator.available_memory() // self._sharers
        free, total = torch.cuda.mem_get_info()
        fraction = getattr(
            torch.cuda, "get_per_process_memory_fraction", lambda: 1.0
        )  # an older torch does not tell
        return min(held + free // self._sharers, int(fraction() * total))


class SavedBytesCounter(torch.autograd.graph.saved_tensors_hooks):
    """While active, counts the bytes of tensors that graphs save, each storage once; those of `others`
    (weights, inputs, what blocks share) are not counted.
    """

    def __init__(self, others: Iterable[torch.Tensor]):
        self._seen = {tensor.untyped_storage()._cdata for tensor in others}
        self.nbytes = 0
        super().__init__(self._count, lambda saved: saved)

    def __enter__(self) -> "SavedBytesCounter":
        super().__enter__()
        return self

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.nbytes += storage.nbytes()
        return tensor
