"""The memory budget for activations that a step keeps for its backward pass, and a counter of what they
take.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.cluster.devices import free_memory
from fedspeed.engine.compute.uploads import empty_host_cache

FRACTION_OF_FREE_RAM = 0.25  # on a CPU, of the RAM that is free when the first step begins
FRACTION_OF_FREE_DEVICE = (
    0.9  # on a GPU, of what a step has left free: the allocator needs more than tensors do
)


class ActivationBudget:
    """Decide how many bytes of activations one rank may keep on its device.

    With `auto` on a GPU, a step that is larger than all before it keeps nothing, and the memory that it
    leaves free is the budget of the following steps.

    Args:
        gib: value of engine.activation_gib.
        sharers: number of ranks that share the device; on a CPU, the host's memory.

    Attributes:
        peak: the largest device memory in use, in bytes, before the allocator's own peak was last reset.
    """

    def __init__(self, gib: float | Literal["auto"], sharers: int):
        self._fixed = None if gib == "auto" else int(gib * 2**30)
        self._sharers = sharers
        self._budget = 0
        self._largest = (0, 0)  # of all steps so far: bytes of the largest input, and of a step's inputs
        self._measuring = False
        self.peak = 0

    def begin(self, inputs: Sequence[int]) -> int:
        """Return the bytes that the step which begins now may keep.

        Args:
            inputs: bytes of a block's input for each micro-batch of the step.
        """
        if self._fixed is not None:
            return self._fixed
        accelerator = get_accelerator()
        size = max(inputs), sum(inputs)
        larger = any(now > before for now, before in zip(size, self._largest))
        if larger and accelerator.is_synchronized_device():
            self._budget = int(free_memory() * FRACTION_OF_FREE_RAM / self._sharers)
        elif larger:
            self._measuring = True
            self._budget = 0
            self.peak = max(self.peak, accelerator.max_memory_allocated())
            accelerator.reset_peak_memory_stats()
        self._largest = max(size[0], self._largest[0]), max(size[1], self._largest[1])
        return self._budget

    def step_done(self) -> None:
        """Set the budget to what the step has left free, if this step was the largest so far."""
        if self._measuring:
            self._measuring = False
            empty_host_cache()  # block inputs stored on the host may stay on the device from now on
            left = self._obtainable_bytes() - get_accelerator().max_memory_allocated()
            self._budget = max(0, int(left * FRACTION_OF_FREE_DEVICE))

    def give_up(self) -> bool:
        """Keep nothing from now on, after memory has run out; returns whether something was kept under
        `auto`.
        """
        if self._fixed is not None or not self._budget:
            return False
        self._budget = 0
        self._largest = (sys.maxsize, sys.maxsize)
        self._measuring = False
        return True

    def _obtainable_bytes(self) -> int:
        """Return the bytes of the GPU that this process has reserved or could reserve."""
        accelerator = get_accelerator()
        reserved = accelerator.memory_reserved()
        if accelerator.device_name() != "cuda":
            return reserved + accelerator.available_memory() // self._sharers
        free, total = torch.cuda.mem_get_info()
        # An older torch lacks this function, and has no such limit then.
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)
        return min(reserved + free // self._sharers, int(fraction() * total))


class SavedBytesCounter(torch.autograd.graph.saved_tensors_hooks):
    """Count, while active, the bytes of tensors that autograd saves for the backward pass, each storage once.

    Args:
        excluded: tensors that are not counted (weights, inputs, arguments that all blocks share).

    Attributes:
        nbytes: the count.
    """

    def __init__(self, excluded: Iterable[torch.Tensor]):
        self._seen = {tensor.untyped_storage()._cdata for tensor in excluded}
        self.nbytes = 0
        super().__init__(self._count, lambda saved: saved)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.nbytes += storage.nbytes()
        return tensor
