"""What one rank of a pipeline computes: the blocks of its chunks, and embedding and head of the micro-batches whose data it holds."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.cell_model import Cell, CellModel, Score, Tensors, told
from fedspeed.models.blocks import Anatomy
from fedspeed.schedule.instructions import Embed, Head, Load, Stream


class Stage:
    """Args:
        chunks: the blocks of each chunk of the whole model; this rank has the weights of some.
        store: the frozen parameters of this rank.
        recompute: keep the inputs of blocks instead of what their backward needs, and compute them again. Always so where weights do not stay.
    """

    def __init__(self, model, parts: Anatomy, store: BaseStore, chunks: Sequence[range], recompute: bool):
        self._model, self._parts, self._store, self._chunks, self._recompute = model, parts, store, chunks, recompute
        self._compute = CellModel(model, parts)
        names = {id(p): n for n, p in model.named_parameters()}
        numbers = {piece.name: i for i, unit in enumerate(store.units) for piece in unit.pieces}
        self._places = [[(names[id(p)], local) for local, p in block.named_parameters() if p.requires_grad] for block in parts.blocks]
        self._units = [next((numbers[names[id(p)]] for p in block.parameters() if names[id(p)] in numbers), None) for block in parts.blocks]
        embedding, head = names[id(parts.embedding.weight)], names[id(parts.head.weight)]
        self._embedding, self._embedding_unit = embedding, numbers.get(embedding)
        self._head_unit = numbers.get(head)
        self._loaded: dict[int, ExitStack] = {}

    def begin(self, cells: Sequence[Cell], owners: Sequence[Tensors], stream: Stream, train: bool) -> None:
        """A pass over some micro-batches.

        Args:
            cells: those of other ranks have the shapes of what they hold, and no content.
            owners: this rank's trainable tensors by name, of each owner.
            stream: what this rank will do.
        """
        self._model.train(train)
        self._cells, self._train = cells, train
        self._leaves = [{name: tensor.detach().requires_grad_(train) for name, tensor in own.items()} for own in owners]
        self._states: dict = {}
        self._kept: dict[tuple[int, int], list] = {}  # (micro, chunk) -> [(input, output)]; or inputs of its blocks
        self._scores: dict[int, Score] = {}
        self.grads: list[Tensors] = [{} for _ in owners]
        self._table = None
        if any(isinstance(work, Embed) for work in stream):
            self._table = self._store.rows(self._embedding_unit, self._embedding)
        self._store.begin([unit for work in stream for unit in self._needed(work) if unit is not None])

    def _needed(self, work) -> list:
        if isinstance(work, Load):
            return [self._units[b] for b in self._chunks[work.chunk]]
        return [self._head_unit] if isinstance(work, Head) else []

    def load(self, chunk: int) -> None:
        stack = self._loaded[chunk] = ExitStack()
        for b in self._chunks[chunk]:
            if self._units[b] is not None:
                stack.enter_context(self._store.use(self._units[b]))

    def release(self, chunk: int) -> None:
        self._loaded.pop(chunk).close()

    def embed(self, micro: int) -> torch.Tensor:
        state = self._states[micro] = self._compute.enter(self._cells[micro], self._table)
        hidden, state.hidden = state.hidden, None
        return hidden

    def forward(self, micro: int, chunk: int, hidden: torch.Tensor) -> torch.Tensor:
        cell, x = self._cells[micro], hidden.detach()
        state = self._state(micro)
        if not self._train or self._recompute:
            inputs = []
            with torch.no_grad():
                for b in self._chunks[chunk]:
                    inputs.append(x)
                    x = self._compute.block(b, cell, state, x, self._own(b, cell))
            if self._train:
                self._kept[micro, chunk] = inputs
            return x
        x.requires_grad_(chunk > 0)
        with torch.enable_grad():
            y = x
            for b in self._chunks[chunk]:
                y = self._compute.block(b, cell, state, y, self._own(b, cell))
        self._kept[micro, chunk] = [(x, y)]
        return y.detach()

    def head(self, micro: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """The gradient of scale * loss by `hidden`, while training."""
        with self._store.use(self._head_unit):
            self._scores[micro], flow = self._compute.head(hidden.detach(), self._cells[micro], differentiate=self._train)
        return flow

    def backward(self, micro: int, chunk: int, upward: torch.Tensor) -> torch.Tensor | None:
        """The gradient by the chunk's input; None for the first chunk, below which nothing trains."""
        cell, kept = self._cells[micro], self._kept.pop((micro, chunk))
        if not self._recompute:
            (x, y), = kept
            return self._differentiate(cell, self._chunks[chunk], x, y, upward)
        state, flow = self._state(micro), upward
        for b in reversed(self._chunks[chunk]):
            x = kept.pop().detach().requires_grad_(chunk > 0 or b != self._chunks[0][0])
            with torch.enable_grad():
                y = self._compute.block(b, cell, state, x, self._own(b, cell))
            flow = self._differentiate(cell, (b,), x, y, flow)
        return flow

    def scores(self) -> dict[int, Score]:
        """By micro-batch, of those whose labels this rank holds."""
        told(list(self._scores.values()), [self._cells[micro] for micro in self._scores])
        return self._scores

    def _state(self, micro: int):
        if micro not in self._states:
            self._states[micro] = self._compute.enter(self._cells[micro], None)
        return self._states[micro]

    def _own(self, b: int, cell: Cell) -> Tensors:
        return {local: self._leaves[cell.owner][name] for name, local in self._places[b]}

    def _differentiate(self, cell: Cell, blocks, x: torch.Tensor, y: torch.Tensor, upward: torch.Tensor) -> torch.Tensor | None:
        names = [name for b in blocks for name, _ in self._places[b]]
        wanted = ([x] if x.requires_grad else []) + [self._leaves[cell.owner][name] for name in names]
        found = torch.autograd.grad(y, wanted, upward)
        flow, found = (found[0], found[1:]) if x.requires_grad else (None, found)
        into = self.grads[cell.owner]
        for name, grad in zip(names, found):
            into[name] = into[name].add_(grad) if name in into else grad.float()
        return flow
