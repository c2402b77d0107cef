"""Layer-major execution: every micro-batch of an optimizer step through one block, then through the next.

The usual order takes one micro-batch through all blocks, so that a base which does not fit on the device is loaded twice a micro-batch.
Here it is loaded twice an optimizer step, whatever the number of micro-batches. Forward keeps the inputs of the blocks; backward takes the
blocks in reverse, and computes each again, one micro-batch at a time, before it differentiates it. The last block is not computed twice:
its backward follows its forward. The idea of running all batches through a layer while it is loaded is FlexGen's (Sheng et al., 2023).

Clients that share a rank share each load: a micro-batch belongs to an owner, whose trainable tensors are bound while it is computed.
"""

from contextlib import contextmanager

import torch
from torch import nn

from fedspeed import activity
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.cell_model import Cell, CellModel, CellState, Score, Tensors, told
from fedspeed.models.blocks import Anatomy


class LayerMajor:
    """Runs passes over a model whose frozen parameters are in a `BaseStore`.

    Args:
        model: as built, its trainable parameters inside the blocks; they serve as places that an owner's tensors are bound to.
        host_inputs: whether the inputs of blocks wait for the backward pass in host RAM.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, store: BaseStore, host_inputs: bool = False):
        self._model, self._parts, self._store, self._host_inputs = model, parts, store, host_inputs
        self._cells = CellModel(model, parts)
        self._device = self._cells.device
        numbers = {piece.name: i for i, unit in enumerate(store.units) for piece in unit.pieces}
        names = {id(p): n for n, p in model.named_parameters()}
        self._unit_of = [next((numbers[names[id(p)]] for p in block.parameters() if not p.requires_grad), None) for block in parts.blocks]
        embedding = names[id(parts.embedding.weight)]
        self._table = store.rows(numbers[embedding], embedding)  # where single rows can be looked up; None: it must be loaded
        self._embedding_unit = numbers[embedding] if self._table is None else None
        self._head_unit = numbers[names[id(parts.head.weight)]]
        self._places = [[(names[id(p)], p) for p in block.parameters() if p.requires_grad] for block in parts.blocks]
        self._lowest = next(i for i, places in enumerate(self._places) if places)

    # The order of units, which all ranks that load together keep.

    def sequence(self, backward: bool) -> list[int]:
        """Units in the order one pass uses them, and the first ones of the pass after it, which are loaded ahead."""
        forward = [self._embedding_unit, *self._unit_of, self._head_unit]
        order = forward + (self._unit_of[self._lowest:-1][::-1] if backward else [])
        return [unit for unit in order + forward if unit is not None]

    # Passes. One over no cells computes nothing: it takes part in the loads of the ranks that have some.

    def train(self, cells: list[Cell], owners: list[Tensors]) -> tuple[list[Score], list[Tensors]]:
        """Forward and backward of a whole optimizer step.

        Args:
            owners: trainable tensors by name, of each owner.

        Returns:
            the score of each cell, and by owner the gradients [fp32, by name] of the sum of scale * loss over its cells.
        """
        self._model.train()
        states = self._enter(cells, backward=True)
        kept: list[list[torch.Tensor]] = []
        grads: list[Tensors] = [{} for _ in owners]
        depth = len(self._parts.blocks)
        for b in range(depth - 1):
            with self._using(self._unit_of[b]), torch.no_grad():
                kept.append([self._shelve(s.hidden) for s in states] if b >= self._lowest else [])
                for cell, state in self._by_owner(b, cells, states, owners):
                    state.hidden = self._cells.block(b, cell, state, state.hidden)
        scores, flow = [], [None] * len(cells)
        with self._using(self._unit_of[-1]), self._using(self._head_unit):
            for i, (cell, state) in enumerate(self._by_owner(depth - 1, cells, states, owners)):
                x = state.hidden.requires_grad_(depth - 1 > self._lowest)
                with torch.enable_grad():
                    y = self._cells.block(depth - 1, cell, state, x)
                score, upward = self._cells.head(y.detach(), cell)
                scores.append(score)
                state.hidden = None
                flow[i] = self._backward(depth - 1, cell, x, y, upward, grads[cell.owner])
        for b in range(depth - 2, self._lowest - 1, -1):
            inputs = kept.pop()
            with self._using(self._unit_of[b]):
                for i, (cell, state) in enumerate(self._by_owner(b, cells, states, owners)):
                    x = inputs[i].to(self._device, non_blocking=True).requires_grad_(b > self._lowest)
                    inputs[i] = None
                    with torch.enable_grad():
                        y = self._cells.block(b, cell, state, x)
                    flow[i] = self._backward(b, cell, x, y, flow[i], grads[cell.owner])
        return told(scores), grads

    @torch.no_grad()
    def evaluate(self, cells: list[Cell], owners: list[Tensors]) -> list[Score]:
        """Forward only."""
        self._model.eval()
        states = self._enter(cells, backward=False)
        depth = len(self._parts.blocks)
        scores = []
        for b in range(depth):
            with self._using(self._unit_of[b]):
                for cell, state in self._by_owner(b, cells, states, owners):
                    state.hidden = self._cells.block(b, cell, state, state.hidden)
                if b == depth - 1:
                    with self._using(self._head_unit):
                        scores = [self._cells.head(state.hidden, cell, differentiate=False)[0] for cell, state in zip(cells, states)]
            activity.advance(len(cells) / depth)
        return told(scores)

    # Inside a pass.

    @torch.no_grad()
    def _enter(self, cells: list[Cell], backward: bool) -> list[CellState]:
        """Embed every micro-batch."""
        self._store.begin(self.sequence(backward))
        with self._using(self._embedding_unit):
            table = self._parts.embedding.weight if self._table is None else self._table
            return [self._cells.enter(cell, table) for cell in cells]

    @contextmanager
    def _using(self, unit: int | None):
        if unit is None:
            yield
        else:
            with self._store.use(unit):
                yield

    def _by_owner(self, b: int, cells: list[Cell], states: list[CellState], owners: list[Tensors]):
        """(cell, state) of all cells in their order; the owner's tensors are bound to the block's places."""
        bound = None
        for cell, state in zip(cells, states):
            if cell.owner != bound:
                bound = cell.owner
                for name, place in self._places[b]:
                    place.data = owners[bound][name].data
            yield cell, state

    def _backward(self, b: int, cell: Cell, x: torch.Tensor, y: torch.Tensor, upward: torch.Tensor, into: Tensors) -> torch.Tensor | None:
        """Differentiate a block; gradients of its places are added to `into`, that of its input is returned."""
        places = self._places[b]
        wanted = ([x] if x.requires_grad else []) + [place for _, place in places]
        found = torch.autograd.grad(y, wanted, upward)
        flow, found = (found[0], found[1:]) if x.requires_grad else (None, found)
        for (name, _), grad in zip(places, found):
            into[name] = into[name].add_(grad) if name in into else grad.float()
        return flow

    def _shelve(self, hidden: torch.Tensor) -> torch.Tensor:
        """Where an input waits for the backward pass."""
        if not self._host_inputs or hidden.device.type == "cpu":
            return hidden
        shelf = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        return shelf.copy_(hidden, non_blocking=True)
