"""Pieces of tokens through a model block by block, whoever decides in which order."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.compute.micro_batches import MicroBatchModel, not_packed
from fedspeed.engine.compute.uploads import upload, upload_rows
from fedspeed.engine.generation.cache import attention_masks
from fedspeed.engine.generation.pieces import Piece, read_in_parts
from fedspeed.models.blocks import Anatomy

Tensors = Mapping[str, torch.Tensor]


class PieceModel:
    """Computes embeddings, single blocks and heads of pieces.

    Args:
        model: as built, its trainable parameters inside the blocks. store: its frozen parameters, or this rank's of them.
        rows: tokens whose logits are read at once.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, store: BaseStore, rows: int):
        self._parts, self._store, self._rows, self._config = parts, store, rows, model.config
        self._model = MicroBatchModel(model, parts)
        self._device = self._model.device
        names = {id(p): n for n, p in model.named_parameters()}
        numbers = {piece.name: i for i, unit in enumerate(store.units) for piece in unit.pieces}
        self.units = [next((numbers[names[id(p)]] for p in block.parameters() if names[id(p)] in numbers), None)
                      for block in parts.blocks]
        self._places = [[(names[id(p)], local) for local, p in block.named_parameters() if p.requires_grad] for block in parts.blocks]
        self._embedding = names[id(parts.embedding.weight)]
        self.embedding_unit = numbers.get(self._embedding)
        self.head_unit = numbers.get(names[id(parts.head.weight)])
        if self.embedding_unit is not None and store.rows(self.embedding_unit, self._embedding) is not None:
            self._looked_up, self.embedding_unit = self.embedding_unit, None
        else:
            self._looked_up = None

    def sequence(self) -> list[int]:
        """Give the units in the order of a pass over all blocks."""
        return [unit for unit in (self.embedding_unit, *self.units, self.head_unit) if unit is not None]

    def using(self, unit: int | None):
        """The weights of a unit are on the device inside; it must be the next one announced to the store."""
        return nullcontext() if unit is None else self._store.use(unit)

    def enter(self, piece: Piece, embeds: bool) -> tuple[torch.Tensor, list]:
        """Give what enters the first block, [rows, T, hidden], and what each block is called with beside its input.

        Args:
            embeds: whether the embedding is here; else what enters comes from elsewhere, and only its shape is true.
        """
        dtype = self._parts.norm.weight.dtype
        if embeds:
            hidden = self._embedded(torch.from_numpy(piece.tokens))
        else:
            shape = (*piece.tokens.shape, self._parts.embedding.embedding_dim)
            hidden = torch.zeros(shape, dtype=dtype, device=self._device)
        with self._model.recorded() as (entered, calls), not_packed():
            self._parts.decoder(inputs_embeds=hidden,
                                attention_mask=attention_masks(piece.view, self._config, hidden.dtype, self._device),
                                position_ids=upload(torch.from_numpy(piece.positions)), past_key_values=piece.view, use_cache=True)
        return entered[0], calls

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        if self._looked_up is None:
            table = self._parts.embedding.weight
        else:
            table = self._store.rows(self._looked_up, self._embedding)
        return upload_rows(table, ids) if table.device.type == "cpu" else nn.functional.embedding(upload(ids), table)

    def block(self, b: int, call, hidden: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """Give one block's output.

        Args:
            call: what `enter` recorded for it. tensors: what trains, by name.
        """
        own = {local: tensors[name] for name, local in self._places[b]}
        out = torch.func.functional_call(self._parts.blocks[b], own, (hidden, *call.args), call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def read(self, hidden: torch.Tensor, piece: Piece) -> torch.Tensor:
        """Give a piece's values [k] by norm and head, which must be on the device."""
        rows, columns = (upload(torch.from_numpy(part)) for part in piece.wanted)
        if not piece.count:
            return torch.zeros(0, dtype=torch.int64, device=self._device)
        normed = self._parts.norm(hidden[rows, columns])
        return read_in_parts(piece, lambda part: self._parts.head(normed[part]), self._rows)


@torch.no_grad()
def compute_pieces(model: PieceModel, store: BaseStore, pieces: Sequence[Piece], tensors: Tensors) -> list[torch.Tensor]:
    """Take pieces through all blocks of one rank, each of which is loaded once for all of them; returns the values of each.

    Args:
        tensors: what trains, by name.
    """
    store.begin([*model.sequence(), *model.sequence()])  # the next pass's are loaded ahead
    with model.using(model.embedding_unit):
        entered = [model.enter(piece, embeds=True) for piece in pieces]
    hidden = [first for first, _ in entered]
    for b, unit in enumerate(model.units):
        with model.using(unit):
            for i, (_, calls) in enumerate(entered):
                hidden[i] = model.block(b, calls[b], hidden[i], tensors)
                calls[b] = None
    with model.using(model.head_unit):
        return [model.read(x, piece) for x, piece in zip(hidden, pieces)]
