"""Store keys and values of computed tokens, for later tokens that attend to them.

What several rows begin with is stored once: a prefix of all prompts, then a prompt for all of its samples,
then each row's own tokens. Each slot has the position of its token in its sequence, or the mark that it holds
none. Which slots a token attends to follows from positions alone, so a token may be in any slot.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PretrainedConfig

from fedspeed.engine.attention import gives_log_sum_exp
from fedspeed.engine.generation.batches import SPARE_SLOTS
from fedspeed.errors import ModelError
from fedspeed.models.families.base import Family

KeysAndValues = tuple[torch.Tensor, torch.Tensor]
NO_TOKEN = -1  # position of a slot that holds none
# Kinds of attention, as transformers names them in `layer_types`.
FULL = "full_attention"
SLIDING = "sliding_attention"
_numbers = itertools.count()


class Slots:
    """A tensor [rows, heads, slots, width] to which slots are added, mostly without copying those before.

    Args:
        first: its slots at first.
    """

    def __init__(self, first: torch.Tensor):
        self._stored = first.contiguous()  # `first` may be a part of a larger tensor, which is freed then
        self._count = first.shape[2]

    @property
    def tensor(self) -> torch.Tensor:
        """Return all slots."""
        return self._stored[:, :, : self._count]

    def append(self, more: torch.Tensor) -> None:
        """Add slots behind the others."""
        count = self._count + more.shape[2]
        if count > self._stored.shape[2]:
            rows, heads, _, width = self._stored.shape
            larger = self._stored.new_empty(rows, heads, count + SPARE_SLOTS, width)
            larger[:, :, : self._count] = self.tensor
            self._stored = larger
        self._stored[:, :, self._count : count] = more
        self._count = count

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but some, [k] int64."""
        self._stored = self.tensor.index_select(0, rows)


class Segment:
    """Keys and values [rows, heads, slots, width] of some rows, for each block that this rank computes.

    Attributes:
        number: that no other segment of this process has.
        positions: [rows, slots] int64, of each slot's token in its sequence; NO_TOKEN where there is none.
    """

    def __init__(self, rows: int):
        self.number = next(_numbers)
        self.positions = np.zeros((rows, 0), dtype=np.int64)
        self._slots: dict[int, tuple[Slots, Slots]] = {}

    def append(self, block: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add slots behind those of a block."""
        if block not in self._slots:
            self._slots[block] = Slots(keys), Slots(values)
            return
        for slots, more in zip(self._slots[block], (keys, values)):
            slots.append(more)

    def keys_and_values(self, block: int) -> KeysAndValues:
        """Return all keys and values of a block."""
        keys, values = self._slots[block]
        return keys.tensor, values.tensor

    def rows(self, block: int, which: torch.Tensor) -> KeysAndValues:
        """Return keys and values of some rows, [k] int64, which may repeat. A single row is not copied."""
        keys, values = self.keys_and_values(block)
        if keys.shape[0] == 1:
            return keys.expand(len(which), -1, -1, -1), values.expand(len(which), -1, -1, -1)
        return keys.index_select(0, which), values.index_select(0, which)

    def keep(self, which: np.ndarray) -> None:
        """Drop all rows but some, [k] int64."""
        self.positions = self.positions[which]
        for slots in itertools.chain.from_iterable(self._slots.values()):
            slots.keep(torch.from_numpy(which).to(slots.tensor.device))


class View:
    """Stands in for transformers' cache while one piece of tokens is computed: what the tokens attend to, and
    where their own keys and values go.

    Args:
        before: segments that the rows attend to, each with the row of it that belongs to each of them, [rows]
            int64.
        into: the segment that the new tokens are added to; they attend to what it holds already.
        positions: [rows, new slots] int64, of the new tokens; NO_TOKEN where there is none.
        kept: rows of `into` that go on, [rows] int64, where others are dropped first; None: all.

    All four are attributes too, so that they can be sent to another rank.

    Attributes:
        separate: whether attention reads the segments of `before` by itself, see `segment_attention`.
    """

    is_compileable = False

    def __init__(
        self,
        before: Sequence[tuple[Segment, np.ndarray]],
        into: Segment,
        positions: np.ndarray,
        kept: np.ndarray | None = None,
    ):
        self.before = before
        self.into = into
        self.positions = positions
        self.kept = kept
        self.separate = False
        if kept is not None:
            into.keep(kept)
        into.positions = np.concatenate([into.positions, positions], axis=1)
        self._all_positions = np.concatenate(
            [*(segment.positions[rows] for segment, rows in before), into.positions], axis=1
        )

    def attended(self, window: int | None = None) -> np.ndarray:
        """Return which slots each new token attends to, [rows, new slots, all slots] bool: tokens up to
        itself, of the last `window` ones where there is a window.
        """
        query = self.positions[:, :, None]
        key = self._all_positions[:, None, :]
        attended = (key != NO_TOKEN) & (key <= query)
        return attended if window is None else attended & (key > query - window)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> KeysAndValues:
        """Store a block's new keys and values; returns all that its tokens may attend to, or those of `into`
        where segments are kept separate. Called by transformers' attention.
        """
        self.into.append(layer_idx, keys, values)
        stored = self.into.keys_and_values(layer_idx)
        if self.separate and gives_log_sum_exp(*stored):
            return stored
        pairs = [
            segment.rows(layer_idx, torch.from_numpy(rows).to(keys.device)) for segment, rows in self.before
        ]
        pairs.append(stored)
        return torch.cat([pair[0] for pair in pairs], 2), torch.cat([pair[1] for pair in pairs], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of slots before the new ones. Called by transformers' decoder."""
        return self._all_positions.shape[1] - self.positions.shape[1]


def attention_masks(
    view: View, family: Family, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Make what a model adds to its attention scores, [rows, 1, new slots, all slots]: 0 where a slot is
    attended to, the type's least number elsewhere. The output of slots without a token is never read.

    Args:
        family, config: of the model. One with blocks of several kinds takes a mask for each kind, by its
            name.
        dtype: in which the model computes. device: on which.

    Raises:
        ModelError: the model has another kind of attention.
    """
    causal = _mask(view.attended(), dtype, device)
    window = getattr(config, "sliding_window", None)
    if family.masks == "causal" or (family.masks == "window" and window is None):
        return causal
    if family.masks == "window":
        return _mask(view.attended(window), dtype, device)
    kinds = set(config.layer_types)
    if unknown := kinds - {FULL, SLIDING}:
        raise ModelError(
            f"{config.model_type}: generation does not support attention of kind "
            f"{', '.join(sorted(unknown))}; evaluate this model by its held-out loss"
        )
    sliding = {SLIDING: _mask(view.attended(window), dtype, device)} if SLIDING in kinds else {}
    return {FULL: causal} | sliding


def _mask(attended: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    open_slots = torch.from_numpy(attended).to(device).unsqueeze(1)
    least = torch.finfo(dtype).min
    return torch.zeros(open_slots.shape, dtype=dtype, device=device).masked_fill_(~open_slots, least)
