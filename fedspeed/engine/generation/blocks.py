"""Compute pieces of tokens block by block; others decide in which order."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from fedspeed.engine.compute.micro_batches import Call, MicroBatchModel, not_packed
from fedspeed.engine.compute.uploads import upload
from fedspeed.engine.generation.cache import attention_masks
from fedspeed.engine.generation.pieces import Piece, read_in_parts
from fedspeed.models.blocks import Anatomy

Tensors = Mapping[str, torch.Tensor]


class PieceModel:
    """A causal LM that computes pieces in steps: embedding, single blocks, head.

    Args:
        model: as built, with its trainable parameters inside the blocks.
        parts: of the model.
        rows: tokens whose logits are read at once.
    """

    def __init__(self, model: PreTrainedModel, parts: Anatomy, rows: int):
        self._parts = parts
        self._rows = rows
        self._config = model.config
        self._model = MicroBatchModel(model, parts)
        self._device = self._model.device
        names = {id(p): n for n, p in model.named_parameters()}
        self._places = [
            [(names[id(p)], local) for local, p in block.named_parameters() if p.requires_grad]
            for block in parts.blocks
        ]

    @torch.no_grad()
    def enter(self, piece: Piece, table: torch.Tensor | None) -> tuple[torch.Tensor, list[Call]]:
        """Embed a piece, and record with which arguments the model calls its blocks.

        Args:
            table: see `MicroBatchModel.embedded`.

        Returns:
            (the first block's input [rows, T, hidden], the call of each block).
        """
        hidden = self._model.embedded(piece.tokens, table)
        with self._model.recorded() as (entered, calls), not_packed():
            self._parts.decoder(
                inputs_embeds=hidden,
                attention_mask=attention_masks(
                    piece.view, self._parts.family, self._config, hidden.dtype, self._device
                ),
                position_ids=upload(torch.from_numpy(piece.positions)),
                past_key_values=piece.view,
                use_cache=True,
            )
        return entered[0], calls

    @torch.no_grad()
    def block(self, b: int, call: Call, hidden: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """Compute block `b` for a piece: [rows, T, hidden] from [rows, T, hidden].

        Args:
            call: what `enter` recorded for the block. tensors: the model's trainable ones, by name.
        """
        trained = {local: tensors[name] for name, local in self._places[b]}
        # A block's parameters are all different tensors; functional_call would search for equal ones.
        out = torch.func.functional_call(
            self._parts.blocks[b], trained, (hidden, *call.args), call.kwargs, tie_weights=False
        )
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def read(self, hidden: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Read a piece's values [k] from the last block's output [rows, T, hidden]; the weights of norm and
        head must be on the device.
        """
        if not piece.count:
            return torch.zeros(0, dtype=torch.int64, device=self._device)
        rows, columns = (upload(torch.from_numpy(part)) for part in piece.wanted)
        normed = self._parts.norm(hidden[rows, columns])
        return read_in_parts(piece, lambda part: self._model.logits(normed[part]), self._rows)
