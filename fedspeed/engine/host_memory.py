"""Page-locked host memory, which a device reads and writes while the host goes on; where there is none to be had, ordinary memory does, and it is said once."""

import socket
import sys
from collections.abc import Callable
from functools import cache

import torch
from deepspeed.accelerator import get_accelerator


def upload(tensor: torch.Tensor) -> torch.Tensor:
    """Give a small tensor of host memory on the device, without waiting for what the device has to do before."""
    accelerator = get_accelerator()
    if accelerator.is_synchronized_device():
        return tensor
    return page_locked(tensor).to(accelerator.current_device_name(), non_blocking=True)


def page_locked(tensor: torch.Tensor) -> torch.Tensor:
    """Give a copy in page-locked memory, or the tensor itself where there is none to be had."""
    return _or_ordinary(lambda: get_accelerator().pin_memory(tensor), lambda: tensor)


def page_locked_like(tensor: torch.Tensor) -> torch.Tensor:
    """Give page-locked memory of a tensor's shape and type, or ordinary memory where there is none to be had."""
    return _or_ordinary(lambda: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True),
                        lambda: torch.empty(tensor.shape, dtype=tensor.dtype))


def _or_ordinary(locked: Callable[[], torch.Tensor], ordinary: Callable[[], torch.Tensor]) -> torch.Tensor:
    try:
        return locked()
    except RuntimeError as error:
        say_unlocked(str(error).partition("\n")[0])
        return ordinary()


@cache
def say_unlocked(reason: str) -> None:
    """Say once on stderr that memory could not be page-locked."""
    print(f"fedspeed: {socket.gethostname()}: no page-locked memory to be had ({reason}); copies to the device are slower without it. Raise the limit of "
          "locked memory (ulimit -l unlimited)", file=sys.stderr, flush=True)
