"""Memory for messages that is used again. An exchange needs several times the memory of its vector. Getting
it from the system costs as much as encrypting it: a page at a time, each filled with zeros.
"""

import sys
import threading

import numpy as np
from numpy.typing import DTypeLike

MIN_BYTES = 1 << 18  # smaller arrays are left to the allocator, which keeps their memory by itself


class BufferPool:
    """A pool of buffers that stay with the process.

    A buffer is free once no array refers to it any more: this is read from Python's reference count, which
    counts every view that was made from it. Free buffers are released before more memory is allocated, so the
    pool never holds more than was needed at once.
    """

    def __init__(self) -> None:
        """Start with no memory."""
        self._buffers: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, *shape: int, dtype: DTypeLike = np.uint8) -> np.ndarray:
        """Return an array of undefined content."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if nbytes < MIN_BYTES:
            return np.empty(shape, dtype)
        with self._lock:
            free = self._free()
            fitting = [i for i in free if nbytes <= self._buffers[i].nbytes <= 2 * nbytes]
            if fitting:
                buffer = self._buffers[min(fitting, key=lambda i: self._buffers[i].nbytes)]
            else:
                self._release(free, nbytes)
                buffer = np.empty(nbytes, np.uint8)
                self._buffers.append(buffer)
            return buffer[:nbytes].view(dtype).reshape(shape)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all buffers, free and used."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def clear(self) -> None:
        """Release all free buffers."""
        with self._lock:
            self._release(self._free(), self.allocated_bytes)

    def _free(self) -> list[int]:
        return [i for i in range(len(self._buffers)) if sys.getrefcount(self._buffers[i]) == _UNUSED]

    def _release(self, free: list[int], nbytes: int) -> None:
        """Release free buffers of at least `nbytes` together, or all of them."""
        for i in reversed(free):
            if nbytes <= 0:
                break
            nbytes -= self._buffers[i].nbytes
            del self._buffers[i]


# The reference count of a buffer that only the pool's list refers to, read just as `_free` reads it.
_only_listed = [np.empty(1, np.uint8)]
_UNUSED = sys.getrefcount(_only_listed[0])
BUFFERS = BufferPool()
