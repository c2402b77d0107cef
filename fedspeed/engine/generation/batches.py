"""Decide which prompts are computed together: as many as their keys and values have memory for. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

T = TypeVar("T")
SPARE_SLOTS = 31  # free ones behind a row's tokens, so that a new token does not copy all before it


@dataclass(frozen=True)
class Context:
    """Sizes of a context, which is computed once, and of the rows that follow it.

    Attributes:
        tokens: of the context, without the prefix of all contexts.
        rows: that follow it.
        more: tokens of a row at most.
        step: of these, tokens that are computed at once.
    """

    tokens: int
    rows: int
    more: int
    step: int


@dataclass(frozen=True)
class BatchLimits:
    """Bounds of what is computed together.

    Attributes:
        slot_bytes: of one token's key and value in one block. blocks: of the model.
        cache_bytes: for keys and values of all rows of a batch.
        batch_tokens: of contexts in a batch, whose activations wait between two blocks where a base is
            streamed.
        piece_tokens: of contexts that are computed at once, padding included. step_tokens: of rows that are.
    """

    slot_bytes: int
    blocks: int
    cache_bytes: int
    batch_tokens: int
    piece_tokens: int
    step_tokens: int

    def bytes_of(self, group: Sequence[Context], prefix: int) -> int:
        """Return the bytes of a group's keys and values, padding included, and of the copy that one block's
        attention reads where it cannot read segments separately: in it each row has the prefix and its
        context for itself.
        """
        widest = max(c.tokens for c in group)
        rows = sum(c.rows for c in group)
        more = max(c.more for c in group) + SPARE_SLOTS
        stored = len(group) * widest + rows * more
        copied = rows * (prefix + widest + more)
        return self.slot_bytes * (self.blocks * stored + copied)

    def allow_group(self, group: Sequence[Context], prefix: int) -> bool:
        """Tell whether contexts may be computed as one piece, and their rows as one."""
        padded = len(group) * max(c.tokens for c in group)
        steps = sum(c.rows for c in group) * max(c.step for c in group)
        fits = padded <= self.piece_tokens and steps <= self.step_tokens
        return fits and self.bytes_of(group, prefix) <= self.cache_bytes

    def allow_batch(self, groups: Sequence[Sequence[Context]], prefix: int) -> bool:
        """Tell whether groups may go through the model together."""
        padded = sum(len(group) * max(c.tokens for c in group) for group in groups)
        return (
            padded <= self.batch_tokens
            and sum(self.bytes_of(group, prefix) for group in groups) <= self.cache_bytes
        )


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Count the tokens that all sequences begin with; each keeps at least one token behind them."""
    first = sequences[0]
    shortest = min(map(len, sequences)) - 1
    same = np.ones(shortest, dtype=bool)
    for sequence in sequences[1:]:
        same &= first[:shortest] == sequence[:shortest]
    return int(shortest if same.all() else same.argmin())


def divide_contexts(contexts: Sequence[Context], limits: BatchLimits, prefix: int) -> list[list[list[int]]]:
    """Divide contexts, by number, into batches of groups: a group is computed as one piece, a batch goes
    through the model together. The longest come first, so that a group is of about one length. A single
    context may exceed the limits.
    """
    order = sorted(range(len(contexts)), key=lambda i: (-contexts[i].tokens, i))
    groups = _filled(order, lambda group: limits.allow_group([contexts[i] for i in group], prefix))
    return _filled(
        groups, lambda batch: limits.allow_batch([[contexts[i] for i in group] for group in batch], prefix)
    )


def _filled(items: Iterable[T], fits: Callable[[list[T]], bool]) -> list[list[T]]:
    """Put items together, in order, as long as they fit."""
    lists: list[list[T]] = []
    for item in items:
        if lists and fits([*lists[-1], item]):
            lists[-1].append(item)
        else:
            lists.append([item])
    return lists


def divide_rows(context: Context, limits: BatchLimits, prefix: int) -> list[range]:
    """Divide the rows of one context, by number, into parts that are each within the limits: their number is
    halved until they are.
    """
    most = context.rows
    while most > 1 and not limits.allow_group([replace(context, rows=most)], prefix):
        most = -(-most // 2)
    return [range(start, min(start + most, context.rows)) for start in range(0, context.rows, most)]


def right_aligned(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Align sequences at their ends: (tokens [rows, longest] int64, whether each is a token [rows, longest]
    bool). Padding before a sequence is token 0.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    real = np.arange(width) >= width - lengths[:, None]
    tokens = np.zeros(real.shape, dtype=np.int64)
    tokens[real] = np.concatenate(sequences)
    return tokens, real
