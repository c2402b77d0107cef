"""Layer-major execution: every micro-batch of an optimizer step through one block, then through the next.

The usual order takes one micro-batch through all blocks, so that a base which does not fit on the device is loaded twice a micro-batch.
Here it is loaded twice an optimizer step, whatever the number of micro-batches. Forward keeps the inputs of the blocks; backward takes the
blocks in reverse, and computes each again, one micro-batch at a time, before it differentiates it. The last block is not computed twice:
its backward follows its forward. The idea of running all batches through a layer while it is loaded is FlexGen's (Sheng et al., 2023).

Clients that share a rank share each load: a micro-batch belongs to an owner, whose trainable tensors are bound while it is computed.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from torch import nn

from fedspeed.data.batches import Batch
from fedspeed.data.encode import IGNORED
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.config import LOGITS_BYTES
from fedspeed.models.blocks import Anatomy

Tensors = dict[str, torch.Tensor]


@dataclass
class Cell:
    """One micro-batch of one owner.

    Attributes:
        owner: whose trainable tensors it is computed with.
        scale: factor of its summed loss in what is differentiated.
        seed: of its dropout.
    """

    batch: Batch
    owner: int
    scale: float = 1.0
    seed: int = 0


@dataclass
class Score:
    """Sums over one micro-batch: cross-entropy of its answer tokens, rows whose answer greedy decoding would give, rows with an answer."""

    loss: float | torch.Tensor  # a tensor until the pass ends: asking the device for a number would wait for all it has to do
    exact: int
    rows: int


class LayerMajor:
    """Runs passes over a model whose frozen parameters are in a `BaseStore`.

    Args:
        model: as built, its trainable parameters inside the blocks; they serve as places that an owner's tensors are bound to.
        host_inputs: whether the inputs of blocks wait for the backward pass in host RAM.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, store: BaseStore, host_inputs: bool = False):
        self._model, self._parts, self._store, self._host_inputs = model, parts, store, host_inputs
        self._device = torch.device(get_accelerator().current_device_name())
        numbers = {piece.name: i for i, unit in enumerate(store.units) for piece in unit.pieces}
        names = {id(p): n for n, p in model.named_parameters()}
        self._unit_of = [next((numbers[names[id(p)]] for p in block.parameters() if not p.requires_grad), None) for block in parts.blocks]
        embedding = names[id(parts.embedding.weight)]
        self._table = store.rows(numbers[embedding], embedding)  # where single rows can be looked up; None: it must be loaded
        self._embedding_unit = numbers[embedding] if self._table is None else None
        self._head_unit = numbers[names[id(parts.head.weight)]]
        self._places = [[(names[id(p)], p) for p in block.parameters() if p.requires_grad] for block in parts.blocks]
        self._lowest = next(i for i, places in enumerate(self._places) if places)
        # Some families give attention's dropout to a function, with no module that would show it.
        stated = any(value for key, value in model.config.to_dict().items() if key.endswith(("dropout", "_pdrop")))
        self._dropout = stated or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())

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
                    state.hidden = self._block(b, cell, state, state.hidden)
        scores, flow = [], [None] * len(cells)
        with self._using(self._unit_of[-1]), self._using(self._head_unit):
            for i, (cell, state) in enumerate(self._by_owner(depth - 1, cells, states, owners)):
                x = state.hidden.requires_grad_(depth - 1 > self._lowest)
                with torch.enable_grad():
                    y = self._block(depth - 1, cell, state, x)
                score, upward = self._head(y.detach(), cell)
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
                        y = self._block(b, cell, state, x)
                    flow[i] = self._backward(b, cell, x, y, flow[i], grads[cell.owner])
        return _told(scores), grads

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
                    state.hidden = self._block(b, cell, state, state.hidden)
                if b == depth - 1:
                    with self._using(self._head_unit):
                        scores = [self._head(state.hidden, cell, differentiate=False)[0] for cell, state in zip(cells, states)]
        return _told(scores)

    # Inside a pass.

    @torch.no_grad()
    def _enter(self, cells: list[Cell], backward: bool) -> list["_State"]:
        """Embed every micro-batch; what the model computes once for all blocks (masks, positions) is recorded, not rebuilt."""
        self._store.begin(self.sequence(backward))
        states = []
        with self._using(self._embedding_unit):
            table = self._parts.embedding.weight if self._table is None else self._table
            for cell in cells:
                ids = torch.from_numpy(cell.batch.input_ids).to(table.device)
                embedded = nn.functional.embedding(ids, table).to(self._device)
                with self._recorded() as (entered, calls), self._seeded(cell, -1):
                    self._parts.decoder(inputs_embeds=embedded, attention_mask=torch.from_numpy(cell.batch.attention_mask).to(self._device))
                states.append(_State(entered[0], calls))
        return states

    @contextmanager
    def _recorded(self):
        """The decoder's blocks only note what they were called with: ([what enters the first block], what each gets beside it)."""
        entered: list[torch.Tensor] = []
        calls: list[_Call] = []
        recorders = nn.ModuleList(_Recorder(entered, calls) for _ in self._parts.blocks)
        setattr(self._parts.decoder, self._parts.blocks_name, recorders)
        try:
            yield entered, calls
        finally:
            setattr(self._parts.decoder, self._parts.blocks_name, self._parts.blocks)

    @contextmanager
    def _using(self, unit: int | None):
        if unit is None:
            yield
        else:
            with self._store.use(unit):
                yield

    def _by_owner(self, b: int, cells: list[Cell], states: list["_State"], owners: list[Tensors]):
        """(cell, state) of all cells in their order; the owner's tensors are bound to the block's places."""
        bound = None
        for cell, state in zip(cells, states):
            if cell.owner != bound:
                bound = cell.owner
                for name, place in self._places[b]:
                    place.data = owners[bound][name].data
            yield cell, state

    def _block(self, b: int, cell: Cell, state: "_State", hidden: torch.Tensor) -> torch.Tensor:
        call = state.calls[b]
        with self._seeded(cell, b):
            out = self._parts.blocks[b](hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    @contextmanager
    def _seeded(self, cell: Cell, b: int):
        """The same dropout masks whenever this block computes this cell, in whatever order cells are computed."""
        if not self._dropout:
            yield
            return
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed((cell.seed * 1_000_003 + b + 1) % 2**63)
            yield

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

    def _head(self, hidden: torch.Tensor, cell: Cell, differentiate: bool = True) -> tuple[Score, torch.Tensor | None]:
        """Norm, head and loss of the answer tokens only, some rows at a time; also the gradient of scale * loss by `hidden`."""
        labels = torch.from_numpy(cell.batch.labels)[:, 1:]
        at = (labels != IGNORED).nonzero()
        targets = labels[at[:, 0], at[:, 1]].to(self._device)
        where = at.to(self._device)
        rows = max(1, LOGITS_BYTES // (self._parts.head.weight.shape[0] * hidden.element_size()))
        loss, right = torch.zeros((), dtype=torch.float64, device=self._device), []
        with torch.set_grad_enabled(differentiate):
            x = hidden.requires_grad_(differentiate)
            normed = self._parts.norm(x)[where[:, 0], where[:, 1]]
            leaf = normed.detach()
            downward = torch.empty_like(leaf) if differentiate else None
            for start in range(0, len(targets), rows):
                part = slice(start, start + rows)
                piece = leaf[part].requires_grad_(differentiate)
                logits = self._parts.head(piece)
                lost = chunked_cross_entropy(logits, targets[part], reduction="sum")
                loss += lost.detach()
                if differentiate:
                    downward[part], = torch.autograd.grad(lost * cell.scale, piece)
                else:
                    right.append((logits.argmax(-1) == targets[part]).cpu())
            flow = torch.autograd.grad(normed, x, downward)[0] if differentiate else None
        return Score(loss, *_whole_rows(at[:, 0], torch.cat(right), len(labels)) if right else (0, 0)), flow


@dataclass
class _Call:
    args: tuple
    kwargs: dict


@dataclass
class _State:
    """Of one cell: the activation [B, T, hidden] that the next block takes, and what each block is called with beside it."""

    hidden: torch.Tensor | None
    calls: list[_Call]


class _Recorder(nn.Module):
    """Stands where a block stands while the decoder computes what it gives to its blocks."""

    def __init__(self, entered: list[torch.Tensor], calls: list[_Call]):
        super().__init__()
        self._entered, self._calls = entered, calls

    def forward(self, hidden, *args, **kwargs):
        if not self._entered:
            self._entered.append(hidden)
        self._calls.append(_Call(args, kwargs))
        return hidden


def _told(scores: list[Score]) -> list[Score]:
    for score in scores:
        score.loss = float(score.loss)
    return scores


def _whole_rows(row: torch.Tensor, right: torch.Tensor, rows: int) -> tuple[int, int]:
    """(rows of which all answer tokens are right, rows that have any)."""
    wrong, tokens = torch.zeros(rows), torch.zeros(rows)
    wrong.index_add_(0, row, (~right).float())
    tokens.index_add_(0, row, torch.ones(len(row)))
    return int(((tokens > 0) & (wrong == 0)).sum()), int((tokens > 0).sum())
