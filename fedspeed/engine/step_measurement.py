"""Measure the local steps of an engine: their seconds, and the device memory that the first one takes."""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.folded import FoldedAdapter
from fedspeed.engine.memory_counter import TensorMemoryCounter, storage_bytes


class StepMeasurement:
    """The part of a `ClientEngine` that measures its local steps."""

    _device: torch.device
    _folded: FoldedAdapter

    def _begin_measuring(self) -> None:
        """Start without a step."""
        # Device memory on a CPU, which is counted in the first step (see device_bytes).
        self._counter: TensorMemoryCounter | None = None
        self._persistent_bytes = 0  # of tensors that exist between steps
        self._peak_bytes = 0  # of the first step
        self._peak_folded_bytes = 0  # of the folded adapter, included in _peak_bytes
        self._current_step_s = 0.0  # seconds of the current step so far
        self._step_s: list[float] = []  # seconds of each step since take_step_s

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the seconds of a part of a step, and on a CPU the memory of the first step."""
        if self._counter is None and not self._peak_bytes and get_accelerator().is_synchronized_device():
            self._persistent_bytes = storage_bytes(self._persistent_tensors())
            self._counter = TensorMemoryCounter()
        begin = time.perf_counter()
        with self._counter or nullcontext():
            yield
        self._current_step_s += time.perf_counter() - begin

    def end_step(self) -> None:
        """End the measurement of a local step. `ClientEngine.step` does so; a method that computes something
        in a local step, and then takes no optimizer step, calls this instead.
        """
        if self._counter is not None:
            self._peak_bytes = self._persistent_bytes + self._counter.peak
            self._counter = None
            self._peak_folded_bytes = self._folded.bytes
        else:
            self._step_s.append(self._current_step_s)
        self._current_step_s = 0.0

    @property
    def device_bytes(self) -> int:
        """The most bytes that tensors have taken on this rank's device so far, according to its allocator. On
        a CPU it is the count of the first step, and 0 before (DeepSpeed would return the memory of the whole
        process).
        """
        if not get_accelerator().is_synchronized_device():
            return get_accelerator().max_memory_allocated()
        if not self._peak_bytes:
            return 0
        return self._peak_bytes + max(0, self._folded.peak - self._peak_folded_bytes)

    def _persistent_tensors(self) -> list[torch.Tensor]:
        """Return the tensors on the device that exist between two steps, without offloaded ones."""
        away = {t.untyped_storage()._cdata for t in self._away()}
        return [
            t
            for t in gc.get_objects()
            if issubclass(type(t), torch.Tensor)
            and t.device.type == self._device.type
            and t.untyped_storage()._cdata not in away
        ]

    def _away(self) -> list[torch.Tensor]:
        """Return the host memory of offloaded tensors. On a CPU it must not be counted as device memory."""
        return []

    def take_step_s(self) -> float:
        """Return the median seconds of a step of all client slots since the last call; 0 if there was none.
        The step in which memory is counted is left out.
        """
        taken = self._step_s
        self._step_s = []
        return statistics.median(taken) if taken else 0.0
