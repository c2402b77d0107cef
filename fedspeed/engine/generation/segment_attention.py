"""Compute attention over several segments of keys and values without copying them together for each row.

Rows that attend to the same row of a segment, such as a common prefix, read its keys and values once: their
queries are computed together (Hydragen, Juravsky et al., 2024). Each segment gives a partial output, and the
outputs are averaged with weights from the log-sum-exp of their scores (FlashAttention, Dao et al., 2022).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedspeed.engine.attention import DOT_PRODUCT, Partial, gives_log_sum_exp, partial_attention
from fedspeed.engine.generation.cache import NO_TOKEN, View


class SharedRows:
    """Groups the rows of a piece by the row of a segment that they attend to.

    A group has as many slots as the largest group has rows; in other groups the last slots repeat some row,
    and their output is dropped.

    Args:
        rows: the segment's row of each row of the piece, [rows] int64.
        available: number of the segment's rows.
    """

    def __init__(self, rows: np.ndarray, available: int):
        used, group, sizes = np.unique(rows, return_inverse=True, return_counts=True)
        order = np.argsort(group, kind="stable")
        first = np.cumsum(sizes) - sizes
        slots = np.empty(len(rows), dtype=np.int64)
        slots[order] = group[order] * sizes.max() + np.arange(len(rows)) - first[group[order]]
        members = np.zeros(len(used) * sizes.max(), dtype=np.int64)
        members[slots] = np.arange(len(rows))
        self._groups = len(used)
        self._in_order = len(members) == len(rows) and np.array_equal(members, np.arange(len(rows)))
        self._members = torch.from_numpy(members)
        self._slots = torch.from_numpy(slots)
        self._used = None if len(used) == available else torch.from_numpy(used)

    def of_segment(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the segment's rows that are attended to: [groups, ...] from [available, ...]."""
        return tensor if self._used is None else tensor.index_select(0, self._used)

    def grouped(self, tensor: torch.Tensor) -> torch.Tensor:
        """Group what each row of the piece has: [groups, slots, ...] from [rows, ...]."""
        chosen = tensor if self._in_order else tensor.index_select(0, self._members)
        return chosen.unflatten(0, (self._groups, -1))

    def ungrouped(self, tensor: torch.Tensor) -> torch.Tensor:
        """Invert `grouped`."""
        flat = tensor.flatten(0, 1)
        return flat if self._in_order else flat.index_select(0, self._slots)


class SegmentAttention:
    """The attention of one piece, each of whose segments is read by itself.

    Args:
        view: of the piece.
    """

    def __init__(self, view: View):
        self._view = view
        self._before = [segment for segment, _ in view.before]
        attended = [*view.before, (view.into, np.arange(len(view.positions)))]
        self._widths = [segment.positions.shape[1] for segment, _ in attended]
        self._shared = [SharedRows(rows, len(segment.positions)) for segment, rows in attended]
        self._tokens = torch.from_numpy(view.positions != NO_TOKEN)[:, None, :, None]
        self._masks: dict[int, tuple[torch.Tensor, list[SegmentMask]]] = {}

    @contextmanager
    def used(self, config: PretrainedConfig) -> Iterator[None]:
        """Let a model use this attention while it computes the piece. Where its kind of attention or its
        device does not allow that, its own attention stays, and the view copies the segments together.

        Args:
            config: of the model.
        """
        name = config._attn_implementation
        if name not in DOT_PRODUCT or not self._before:
            yield
            return
        usual = ALL_ATTENTION_FUNCTIONS[name]
        ALL_ATTENTION_FUNCTIONS[name] = partial(self._attend, usual)
        self._view.separate = True
        try:
            yield
        finally:
            self._view.separate = False
            ALL_ATTENTION_FUNCTIONS[name] = usual

    def _attend(
        self, usual: Callable, module: nn.Module, query: torch.Tensor, *tensors: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """Compute a block's attention. Called by transformers, except for the first argument.

        Args:
            usual: the model's own attention, for keys of all segments.
            module: the block's attention.
            query: [rows, heads, T, width].
            tensors: key and value, as `View.update` returned them, [rows, key heads, slots, width]; and what
                is added to scores, [rows, 1, T, slots of all segments].
            options: transformers' other arguments; `scaling` is the factor of the scores.

        Returns:
            ([rows, T, heads, width], no weights).
        """
        key, value, attention_mask = tensors
        if not gives_log_sum_exp(key, value):
            return usual(module, query, key, value, attention_mask, **options)
        block = module.layer_idx
        assert isinstance(block, int)
        pairs = [*(segment.keys_and_values(block) for segment in self._before), (key, value)]
        partials = []
        for shared, pair, mask in zip(self._shared, pairs, self._masks_of(attention_mask), strict=True):
            if mask.is_open:
                keys, values = map(shared.of_segment, pair)
                found = _of_groups(
                    shared.grouped(query), keys, values, mask=mask.added, scaling=options["scaling"]
                )
                output, log_sum_exp = map(shared.ungrouped, found)
                partials.append((output, log_sum_exp))
        return merged(partials).transpose(1, 2), None

    def _masks_of(self, attention_mask: torch.Tensor) -> "list[SegmentMask]":
        """Divide a mask into those of the segments; the same mask serves many blocks."""
        if id(attention_mask) not in self._masks:
            parts = attention_mask.split(self._widths, -1)
            masks = [self._mask(shared, part) for shared, part in zip(self._shared, parts)]
            self._masks[id(attention_mask)] = attention_mask, masks  # keeps it, so that no other has its id
        return self._masks[id(attention_mask)][1]

    def _mask(self, shared: SharedRows, part: torch.Tensor) -> "SegmentMask":
        is_open = (part == 0) & self._tokens
        everywhere = bool((is_open | ~self._tokens).all())
        return SegmentMask(bool(is_open.any()), None if everywhere else shared.grouped(part[:, 0]))


@dataclass(frozen=True)
class SegmentMask:
    """What a piece's tokens attend to of one segment.

    Attributes:
        is_open: whether any of them attends to any of its slots.
        added: what is added to scores, [groups, slots of a group, T, the segment's slots]; None where all of
            them attend to all.
    """

    is_open: bool
    added: torch.Tensor | None


def _of_groups(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> Partial:
    """Compute attention of groups of rows, each to keys and values of its own.

    Args:
        query: [groups, rows, heads, T, width]. keys, values: [groups, key heads, slots, width].
        mask: added to scores, [groups, rows, T, slots].

    Returns:
        (output [groups, rows, heads, T, width], log-sum-exp [groups, rows, heads, T]).
    """
    groups, rows, heads, tokens, width = query.shape
    if mask is not None and tokens > 1:  # a mask for each query head would be larger than repeated keys
        keys, values = (t.repeat_interleave(heads // t.shape[1], 1) for t in (keys, values))
    key_heads = keys.shape[1]
    # Query heads that share a key head become further queries of it.
    folded = query.unflatten(2, (key_heads, -1)).permute((0, 2, 3, 1, 4, 5))
    shape = folded.shape[:-1]
    if mask is not None:
        mask = mask.flatten(1, 2)[:, None, None].expand(-1, -1, shape[2], -1, -1).flatten(2, 3)
    output, log_sum_exp = partial_attention(folded.flatten(2, 4), keys, values, mask, scaling)
    output = output.view(*shape, width).permute((0, 3, 1, 2, 4, 5)).flatten(2, 3)
    return output, log_sum_exp.view(shape).permute(0, 3, 1, 2, 4).flatten(2, 3)


def merged(partials: Sequence[Partial]) -> torch.Tensor:
    """Merge outputs [rows, heads, T, width] of attention to several segments into that to all of them."""
    weights = torch.stack([log_sum_exp for _, log_sum_exp in partials]).softmax(0).unsqueeze(-1)
    total = sum(output * weight for (output, _), weight in zip(partials, weights))
    return total.to(partials[0][0].dtype)
