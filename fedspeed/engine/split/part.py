"""The common part of engines that compute some blocks of a model, while another rank computes the others."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.clock import Clock
from fedspeed.engine.compute.micro_batches import Call, MicroBatchModel, MicroBatchTask
from fedspeed.engine.generation.pieces import Piece
from fedspeed.engine.groups import Groups
from fedspeed.engine.store_engine import StoreEngine
from fedspeed.models.blocks import anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PartEngine(StoreEngine):
    """Computes one micro-batch at a time through resident blocks, and keeps its graphs until their gradients
    come from the other part.
    """

    kind = "split"

    def __init__(
        self,
        model: "PreTrainedModel",
        states: list[ClientState],
        groups: Groups,
        *,
        store: BaseStore,
        clock: Clock,
    ):
        # The ranks of a client send one message for all of them, so they make the same passes.
        super().__init__(model, states, groups, matched_group=groups.client, store=store, clock=clock)
        self._parts = anatomy(model)
        self._compute = MicroBatchModel(model, self._parts)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._trainable = [
            [(names[id(p)], p) for p in block.parameters() if p.requires_grad] for block in self._parts.blocks
        ]

    def _bind(self, slot: int) -> None:
        """Let the blocks compute with a slot's trainable tensors. A graph uses those that are bound when its
        gradient is computed, so they are bound again before that.
        """
        tensors = self._states[slot].tensors()
        for named in self._trainable:
            for name, parameter in named:
                parameter.data = tensors[name].data

    def _through(
        self, blocks: Iterable[int], task: MicroBatchTask, calls: Sequence[Call], hidden: torch.Tensor
    ) -> torch.Tensor:
        """Return the output of some blocks, one after the other: [B, T, d]."""
        for b in blocks:
            hidden = self._compute.block(b, task, calls, hidden)
        return hidden

    def _differentiate(
        self,
        slot: int,
        blocks: Iterable[int],
        y: torch.Tensor,
        output_grad: torch.Tensor,
        *,
        x: torch.Tensor | None = None,
        factor: float = 1.0,
    ) -> torch.Tensor | None:
        """Add `factor` times the gradients of the trainable tensors in some blocks to those of a slot; return
        the gradient of the blocks' input.

        Args:
            y: the blocks' output, with its graph. output_grad: of y.
            x: the blocks' input; None: its gradient is not asked for.
        """
        named = [pair for b in blocks for pair in self._trainable[b]]
        inputs = [parameter for _, parameter in named] + ([] if x is None else [x])
        grads = torch.autograd.grad(y, inputs, output_grad)
        self._accumulate(slot, {name: factor * grad.float() for (name, _), grad in zip(named, grads)})
        return None if x is None else grads[-1]

    def piece_passes(self, pieces: Sequence[Piece]) -> int:
        raise AssertionError("a part of a model generates nothing; methods with one refuse such tasks")

    def compute_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        raise AssertionError("a part of a model generates nothing; methods with one refuse such tasks")

    @property
    def base_bytes(self) -> int:
        return sum(tensor.nbytes for unit in self.store.units for tensor in unit.tensors)
