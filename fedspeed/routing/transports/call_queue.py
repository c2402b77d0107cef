"""Calls that are made one after the other in a thread of their own."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from fedspeed.routing.transports.frames import Gone, Received

Call = Callable[[], Received]


class CallQueue:
    """The reads of one connection.

    It is no executor, because Python waits for an executor's threads when it ends.
    """

    def __init__(self) -> None:
        """Start with no calls; `work` makes them."""
        self._calls: queue.SimpleQueue[tuple[Call, Future[Received]] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, call: Callable[[], Received]) -> "Future[Received]":
        """Return the future result of a call; after `close`, that the peer is gone."""
        result: Future[Received] = Future()
        with self._lock:
            if self._closed:
                result.set_result(Gone("closed on this side"))
            else:
                self._calls.put((call, result))
        return result

    def work(self) -> None:
        """Make calls until the queue is closed. An exception is raised by the result."""
        while (entry := self._calls.get()) is not None:
            call, result = entry
            try:
                result.set_result(call())
            except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it
                result.set_exception(error)

    def close(self) -> None:
        """End `work` after the calls that were submitted before."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._calls.put(None)
