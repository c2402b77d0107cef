"""Keys and values of tokens that have been computed, for the tokens that look back at them.

What several rows begin with is kept once: a prefix of all prompts, then a prompt for all of its samples, then
    each row's own
tokens. Each slot's position in its sequence is known beside the values, and that no token is there: what a
token sees follows from positions alone, so a slot may be anywhere.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PretrainedConfig

from fedspeed.errors import ModelError
from fedspeed.models.families.base import Family

Pair = tuple[torch.Tensor, torch.Tensor]
NOTHING = -1  # position of a slot that holds no token
# Kinds of attention, as transformers names them in `layer_types`.
FULL = "full_attention"
SLIDING = "sliding_attention"
_numbers = itertools.count()


class Segment:
    """Hold keys and values [rows, heads, slots, width] of some rows, for each block that this rank computes.

    Attributes:
        number: that no other segment of this process has.
        positions: [rows, slots] int64, of each slot's token in its sequence; NOTHING where there is none.
    """

    def __init__(self, rows: int):
        self.number = next(_numbers)
        self.positions = np.zeros((rows, 0), dtype=np.int64)
        self._values: dict[int, Pair] = {}

    def append(self, block: int, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """Add slots behind those that a block has; returns all of its keys and values."""
        if block in self._values:
            before = self._values[block]
            keys = torch.cat([before[0], keys], 2)
            values = torch.cat([before[1], values], 2)
        self._values[block] = keys, values
        return keys, values

    def rows(self, block: int, which: torch.Tensor) -> Pair:
        """Give keys and values of some rows, [k] int64, which may come several times. Those of a single row
        are no copy.
        """
        keys, values = self._values[block]
        if keys.shape[0] == 1:
            return keys.expand(len(which), -1, -1, -1), values.expand(len(which), -1, -1, -1)
        return keys.index_select(0, which), values.index_select(0, which)

    def keep(self, which: np.ndarray) -> None:
        """Let go of all rows but some, [k] int64."""
        self.positions = self.positions[which]
        for block, (keys, values) in self._values.items():
            at = torch.from_numpy(which).to(keys.device)
            self._values[block] = keys.index_select(0, at), values.index_select(0, at)


class View:
    """Stand for transformers' cache while one piece of tokens is computed: what the tokens see, and where
    they are kept.

    Args:
        before: segments that the rows look back at, each with the row of it that every row sees, [rows]
            int64.
        into: what the new tokens are added to, and what it holds is seen too.
        positions: [rows, new slots] int64, of the new tokens; NOTHING where there is none.
        kept: rows of `into` that go on, [rows] int64, where others have been let go; None: all.

    All four are attributes too, so that another rank can be told of the view.
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
        if kept is not None:
            into.keep(kept)
        into.positions = np.concatenate([into.positions, positions], axis=1)
        self._all = np.concatenate(
            [*(segment.positions[rows] for segment, rows in before), into.positions], axis=1
        )

    def sees(self, window: int | None = None) -> np.ndarray:
        """Tell which slots a new one sees, [rows, new slots, all slots] bool: tokens up to itself, of the
        last `window` ones where there is a window.
        """
        query = self.positions[:, :, None]
        key = self._all[:, None, :]
        seen = (key != NOTHING) & (key <= query)
        return seen if window is None else seen & (key > query - window)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> Pair:
        """Keep a block's new keys and values; returns all that its tokens may look at. Called by the
        block.
        """
        found = [
            segment.rows(layer_idx, torch.from_numpy(rows).to(keys.device)) for segment, rows in self.before
        ]
        found.append(self.into.append(layer_idx, keys, values))
        return torch.cat([pair[0] for pair in found], 2), torch.cat([pair[1] for pair in found], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Give the number of slots before the new ones."""
        return self._all.shape[1] - self.positions.shape[1]


def attention_masks(
    view: View, family: Family, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Make what a model adds to its attention's scores, [rows, 1, new slots, all slots]: 0 where a slot is
    seen.

    Slots that hold no token see nothing, evenly, and their output is asked for by nobody.

    Args:
        family, config: of the model. One with blocks of several kinds takes a mask for each kind.
        dtype: in which the model computes. device: on which.

    Raises:
        ModelError: the model has another kind of attention.
    """
    causal = _mask(view.sees(), dtype, device)
    window = getattr(config, "sliding_window", None)
    if family.masks == "causal" or (family.masks == "window" and window is None):
        return causal
    if family.masks == "window":
        return _mask(view.sees(window), dtype, device)
    kinds = set(config.layer_types)
    if unknown := kinds - {FULL, SLIDING}:
        raise ModelError(
            f"{config.model_type}: generation knows no attention of kind {', '.join(sorted(unknown))}; "
            "evaluate this model by its held-out loss"
        )
    return {FULL: causal} | ({SLIDING: _mask(view.sees(window), dtype, device)} if SLIDING in kinds else {})


def _mask(sees: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    seen = torch.from_numpy(sees).to(device).unsqueeze(1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
