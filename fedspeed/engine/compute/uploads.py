"""Small tensors on their way to an accelerator, through page-locked host memory."""

from collections.abc import Sequence

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.engine.base.page_locks import report_unpinned


def pinned_tensor(shape: Sequence[int], dtype: torch.dtype, what: str) -> torch.Tensor:
    """Make a page-locked tensor, or an ordinary one where the driver has no more, and say so."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        ordinary = torch.empty(shape, dtype=dtype)
        report_unpinned(what, ordinary.nbytes, str(error).partition("\n")[0])
        return ordinary


def upload(tensor: torch.Tensor) -> torch.Tensor:
    """Give a small tensor of host memory on the device, without waiting for what the device has to do
    before.
    """
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
