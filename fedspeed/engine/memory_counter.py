"""Device memory on a machine without an accelerator, counted tensor by tensor."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TensorMemoryCounter(TorchDispatchMode):
    """Count, while active, the bytes of tensors that operations allocate, until the tensors are freed.

    Tensors that existed before are not counted. Views add nothing, since they share their storage. Every
    operation takes some microseconds longer, so the counter is meant for one step, not for a run. An
    accelerator's allocator counts by itself.

    Attributes:
        now: bytes allocated and not freed yet.
        peak: the largest value of `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((*args, *kwargs.values()))}
        out = func(*args, **kwargs)
        for tensor in _tensors((out,)):
            if tensor.device.type != "meta":
                self._note(tensor.untyped_storage(), known)
        return out

    def _note(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in known or key in self._live:
            return
        self._live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key)


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    """Yield the tensors among arguments or results of an operation, also those inside lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages of some tensors, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
