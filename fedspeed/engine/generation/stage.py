"""Pieces of tokens through one rank of a pipeline. Keys and values stay with the blocks that made them."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch

from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.generation.blocks import PieceModel
from fedspeed.engine.generation.pieces import Piece
from fedspeed.schedule.instructions import Head, Load, Stream


class PieceStage:
    """Computes what `pipeline.engine.FederatedPipelineEngine.play` asks of a rank, for pieces instead of micro-batches.

    Args:
        chunks: the blocks of each chunk of the whole model; this rank has the weights of some.

    Attributes:
        values: [k] of the pieces whose head is on this rank, by their number in the pass.
    """

    def __init__(self, model: PieceModel, store: BaseStore, chunks: Sequence[range]):
        self._model, self._store, self._chunks = model, store, chunks
        self._loaded: dict[int, ExitStack] = {}
        self.values: dict[int, torch.Tensor] = {}

    def begin(self, pieces: Sequence[Piece], tensors: Sequence[Mapping[str, torch.Tensor]], stream: Stream) -> None:
        """Begin a pass over some pieces.

        Args:
            tensors: this rank's trainable ones that each piece is computed with, by name. stream: what this rank will do.
        """
        self._pieces, self._tensors, self._calls = pieces, tensors, {}
        self.values = {}
        self._store.begin([unit for work in stream for unit in self._needed(work) if unit is not None])

    def _needed(self, work) -> list[int | None]:
        if isinstance(work, Load):
            return [self._model.units[b] for b in self._chunks[work.chunk]]
        return [self._model.head_unit] if isinstance(work, Head) else []

    def load(self, chunk: int) -> None:
        """Hold the weights of a chunk on the device."""
        stack = self._loaded[chunk] = ExitStack()
        for b in self._chunks[chunk]:
            stack.enter_context(self._model.using(self._model.units[b]))

    def release(self, chunk: int) -> None:
        """Let the weights of a chunk go."""
        self._loaded.pop(chunk).close()

    @torch.no_grad()
    def embed(self, micro: int) -> torch.Tensor:
        """Give what enters the first block."""
        hidden, self._calls[micro] = self._model.enter(self._pieces[micro], embeds=True)
        return hidden

    @torch.no_grad()
    def forward(self, micro: int, chunk: int, hidden: torch.Tensor) -> torch.Tensor:
        """Give a chunk's output."""
        if micro not in self._calls:
            _, self._calls[micro] = self._model.enter(self._pieces[micro], embeds=False)
        for b in self._chunks[chunk]:
            hidden = self._model.block(b, self._calls[micro][b], hidden, self._tensors[micro])
        return hidden

    @torch.no_grad()
    def head(self, micro: int, hidden: torch.Tensor) -> None:
        """Read a piece's values."""
        with self._model.using(self._model.head_unit):
            self.values[micro] = self._model.read(hidden, self._pieces[micro])
