"""How the frozen base lies in memory: one run of bytes a unit. A unit is a decoder block, or a module outside
the blocks.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fedspeed.models.blocks import units
from fedspeed.schedule.limits import UNIT_ALIGN

PIECE_ALIGN = 64  # bytes; a cache line, and what vector loads like


@dataclass(frozen=True)
class Piece:
    """A parameter's place in its unit; offset and nbytes in bytes."""

    name: str
    shape: torch.Size
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """`nbytes` includes the padding between and after the pieces."""

    name: str
    pieces: tuple[Piece, ...]
    nbytes: int
    dtype: torch.dtype

    def view(self, data: torch.Tensor, piece: Piece) -> torch.Tensor:
        """The parameter in `data` [nbytes] uint8, without a copy."""
        return data[piece.offset : piece.offset + piece.nbytes].view(self.dtype).view(piece.shape)


def pack(name: str, shapes: Iterable[tuple[str, torch.Size]], dtype: torch.dtype) -> Unit:
    """Lay parameters behind each other."""
    pieces = []
    at = 0
    for piece, shape in shapes:
        nbytes = shape.numel() * dtype.itemsize
        pieces.append(Piece(piece, shape, at, nbytes))
        at += _up(nbytes, PIECE_ALIGN)
    return Unit(name, tuple(pieces), _up(at, UNIT_ALIGN), dtype)


def frozen_units(model: nn.Module, only: Container[nn.Parameter] | None = None) -> list[Unit]:
    """The frozen parameters of a model (it may be on the meta device), each once, in the order of
    `models.blocks.units`; all, or those in `only`.
    """
    seen = set()
    out = []
    for name, module, recurse in units(model):
        fresh = [
            (f"{name}.{n}", p)
            for n, p in module.named_parameters(recurse=recurse)
            if not p.requires_grad and p not in seen and (only is None or p in only)
        ]
        seen.update(p for _, p in fresh)
        if fresh:
            out.append(pack(name, [(n, p.shape) for n, p in fresh], fresh[0][1].dtype))
    return out


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
