"""Page-locked host memory, which an accelerator can copy from and to while the host continues. Where the
driver refuses to lock memory, ordinary memory is used and a message says so.
"""

import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.log import LOG

LOCK_THREADS = 4  # the driver visits every page that it locks; one thread manages a few GiB a second

Value = TypeVar("Value")


class PageLocks:
    """Page-lock ranges of a host tensor, either all of them or none, until `close`. Every rank locks its own
    mapping of shared pages.

    Args:
        memory: [n] uint8.
        spans: (start, end) of the ranges in bytes, on page borders.
        purpose: names the memory in the message that is logged where it cannot be locked.

    Attributes:
        locked: whether the memory is locked now.
    """

    def __init__(self, memory: torch.Tensor, spans: Iterable[tuple[int, int]], purpose: str):
        driver = torch.cuda.cudart()
        base = memory.data_ptr()
        ranges = [(base + start, end - start) for start, end in spans if end > start]
        codes = _in_threads(lambda span: int(driver.cudaHostRegister(*span, 0)), ranges)
        self._driver = driver
        self._addresses = [address for (address, _), code in zip(ranges, codes) if code == 0]
        self.locked = not any(codes)
        if not self.locked:
            self._undo()
            first_error = next(filter(None, codes))
            report_unpinned(purpose, sum(nbytes for _, nbytes in ranges), f"CUDA error {first_error}")

    def close(self) -> None:
        """Unlock the memory once the device has finished all copies."""
        get_accelerator().synchronize()
        self._undo()

    def _undo(self) -> None:
        _in_threads(lambda address: int(self._driver.cudaHostUnregister(address)), self._addresses)
        self._addresses = []
        self.locked = False


def pinned_empty(nbytes: int, purpose: str) -> torch.Tensor:
    """Allocate a page-locked buffer [nbytes] uint8. Where the driver refuses, log that and allocate an
    ordinary one.

    Args:
        purpose: names the buffer in that message.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    try:
        return get_accelerator().pin_memory(buffer)
    except RuntimeError as error:
        report_unpinned(purpose, nbytes, str(error).partition("\n")[0])
        return buffer


_REPORTED: set[str] = set()


def report_unpinned(purpose: str, nbytes: int, error: str) -> None:
    """Log that memory is not page-locked and how to change that, once for each purpose."""
    if purpose in _REPORTED:
        return
    _REPORTED.add(purpose)
    LOG.info(
        f"{socket.gethostname()}: {nbytes / 2**30:.2f} GiB for {purpose} cannot be page-locked ({error}): "
        "copies from ordinary memory are slower; raise the limit of locked memory (ulimit -l unlimited)"
    )


def _in_threads(function: Callable[[Value], int], values: list[Value]) -> list[int]:
    """Apply a function to values and return the results in order. The threads are new ones, so that a failed
    call leaves no CUDA error behind for the next kernel of the calling thread.
    """
    device = get_accelerator().current_device()
    with ThreadPoolExecutor(LOCK_THREADS, "page-lock", lambda: get_accelerator().set_device(device)) as pool:
        return list(pool.map(function, values))
