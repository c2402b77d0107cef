"""Memory for messages that is used again. An exchange needs several times the memory of its vector. Getting
it from the system costs as much as encrypting it: a page at a time, each filled with zeros.
"""

import math
import sys
import threading

import numpy as np
from numpy.typing import DTypeLike

MIN_BYTES = 1 << 18  # smaller arrays are left to the allocator, which keeps their memory by itself
SLACK = 1.25  # bytes that may be allocated, as a multiple of the most that were in use at once
_ALIGNMENT = 64  # bytes of a cache line


class _Segment:
    """Memory from the system, and the gaps in it: the byte ranges that are free, by their start."""

    def __init__(self, nbytes: int):
        """Allocate `nbytes`, all of them free."""
        self.memory = np.empty(nbytes, np.uint8)
        self.ends = {0: nbytes}  # of each gap, by its start
        self._starts = {nbytes: 0}  # of each gap, by its end

    @property
    def is_free(self) -> bool:
        """Whether nothing of it is in use."""
        return self.ends.get(0) == self.memory.nbytes

    def cut(self, start: int, nbytes: int) -> np.ndarray:
        """Take a block off the beginning of the gap at `start`."""
        end = self.ends.pop(start)
        if start + nbytes < end:
            self.ends[start + nbytes] = end
            self._starts[end] = start + nbytes
        else:
            del self._starts[end]
        # The base of a view is the first array under it that is not itself a view of an array. This one is a
        # view of a memoryview, so that it is what every view of the block refers to.
        return np.frombuffer(self.memory.data[start : start + nbytes], np.uint8)

    def give_back(self, start: int, nbytes: int) -> None:
        """Make a block free again, in one gap with what is free beside it."""
        end = start + nbytes
        start = self._starts.pop(start, start)
        end = self.ends.pop(end, end)
        self.ends[start] = end
        self._starts[end] = start


class BufferPool:
    """A pool of memory that stays with the process.

    A block of it is free once no array refers to it any more: this is read from Python's reference count,
    which counts every view that was made from it. A request gets the smallest gap that is large enough, so
    that the many small blocks of one phase and the few large ones of the next share the same memory. Where
    there is no such gap, free segments are released before more memory is allocated, so that the pool never
    holds more than SLACK times what was needed at once.
    """

    def __init__(self) -> None:
        """Start with no memory."""
        self._segments: list[_Segment] = []
        self._blocks: list[np.ndarray] = []  # in use, as far as is known
        self._places: list[tuple[_Segment, int]] = []  # of each block: its segment, and where it starts
        self._used = 0  # bytes of all blocks
        self._most_used = 0
        self._lock = threading.Lock()

    def take(self, *shape: int, dtype: DTypeLike = np.uint8) -> np.ndarray:
        """Return an array of undefined content."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes < MIN_BYTES:
            return np.empty(shape, dtype)
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._collect()
            self._used += size
            self._most_used = max(self._most_used, self._used)
            segment, start = self._gap_of(size)
            block = segment.cut(start, size)
            self._blocks.append(block)
            self._places.append((segment, start))
            return block[:nbytes].view(dtype).reshape(shape)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all memory, free and used."""
        return sum(segment.memory.nbytes for segment in self._segments)

    def clear(self) -> None:
        """Release all segments of which nothing is in use."""
        with self._lock:
            self._collect()
            self._most_used = self._used
            self._release(self.allocated_bytes)

    def _collect(self) -> None:
        """Make the blocks free that no array refers to any more."""
        blocks = self._blocks
        unused = [i for i in range(len(blocks)) if sys.getrefcount(blocks[i]) == _UNUSED]
        for i in reversed(unused):
            segment, start = self._places.pop(i)
            size = self._blocks.pop(i).nbytes
            segment.give_back(start, size)
            self._used -= size

    def _gap_of(self, size: int) -> tuple[_Segment, int]:
        """Return the smallest gap of at least `size` bytes: its segment, and where it starts."""
        best: tuple[_Segment, int] | None = None
        smallest = sys.maxsize
        for segment in self._segments:
            for start, end in segment.ends.items():
                if size <= end - start < smallest:
                    smallest = end - start
                    best = (segment, start)
        if best is None:
            self._release(self.allocated_bytes + size - int(SLACK * self._most_used))
            self._segments.append(_Segment(size))
            best = (self._segments[-1], 0)
        return best

    def _release(self, nbytes: int) -> None:
        """Release free segments of at least `nbytes` together, or all of them; the smallest first."""
        for segment in sorted(self._segments, key=lambda segment: segment.memory.nbytes):
            if nbytes <= 0:
                break
            if segment.is_free:
                self._segments.remove(segment)
                nbytes -= segment.memory.nbytes


# The reference count of an array that only a list refers to, read just as `_collect` reads it.
_only_listed = [np.empty(1, np.uint8)]
_UNUSED = sys.getrefcount(_only_listed[0])
BUFFERS = BufferPool()
