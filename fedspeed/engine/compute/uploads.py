"""Copy small tensors to an accelerator through page-locked host memory."""

from collections.abc import Sequence

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.base.page_locks import report_unpinned


def pinned_tensor(shape: Sequence[int], dtype: torch.dtype, what: str) -> torch.Tensor:
    """Make a page-locked tensor, or an ordinary one where the driver has no more such memory, and log that.

    Args:
        what: what the memory is for, in the log.
    """
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        ordinary = torch.empty(shape, dtype=dtype)
        report_unpinned(what, ordinary.nbytes, str(error).partition("\n")[0])
        return ordinary


def upload(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a small tensor from host memory to the device, without waiting for the work that the device has
    queued.
    """
    accelerator = get_accelerator()
    if accelerator.is_synchronized_device():
        return tensor
    staged = pinned_tensor(tensor.shape, tensor.dtype, "micro-batches").copy_(tensor)
    return staged.to(accelerator.current_device_name(), non_blocking=True)


def upload_rows(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Copy some rows of a table [rows, width] from host memory to the device: [*numbers.shape, width]."""
    accelerator = get_accelerator()
    if accelerator.is_synchronized_device():
        return torch.nn.functional.embedding(numbers, table)
    staged = pinned_tensor((numbers.numel(), table.shape[1]), table.dtype, "micro-batches")
    torch.index_select(table, 0, numbers.reshape(-1), out=staged)
    return staged.view(*numbers.shape, -1).to(accelerator.current_device_name(), non_blocking=True)


def empty_host_cache() -> None:
    """Free the page-locked memory that torch keeps for reuse, if this version of torch can."""
    release = getattr(torch.accelerator, "empty_host_cache", None)
    if release is not None and torch.accelerator.is_available():
        release()
