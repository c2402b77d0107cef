"""Blocks computed by code that torch compiles: fewer launches, where a GPU waits for Python."""

import torch
from torch import nn


class CompiledBlocks:
    """One compiled function for all blocks of a kind, which takes a block's weights as arguments: so it is
    compiled once, not once for each block.
    """

    def __init__(self, blocks: nn.ModuleList, config):
        kinds = getattr(config, "layer_types", None) or [""] * len(blocks)
        self._blocks = blocks
        self._function_of = {
            kind: torch.compile(_function(blocks[kinds.index(kind)])) for kind in dict.fromkeys(kinds)
        }
        self._kinds = kinds

    def __call__(self, b: int, args: tuple, kwargs: dict):
        """Compute block `b`."""
        tensors = {**dict(self._blocks[b].named_parameters()), **dict(self._blocks[b].named_buffers())}
        return self._function_of[self._kinds[b]](tensors, args, kwargs)


def _function(block: nn.Module):
    def compute(tensors: dict[str, torch.Tensor], args: tuple, kwargs: dict):
        return torch.func.functional_call(block, tensors, args, kwargs)

    return compute
