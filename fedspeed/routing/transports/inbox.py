"""What one peer has sent before it was asked for, between the thread that reads and the one that asks."""

import queue
import threading
from collections import deque
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Inbox(Generic[Entry]):
    """A queue that blocks the reading thread, and thereby the peer, while it is full."""

    def __init__(self, max_entries: int, max_bytes: int):
        """Bound the entries that may wait, and their bytes together; a single entry may be larger."""
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: deque[tuple[Entry, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def make_room(self, nbytes: int) -> None:
        """Wait until an entry of so many bytes may be read, before memory is allocated for it.

        Raises:
            ConnectionAbortedError: the inbox has been closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(nbytes))
            if self._closed:
                raise ConnectionAbortedError("closed on this side")

    def put(self, entry: Entry, nbytes: int = 0) -> None:
        """Add an entry for which there is room."""
        with self._changed:
            self._entries.append((entry, nbytes))
            self._bytes += nbytes
            self._changed.notify_all()

    def get(self, timeout_s: float) -> Entry:
        """Return the next entry.

        Raises:
            queue.Empty: none has arrived in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._entries, timeout_s):
                raise queue.Empty
            entry, nbytes = self._entries.popleft()
            self._bytes -= nbytes
            self._changed.notify_all()
            return entry

    def close(self) -> None:
        """Drop all entries, and release a thread that waits for room."""
        with self._changed:
            self._closed = True
            self._bytes = 0
            self._entries.clear()
            self._changed.notify_all()

    def _has_room(self, nbytes: int) -> bool:
        fits = not self._entries or self._bytes + nbytes <= self._max_bytes
        return len(self._entries) < self._max_entries and fits
