"""Compute with a folded adapter: a forward hook on each module that has folded arrays adds their product.

A module computes W x + s B A x, or W x where nothing of it trains, and the hook adds s F x. F is frozen and
the same for all clients (models.folded). It is not part of any graph, so a backward pass ends at the lowest
block that trains, whatever is folded below it. A hook works under every execution that calls modules:
DeepSpeed's, layer by layer, and in a pipeline stage. The arrays are not parameters, so ZeRO does not
partition them and no tier loads them. They are uploaded to the device, in the module's type, when the module
is first computed. So a rank that computes some of the blocks has only their arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fedspeed.models.adapters import lora_scale
from fedspeed.models.folded import LEFT, RIGHT, WHOLE, folded_parts, is_folded

Tensors = Mapping[str, torch.Tensor]


class FoldedAdapter:
    """The folded adapter of one model.

    Attributes:
        bytes: of its arrays on the device now.
        peak: the largest value of `bytes` so far.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._loaded: dict[str, torch.Tensor] = {}  # the arrays loaded last: fp32, on the CPU
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.bytes = 0
        self.peak = 0

    def load(self, state: Tensors) -> None:
        """Let the model compute with the folded arrays of a global state from now on; the state may have
        none.
        """
        new = {name: tensor for name, tensor in state.items() if is_folded(name)}
        if self._is_loaded(new):
            return
        for hook in self._hooks:
            hook.remove()
        self._loaded = new
        self._hooks = []
        self.bytes = 0
        if not new:
            return
        scale = lora_scale(self._model)
        modules = dict(self._model.named_modules())
        for name, parts in folded_parts(new).items():
            assert name in modules, f"{name} has folded arrays, but the model has no such module"
            added = _AddFolded(parts, scale, self._count)
            self._hooks.append(modules[name].register_forward_hook(added))

    def _is_loaded(self, new: Tensors) -> bool:
        """Tell whether these arrays are loaded already: all clients of a round load the same ones."""
        same_names = new.keys() == self._loaded.keys()
        return same_names and all(_same(new[name], self._loaded[name]) for name in new)

    def _count(self, nbytes: int) -> None:
        self.bytes += nbytes
        self.peak = max(self.peak, self.bytes)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


class _AddFolded:
    """The hook of one module. It uploads the module's arrays when it is first called.

    Args:
        arrays: F itself, or its factors, by kind (models.folded). scale: s.
        count: called with the bytes that are uploaded.
    """

    def __init__(self, arrays: Tensors, scale: float, count: Callable[[int], None]):
        self._arrays = arrays
        self._scale = scale
        self._count = count
        self._uploaded: dict[str, torch.Tensor] = {}

    def __call__(self, module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Return the output of a PEFT LoRA layer, or of a plain one, with the folded product added.

        Args:
            args: its arguments: the input [..., in], or token ids if it is an embedding.
            output: [..., out].
        """
        arrays = self._on_device(output)
        x = args[0]
        first = arrays[WHOLE] if WHOLE in arrays else arrays[RIGHT]
        if x.is_floating_point():
            x = x.to(output.dtype)
            added = nn.functional.linear(x, first) if WHOLE in arrays else x @ first.T
        else:  # an embedding's F is [hidden, vocabulary]
            added = nn.functional.embedding(x, first.T)
        if WHOLE not in arrays:
            added = nn.functional.linear(added, arrays[LEFT])
        return output + self._scale * added

    def _on_device(self, like: torch.Tensor) -> Tensors:
        """Return the module's arrays on the device and in the type of its output."""
        if not self._uploaded:
            self._uploaded = {kind: part.to(like.device, like.dtype) for kind, part in self._arrays.items()}
            self._count(sum(part.nbytes for part in self._uploaded.values()))
        return self._uploaded
