"""Device memory on a machine without an accelerator, counted tensor by tensor."""

import weakref
from collections.abc import Iterable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TensorMemoryCounter(TorchDispatchMode):
    """While active, counts the bytes of tensors that operations make, from their making until nothing refers
    to them any more.

    What stood before is not counted; views count nothing, they share their storage. Every operation costs
    some microseconds more, so it is meant for one step, not for a run. An accelerator's allocator needs no
    such help.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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
    """Those among the arguments or results of an operation, which are tensors, lists of tensors or none."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def storage_bytes(tensors) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
