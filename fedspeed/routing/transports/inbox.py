"""What has come from one peer before it was asked for, between the thread that reads and the one that
asks.
"""

import queue
import threading
from collections import deque
from typing import Any


class Inbox:
    """Holds up who reads, and so the peer, while it is full.

    Args:
        most: entries that may wait. most_bytes: of them together; one alone may be larger.
    """

    def __init__(self, most: int, most_bytes: int):
        self._most = most
        self._most_bytes = most_bytes
        self._entries: deque[tuple[Any, int]] = deque()
        self._bytes, self._closed, self._changed = 0, False, threading.Condition()

    def make_room(self, nbytes: int) -> None:
        """Wait until an entry of so many bytes may be read: before memory is taken for it.

        Raises:
            ConnectionAbortedError: the inbox has been closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(nbytes))
            if self._closed:
                raise ConnectionAbortedError("closed on this side")

    def put(self, entry: Any, nbytes: int = 0) -> None:
        """Add an entry for which there is room."""
        with self._changed:
            self._entries.append((entry, nbytes))
            self._bytes += nbytes
            self._changed.notify_all()

    def get(self, timeout_s: float) -> Any:
        """Return the next entry.

        Raises:
            queue.Empty: none has come in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._entries, timeout_s):
                raise queue.Empty
            entry, nbytes = self._entries.popleft()
            self._bytes -= nbytes
            self._changed.notify_all()
            return entry

    def close(self) -> None:
        """Drop what waits, and release who waits for room."""
        with self._changed:
            self._closed = True
            self._bytes = 0
            self._entries.clear()
            self._changed.notify_all()

    def _has_room(self, nbytes: int) -> bool:
        is_small = not self._entries or self._bytes + nbytes <= self._most_bytes
        return len(self._entries) < self._most and is_small
