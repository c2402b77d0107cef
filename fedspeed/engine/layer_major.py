"""Layer-major execution: every micro-batch of an optimizer step through one block, then through the next.

The usual order takes one micro-batch through all blocks, so that a base which does not fit on the device is loaded twice a micro-batch.
Here it is loaded twice an optimizer step, whatever the number of micro-batches. Forward keeps the inputs of the blocks; backward takes the
blocks in reverse, and computes each again, one micro-batch at a time, before it differentiates it. The last block is not computed twice:
its backward follows its forward. Nor are blocks whose activations fit into the budget that is left for them. The idea of running all batches
through a layer while it is loaded is FlexGen's (Sheng et al., 2023).

Clients that share a rank share each load: a micro-batch belongs to an owner, whose trainable tensors are bound while it is computed.
"""

import gc
import socket
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.utils._pytree import tree_leaves

from fedspeed import activity
from fedspeed.engine.activations import ActivationBudget, SavedBytes
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.block_inputs import BlockInputs, Waiting
from fedspeed.engine.cell_model import Cell, CellModel, CellState, Score, Tensors, told
from fedspeed.models.blocks import Anatomy
from fedspeed.schedule.kept import kept_counts
from fedspeed.schedule.loads import step_order


@dataclass(frozen=True)
class Stays:
    """What of a step stays on the device until its backward pass: of each block, of how many micro-batches (the first ones) all activations, and of
    how many at least the input."""

    activations: Sequence[int]
    inputs: Sequence[int]


@dataclass
class _Kept:
    """A block's input and output of one micro-batch, with the graph between them; `address`: where the block's weights were."""

    x: torch.Tensor
    y: torch.Tensor
    address: int


class LayerMajor:
    """Runs passes over a model whose frozen parameters are in a `BaseStore`.

    Args:
        model: as built, its trainable parameters inside the blocks; they serve as places that an owner's tensors are bound to.
        budget: for activations that are not computed again.
        inputs: where the inputs of blocks wait; auto: on the device as far as the budget allows.
        compiled: whether blocks are compiled.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, store: BaseStore, budget: ActivationBudget, *,
                 inputs: Literal["auto", "device", "host"] = "auto", compiled: bool = False):
        self._model, self._parts, self._store = model, parts, store
        self.budget, self._place_of_inputs = budget, inputs
        self._inputs = BlockInputs()
        self._measured_input = 0  # bytes of the largest input in a step whose activations were measured
        self._saved_per_value = 0.0  # bytes that a block's graph saves for each value of its input, the most that was seen
        self._cells = CellModel(model, parts, compiled)
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
        depth = len(self._parts.blocks)
        blocks = [self._unit_of[b] for b in step_order(depth, self._lowest if backward else depth)]
        forward = [self._embedding_unit, *blocks[:depth], self._head_unit]
        return [unit for unit in [*forward, *blocks[depth:], *forward] if unit is not None]

    # Passes. One over no cells computes nothing: it takes part in the loads of the ranks that have some.

    def train(self, cells: list[Cell], owners: list[Tensors]) -> tuple[list[Score], list[Tensors]]:
        """Forward and backward of a whole optimizer step.

        Args:
            owners: trainable tensors by name, of each owner.

        Returns:
            the score of each cell, and by owner the gradients [fp32, by name] of the sum of scale * loss over its cells.
        """
        try:
            return self._train(cells, owners)
        except torch.OutOfMemoryError:
            # Others may have taken what was free. Ranks that load together would not do so again together.
            if self._store.matched is not None or not self.budget.give_up():
                raise
        print(f"fedspeed: {socket.gethostname()}: the device has become too full for activations that were kept for the backward pass; they are computed "
              "again from now on (engine.activation_gib=auto)", file=sys.stderr, flush=True)
        get_accelerator().synchronize()  # nothing may still be on its way into memory that is given out anew
        self._inputs.forget()
        gc.collect()
        get_accelerator().empty_cache()
        return self._train(cells, owners)

    def _train(self, cells: list[Cell], owners: list[Tensors]) -> tuple[list[Score], list[Tensors]]:
        self._model.train()
        states = self._enter(cells, backward=True)
        grads: list[Tensors] = [{} for _ in owners]
        depth, stays, kept = len(self._parts.blocks), None, []
        for b in range(depth - 1):
            with self._using(self._unit_of[b]):
                if b == self._lowest:
                    stays = self._what_stays(cells, states, owners)
                kept.append(self._forward(b, cells, states, owners, stays))
        self._inputs.turn()
        self._bring(kept)
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
        while kept and len(kept) > self._lowest:
            b, records = len(kept) - 1, kept.pop()
            self._bring(kept)
            with self._using(self._unit_of[b]):
                for i, (cell, state) in enumerate(self._by_owner(b, cells, states, owners)):
                    x, y = self._computed(b, cell, state, records[i])
                    records[i] = None
                    flow[i] = self._backward(b, cell, x, y, flow[i], grads[cell.owner])
        scores = told(scores, cells)
        self.budget.step_done()
        return scores, grads

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
        return told(scores, cells)

    # Inside a pass.

    def _what_stays(self, cells: list[Cell], states: list[CellState], owners: list[Tensors]) -> Stays:
        """As much of this step as fits into the budget: first inputs of blocks (auto), then activations, the last blocks' first.

        Called while the lowest block that trains is loaded, which is measured: blocks are alike.
        """
        depth = len(self._parts.blocks)
        if not cells:
            return Stays([0] * depth, [0] * depth)
        inputs = [state.hidden.nbytes for state in states]
        budget = self.budget.begin(inputs)
        if self._place_of_inputs == "auto":
            stay = kept_counts(budget, inputs, depth, self._lowest)
            budget -= sum(sum(inputs[:count]) for count in stay)
        else:
            stay = [len(cells) if self._place_of_inputs == "device" else 0] * depth
        if budget < max(inputs):  # activations take more than an input
            return Stays([0] * depth, stay)
        if max(inputs) > self._measured_input:
            self._measured_input = max(inputs)
            longest = max(range(len(cells)), key=lambda i: cells[i].batch.input_ids.shape[1])
            self._saved_per_value = max(self._saved_per_value, self._measured(cells[longest], states[longest], owners))
        # An input that would wait on the host stays on the device beside the activations that are kept.
        beside = [0 if self._place_of_inputs != "host" else size for size in inputs]
        saved = [int(self._saved_per_value * state.hidden.numel()) + size for state, size in zip(states, beside)]
        return Stays(kept_counts(budget, saved, depth, self._lowest), stay)

    def _measured(self, cell: Cell, state: CellState, owners: list[Tensors]) -> float:
        """Bytes that a block's graph keeps for each value of its input, without the input itself."""
        block = self._parts.blocks[self._lowest]
        x = state.hidden.detach().requires_grad_()
        list(self._by_owner(self._lowest, [cell], [state], owners))
        call = state.calls[self._lowest]
        shared = [value for value in tree_leaves((call.args, call.kwargs)) if isinstance(value, torch.Tensor)]
        with SavedBytes([*block.parameters(), *shared, x]) as saved, torch.enable_grad():
            y = self._cells.block(self._lowest, cell, state, x)
        del y
        return saved.nbytes / x.numel()

    def _forward(self, b: int, cells: list[Cell], states: list[CellState], owners: list[Tensors], stays: Stays | None) -> list["_Kept | Waiting"]:
        """All micro-batches through a block; what their backward will begin with. Below the lowest block that trains (no `stays`), nothing."""
        records: list[_Kept | Waiting] = []
        self._inputs.begin_block()
        for i, (cell, state) in enumerate(self._by_owner(b, cells, states, owners)):
            if stays is not None and i < stays.activations[b]:
                x = state.hidden.requires_grad_(b > self._lowest)
                with torch.enable_grad():
                    y = self._cells.block(b, cell, state, x)
                records.append(_Kept(x, y, self._store.address(self._unit_of[b])))
                state.hidden = y.detach()
                continue
            if stays is not None:
                records.append(self._inputs.put(state.hidden, on_host=i >= stays.inputs[b]))
            with torch.no_grad():
                state.hidden = self._cells.block(b, cell, state, state.hidden)
        return records

    def _bring(self, kept: Sequence[list["_Kept | Waiting"]]) -> None:
        """Begin to bring the inputs of the last of these blocks, which comes next; nothing where none is left."""
        if kept:
            self._inputs.bring([record for record in kept[-1] if isinstance(record, Waiting)])

    def _computed(self, b: int, cell: Cell, state: CellState, record: _Kept | Waiting) -> tuple[torch.Tensor, torch.Tensor]:
        """A block's input and output with the graph between them: as kept, or computed again."""
        if isinstance(record, _Kept):
            assert record.address == self._store.address(self._unit_of[b]), f"block {b} has moved since its graph was built"
            return record.x, record.y
        x = record.take().detach().requires_grad_(b > self._lowest)
        with torch.enable_grad():
            return x, self._cells.block(b, cell, state, x)

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
