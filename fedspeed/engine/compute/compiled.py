"""Compute blocks by code that torch compiles: fewer kernel launches, where a GPU waits for Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_NUMBERS = ("layer_idx",)  # of a block in a cache of keys and values, which compiled blocks do not have


class CompiledBlocks:
    """One compiled function for all blocks of a kind, which takes a block's weights as arguments: so torch
    compiles once a kind, not once a block.

    Args:
        blocks: of the model. Blocks are of a kind if their modules have equal settings: the width of a
            sliding window, for example, or whether positions are rotated.
    """

    def __init__(self, blocks: nn.ModuleList):
        self._blocks = blocks
        self._kinds = [_settings(block) for block in blocks]
        self._function_of = {
            kind: torch.compile(_function(blocks[self._kinds.index(kind)]))
            for kind in dict.fromkeys(self._kinds)
        }

    def __call__(self, b: int, args: tuple, kwargs: dict) -> Any:
        """Compute block `b`."""
        tensors = {**dict(self._blocks[b].named_parameters()), **dict(self._blocks[b].named_buffers())}
        return self._function_of[self._kinds[b]](tensors, args, kwargs)


def _settings(block: nn.Module) -> tuple:
    """List a block's modules by name and type, each with the plain values among its attributes."""
    return tuple(
        (
            name,
            type(module).__name__,
            *((key, _plain(value)) for key, value in sorted(vars(module).items()) if key not in _NUMBERS),
        )
        for name, module in block.named_modules()
    )


def _plain(value: object) -> object:
    """Return a plain value, the plain items of a dictionary, and None for everything else."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):  # PEFT has its scaling in one, by the adapter's name
        return tuple((key, one) for key, one in value.items() if isinstance(one, bool | int | float | str))
    return None


def _function(block: nn.Module) -> Callable[[dict[str, torch.Tensor], tuple, dict], Any]:
    def compute(tensors: dict[str, torch.Tensor], args: tuple, kwargs: dict) -> Any:
        return torch.func.functional_call(block, tensors, args, kwargs)

    return compute
