"""The folded adapter in the model: a hook on each module that has one adds it to the module's output.

A module computes W x + s B A x; the hook adds s F x, with F common to all clients and frozen (models.folded).
Since it stands on the module, it is there under every execution that calls modules: DeepSpeed's, layer by
layer, and in a stage of a pipeline. Its arrays are no parameters, so no ZeRO stage divides them, and no tier
of the base loads them: they lie on the device, in the type that the module computes in, from the first time
that it is computed. A rank that computes some of the blocks holds theirs only.
"""

from collections.abc import Mapping

import torch
from torch import nn

from fedspeed.models.folded import LEFT, RIGHT, WHOLE, folded_parts, is_folded

Tensors = Mapping[str, torch.Tensor]


class FoldedAdapter:
    """Holds the folded adapter of one model.

    Attributes:
        bytes: on the device now. peak: the most so far.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._told: dict[str, torch.Tensor] = {}  # what was loaded last: fp32, on the CPU
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.bytes = 0
        self.peak = 0

    def load(self, state: Tensors) -> None:
        """Make the folded arrays of a global state, which may have none, those that the model computes
        with.
        """
        new = {name: tensor for name, tensor in state.items() if is_folded(name)}
        if self._is_loaded(new):
            return
        for hook in self._hooks:
            hook.remove()
        self._told = new
        self._hooks = []
        self.bytes = 0
        if not new:
            return
        modules = dict(self._model.named_modules())
        for name, parts in folded_parts(new).items():
            assert name in modules, f"{name} has folded arrays, but the model has no such module"
            self._hooks.append(modules[name].register_forward_hook(_Added(parts, self._note)))

    def _is_loaded(self, new: Tensors) -> bool:
        """Say whether these are the arrays that were loaded last: many turns of a round load the same
        ones.
        """
        return new.keys() == self._told.keys() and all(_same(new[name], self._told[name]) for name in new)

    def _note(self, nbytes: int) -> None:
        self.bytes += nbytes
        self.peak = max(self.peak, self.bytes)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


class _Added:
    """The hook of one module. Uploads the module's arrays when it is called first."""

    def __init__(self, parts: Tensors, note):
        self._parts = parts
        self._note = note
        self._here: dict[str, torch.Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Return the output of a LoRA layer of PEFT with the folded product added, of as many rows."""
        here = self._on_device(output)
        x = args[0]
        if x.is_floating_point():
            x = x.to(output.dtype)
            added = (
                nn.functional.linear(x, here[WHOLE])
                if WHOLE in here
                else self._through(here, x @ here[RIGHT].T)
            )
        else:  # token ids: an embedding, whose product is [hidden, vocabulary]
            table = here[WHOLE] if WHOLE in here else here[RIGHT]
            found = nn.functional.embedding(x, table.T)
            added = found if WHOLE in here else self._through(here, found)
        return output + module.scaling["default"] * added

    def _through(self, here: Tensors, inner: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inner, here[LEFT])

    def _on_device(self, like: torch.Tensor) -> Tensors:
        """Return the module's arrays on the device and in the type of its output."""
        if not self._here:
            self._here = {kind: part.to(like.device, like.dtype) for kind, part in self._parts.items()}
            self._note(sum(part.nbytes for part in self._here.values()))
        return self._here
