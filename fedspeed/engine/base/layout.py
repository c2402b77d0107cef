"""Memory layout of the frozen base: the parameters of a unit are one contiguous range of bytes. A unit is a
decoder block, or a module outside the blocks.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fedspeed.models.blocks import units
from fedspeed.schedule.limits import UNIT_ALIGN

TENSOR_ALIGN = 64  # bytes: a cache line, and the alignment that vector loads prefer


@dataclass(frozen=True)
class StoredTensor:
    """Describe where a parameter lies in its unit; offset and nbytes in bytes."""

    name: str
    shape: torch.Size
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """Describe one unit. `nbytes` includes the padding between and after the tensors."""

    name: str
    tensors: tuple[StoredTensor, ...]
    nbytes: int
    dtype: torch.dtype

    def view(self, data: torch.Tensor, tensor: StoredTensor) -> torch.Tensor:
        """Return a parameter as a view of the unit's bytes `data` [nbytes] uint8."""
        return data[tensor.offset : tensor.offset + tensor.nbytes].view(self.dtype).view(tensor.shape)


def pack(name: str, shapes: Iterable[tuple[str, torch.Size]], dtype: torch.dtype) -> Unit:
    """Lay out parameters, given by name and shape, one after the other."""
    tensors = []
    offset = 0
    for tensor_name, shape in shapes:
        nbytes = shape.numel() * dtype.itemsize
        tensors.append(StoredTensor(tensor_name, shape, offset, nbytes))
        offset += _round_up(nbytes, TENSOR_ALIGN)
    return Unit(name, tuple(tensors), _round_up(offset, UNIT_ALIGN), dtype)


def frozen_units(model: nn.Module, only: Container[nn.Parameter] | None = None) -> list[Unit]:
    """Lay out the frozen parameters of a model, which may be on the meta device. Each parameter occurs once,
    in the order of `models.blocks.units`.

    Args:
        only: the parameters to include; None: all.
    """
    seen: set[nn.Parameter] = set()
    found = []
    for name, module, recurse in units(model):
        fresh = [
            (f"{name}.{n}", p)
            for n, p in module.named_parameters(recurse=recurse)
            if not p.requires_grad and p not in seen and (only is None or p in only)
        ]
        seen.update(p for _, p in fresh)
        if fresh:
            found.append(pack(name, [(n, p.shape) for n, p in fresh], fresh[0][1].dtype))
    return found


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
