"""Memory for messages that is used again. An exchange needs several times the memory of its vector. Getting
it from the system costs as much as encrypting it: a page at a time, each filled with zeros.
"""

import bisect
import math
import sys
import threading

import numpy as np
from numpy.typing import DTypeLike

MIN_BYTES = 1 << 18  # smaller arrays are left to the allocator, which keeps their memory by itself
SLACK = 1.25  # bytes that may be allocated, as a multiple of the most that were in use at once
_ALIGNMENT = 64  # bytes of a cache line


class _Gaps:
    """The byte ranges of segments that are free. Two of them never touch each other."""

    def __init__(self) -> None:
        """Start without any."""
        self.by_size: list[tuple[int, int, int]] = []  # (bytes, segment, start), sorted
        self._end_of: dict[tuple[int, int], int] = {}  # by segment and start
        self._start_of: dict[tuple[int, int], int] = {}  # by segment and end

    def add(self, segment: int, start: int, end: int) -> None:
        """Add a byte range, in one gap with what is free on both sides of it."""
        before = self._start_of.get((segment, start))
        if before is not None:
            self.remove(segment, before, start)
            start = before
        after = self._end_of.get((segment, end))
        if after is not None:
            self.remove(segment, end, after)
            end = after
        bisect.insort(self.by_size, (end - start, segment, start))
        self._end_of[segment, start] = end
        self._start_of[segment, end] = start

    def remove(self, segment: int, start: int, end: int) -> None:
        """Remove a whole gap."""
        del self.by_size[bisect.bisect_left(self.by_size, (end - start, segment, start))]
        del self._end_of[segment, start]
        del self._start_of[segment, end]


class BufferPool:
    """A pool of memory that stays with the process.

    It consists of segments, which come from the system, and blocks of them that are in use. A block is free
    once no array refers to it any more: this is read from Python's reference count, which counts every view
    that was made from it. A request gets the smallest gap that is large enough, so that the many small blocks
    of one phase and the few large ones of the next share the same memory. Where there is no such gap, free
    segments are released before more memory is allocated, so that the pool never holds more than SLACK times
    what was needed at once.
    """

    def __init__(self) -> None:
        """Start with no memory."""
        self._segments: dict[int, np.ndarray] = {}  # by number
        self._gaps = _Gaps()
        self._blocks: list[np.ndarray] = []  # in use, as far as is known
        self._places: list[tuple[int, int]] = []  # of each block: its segment, and where it starts
        self._next = 0  # number of the next segment
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
            segment, start = self._cut(size)
            # The base of a view is the first array under it that is not itself a view of an array. This one
            # is a view of a memoryview, so that it is what every view of the block refers to.
            block = np.frombuffer(self._segments[segment].data[start : start + size], np.uint8)
            self._blocks.append(block)
            self._places.append((segment, start))
            return block[:nbytes].view(dtype).reshape(shape)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all memory, free and used."""
        return sum([memory.nbytes for memory in self._segments.values()])

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
            size = blocks.pop(i).nbytes
            self._gaps.add(segment, start, start + size)
            self._used -= size

    def _cut(self, size: int) -> tuple[int, int]:
        """Take `size` bytes off the smallest gap that has as many: its segment, and where they start."""
        at = bisect.bisect_left(self._gaps.by_size, (size, 0, 0))
        if at == len(self._gaps.by_size):
            self._release(self.allocated_bytes + size - int(SLACK * self._most_used))
            self._segments[self._next] = np.empty(size, np.uint8)
            self._next += 1
            return self._next - 1, 0
        room, segment, start = self._gaps.by_size[at]
        self._gaps.remove(segment, start, start + room)
        if room > size:
            self._gaps.add(segment, start + size, start + room)
        return segment, start

    def _release(self, nbytes: int) -> None:
        """Release free segments of at least `nbytes` together, or all of them; the smallest first."""
        for size, segment, start in list(self._gaps.by_size):
            if nbytes <= 0:
                break
            if size == self._segments[segment].nbytes:
                self._gaps.remove(segment, start, start + size)
                del self._segments[segment]
                nbytes -= size


# The reference count of an array that only a list refers to, read just as `_collect` reads it.
_only_listed = [np.empty(1, np.uint8)]
_UNUSED = sys.getrefcount(_only_listed[0])
BUFFERS = BufferPool()
