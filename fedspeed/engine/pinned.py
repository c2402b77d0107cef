"""Page-locked host memory, which an accelerator reads and writes by itself while the host goes on. Where it
cannot be had, ordinary memory does, and that is said."""

import socket
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from deepspeed.accelerator import get_accelerator

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
        driver, base = torch.cuda.cudart(), memory.data_ptr()
        places = [(base + start, end - start) for start, end in spans if end > start]
        codes = _in_threads(lambda place: int(driver.cudaHostRegister(*place, 0)), places)
        self._driver = driver
        self._addresses = [address for (address, _), code in zip(places, codes) if code == 0]
        self.held = not any(codes)
        if not self.held:
            self._undo()
            told_ordinary(
                what, sum(nbytes for _, nbytes in places), f"CUDA error {next(filter(None, codes))}"
            )

    def close(self) -> None:
        """Undo the locks, once nothing is copied any more."""
        get_accelerator().synchronize()
        self._undo()

    def _undo(self) -> None:
        _in_threads(lambda address: int(self._driver.cudaHostUnregister(address)), self._addresses)
        self._addresses, self.held = [], False


def pinned_empty(nbytes: int, what: str) -> torch.Tensor:
    """Make a page-locked buffer [nbytes] uint8, or an ordinary one where the driver has no more, and say so.

    Args:
        what: names the buffer where it cannot be locked.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    try:
        return get_accelerator().pin_memory(buffer)
    except RuntimeError as error:
        told_ordinary(what, nbytes, str(error).partition("\n")[0])
        return buffer


def pinned_tensor(shape: Sequence[int], dtype: torch.dtype, what: str) -> torch.Tensor:
    """Make a page-locked tensor, or an ordinary one where the driver has no more, and say so."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        ordinary = torch.empty(shape, dtype=dtype)
        told_ordinary(what, ordinary.nbytes, str(error).partition("\n")[0])
        return ordinary


def upload(tensor: torch.Tensor) -> torch.Tensor:
    """Give a small tensor of host memory on the device, without waiting for what the device has to do before."""
    accelerator = get_accelerator()
    if accelerator.is_synchronized_device():
        return tensor
    staged = pinned_tensor(tensor.shape, tensor.dtype, "micro-batches").copy_(tensor)
    return staged.to(accelerator.current_device_name(), non_blocking=True)


def upload_rows(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Give some rows of a table [rows, width] in host memory on the device, [*numbers.shape, width]."""
    accelerator = get_accelerator()
    if accelerator.is_synchronized_device():
        return torch.nn.functional.embedding(numbers, table)
    staged = pinned_tensor((numbers.numel(), table.shape[1]), table.dtype, "micro-batches")
    torch.index_select(table, 0, numbers.reshape(-1), out=staged)
    return staged.view(*numbers.shape, -1).to(accelerator.current_device_name(), non_blocking=True)


def empty_host_cache() -> None:
    """Give back page-locked memory that torch keeps for later, where this torch can."""
    release = getattr(torch.accelerator, "empty_host_cache", None)
    if release is not None and torch.accelerator.is_available():
        release()


_TOLD: set[str] = set()


def told_ordinary(what: str, nbytes: int, error: str) -> None:
    """Say that memory is not page-locked, and what would help; once of each kind."""
    if what in _TOLD:
        return
    _TOLD.add(what)
    print(
        f"fedspeed: {socket.gethostname()}: {nbytes / 2**30:.2f} GiB for {what} cannot be page-locked ({error}): "
        "copies from ordinary memory are slower; raise the limit of locked memory (ulimit -l unlimited)",
        file=sys.stderr,
        flush=True,
    )


def _in_threads(function, values: list) -> list:
    """Results in order. The threads are new ones: what fails there leaves no CUDA error behind for the next
    kernel of this thread."""
    device = get_accelerator().current_device()
    with ThreadPoolExecutor(LOCKERS, "page-lock", lambda: get_accelerator().set_device(device)) as pool:
        return list(pool.map(function, values))
