"""Compute pieces of tokens with the blocks of one rank. Keys and values stay where their blocks are."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.compute.micro_batches import Call
from fedspeed.engine.generation.blocks import PieceModel
from fedspeed.engine.generation.pieces import Piece
from fedspeed.engine.generation.segment_attention import SegmentAttention
from fedspeed.engine.instruction_executor import StageCompute
from fedspeed.engine.stage_weights import StageWeights
from fedspeed.models.blocks import anatomy
from fedspeed.schedule.instructions import Loaded, Stream


class PieceStage(StageCompute):
    """Executes the instructions of an `InstructionExecutor` for pieces instead of micro-batches.

    Args:
        model: as built. store: the frozen parameters of this rank.
        chunks: the blocks of each chunk of the whole model; this rank has the weights of some.
        rows: tokens whose logits are read at once.
    """

    def __init__(self, model: PreTrainedModel, store: BaseStore, chunks: Sequence[range], *, rows: int):
        parts = anatomy(model)
        self._chunks = chunks
        self._config = model.config
        self._compute = PieceModel(model, parts, rows)
        self._loads = StageWeights(model, parts, store, chunks)
        self._clear()

    def _clear(self) -> None:
        """Drop all that belongs to a pass."""
        self._pieces: Sequence[Piece] = ()
        self._tensors: Sequence[Mapping[str, torch.Tensor]] = ()
        self._calls: dict[int, list[Call]] = {}
        self._attention: dict[int, SegmentAttention] = {}
        self._values: dict[int, torch.Tensor] = {}

    def begin(
        self,
        pieces: Sequence[Piece],
        tensors: Sequence[Mapping[str, torch.Tensor]],
        stream: Stream,
        *,
        ahead: bool = False,
    ) -> None:
        """Begin a pass over some pieces.

        Args:
            pieces: of all ranks. tensors: this rank's trainable ones, by name, for each piece.
            stream: the instructions of this rank.
            ahead: whether the next pass begins with the same loads, which may then start early.
        """
        self._clear()
        self._pieces = pieces
        self._tensors = tensors
        self._loads.begin(stream, ahead=ahead)

    def end(self) -> dict[int, torch.Tensor]:
        """End the pass; returns the values [k] of the pieces whose head is on this rank, by their number."""
        values = self._values
        self._clear()
        return values

    def abandon(self) -> None:
        """Drop all that a pass has loaded, after it has failed."""
        self._loads.abandon()
        self._clear()

    def load(self, chunk: Loaded) -> None:
        self._loads.load(chunk)

    def release(self, chunk: Loaded) -> None:
        self._loads.release(chunk)

    def embed(self, micro: int) -> torch.Tensor:
        hidden, self._calls[micro] = self._compute.enter(self._pieces[micro], self._loads.table)
        return hidden

    def forward(self, micro: int, chunk: int, hidden: torch.Tensor) -> torch.Tensor:
        if micro not in self._calls:
            _, self._calls[micro] = self._compute.enter(self._pieces[micro], None)
        if micro not in self._attention:
            self._attention[micro] = SegmentAttention(self._pieces[micro].view)
        with self._attention[micro].used(self._config):
            for b in self._chunks[chunk]:
                hidden = self._compute.block(b, self._calls[micro][b], hidden, self._tensors[micro])
        return hidden

    def head(self, micro: int, hidden: torch.Tensor) -> None:
        with self._loads.head():
            self._values[micro] = self._compute.read(hidden, self._pieces[micro])
