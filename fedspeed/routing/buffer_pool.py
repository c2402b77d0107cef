"""Memory for what travels. An exchange needs several times its vector, and getting that from the system costs
as much as encrypting it: a page at a time, each filled with zeros. So it stays with the process between
exchanges, and is used again once nobody holds any part of it.
"""

import sys
import threading

import numpy as np

MIN_BYTES = 1 << 18  # smaller ones the allocator keeps by itself


class BufferPool:
    """Whether a piece is in use is told by Python's count of references: every array made from it counts.
    Free ones are given back before more is taken from the system, so that it never holds more than was needed
    at once.
    """

    def __init__(self):
        self._held: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, *shape: int, dtype=np.uint8) -> np.ndarray:
        """An array of undefined content."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if nbytes < MIN_BYTES:
            return np.empty(shape, dtype)
        with self._lock:
            free = self._free()
            fitting = [i for i in free if nbytes <= self._held[i].nbytes <= 2 * nbytes]
            if fitting:
                found = self._held[min(fitting, key=lambda i: self._held[i].nbytes)]
            else:
                self._give_back(free, nbytes)
                found = np.empty(nbytes, np.uint8)
                self._held.append(found)
            return found[:nbytes].view(dtype).reshape(shape)

    @property
    def held_bytes(self) -> int:
        return sum(piece.nbytes for piece in self._held)

    def clear(self) -> None:
        """Give back all that is free."""
        with self._lock:
            self._give_back(self._free(), self.held_bytes)

    def _free(self) -> list[int]:
        return [i for i in range(len(self._held)) if sys.getrefcount(self._held[i]) == _UNUSED]

    def _give_back(self, free: list[int], nbytes: int) -> None:
        for i in reversed(free):
            if nbytes <= 0:
                break
            nbytes -= self._held[i].nbytes
            del self._held[i]


_only_listed = [np.empty(1, np.uint8)]
_UNUSED = sys.getrefcount(_only_listed[0])  # counted just as `_free` does
BUFFERS = BufferPool()
