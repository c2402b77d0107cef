"""Page-locked host memory, which an accelerator reads and writes by itself while the host goes on. Where it
cannot be had, ordinary memory does, and that is said.
"""

import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.log import LOG

LOCKERS = 4  # threads: to lock a page the driver must visit it, and one thread visits a few GiB a second


class PageLocks:
    """Registers parts of a host tensor with the driver, all or none, until `close`. Every rank does so for
    itself: the lock is the driver's, the pages are the same.

    Args:
        memory: [n] uint8. spans: (start, end) of the parts, in bytes, on page borders.
        what: names the memory where it cannot be locked.

    Attributes:
        held: whether the memory is locked now.
    """

    def __init__(self, memory: torch.Tensor, spans: Iterable[tuple[int, int]], what: str):
        driver = torch.cuda.cudart()
        base = memory.data_ptr()
        places = [(base + start, end - start) for start, end in spans if end > start]
        codes = _in_threads(lambda place: int(driver.cudaHostRegister(*place, 0)), places)
        self._driver = driver
        self._addresses = [address for (address, _), code in zip(places, codes) if code == 0]
        self.held = not any(codes)
        if not self.held:
            self._undo()
            report_unpinned(
                what, sum(nbytes for _, nbytes in places), f"CUDA error {next(filter(None, codes))}"
            )

    def close(self) -> None:
        """Undo the locks, once nothing is copied any more."""
        get_accelerator().synchronize()
        self._undo()

    def _undo(self) -> None:
        _in_threads(lambda address: int(self._driver.cudaHostUnregister(address)), self._addresses)
        self._addresses = []
        self.held = False


def pinned_empty(nbytes: int, what: str) -> torch.Tensor:
    """Make a page-locked buffer [nbytes] uint8, or an ordinary one where the driver has no more, and say so.

    Args:
        what: names the buffer where it cannot be locked.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    try:
        return get_accelerator().pin_memory(buffer)
    except RuntimeError as error:
        report_unpinned(what, nbytes, str(error).partition("\n")[0])
        return buffer


_TOLD: set[str] = set()


def report_unpinned(what: str, nbytes: int, error: str) -> None:
    """Say that memory is not page-locked, and what would help; once of each kind."""
    if what in _TOLD:
        return
    _TOLD.add(what)
    LOG.info(
        f"{socket.gethostname()}: {nbytes / 2**30:.2f} GiB for {what} cannot be page-locked ({error}): "
        "copies from "
        "ordinary memory are slower; raise the limit of locked memory (ulimit -l unlimited)"
    )


def _in_threads(function, values: list) -> list:
    """Results in order. The threads are new ones: what fails there leaves no CUDA error behind for the next
    kernel of this thread.
    """
    device = get_accelerator().current_device()
    with ThreadPoolExecutor(LOCKERS, "page-lock", lambda: get_accelerator().set_device(device)) as pool:
        return list(pool.map(function, values))
