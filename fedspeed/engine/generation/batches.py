"""Which prompts are computed together: as many as their keys and values have room for. Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """What is computed once for some rows that follow it.

    Attributes:
        tokens: beyond the prefix of all contexts. rows: that follow it. more: tokens of a row at most. step:
            of them that are computed at once.
    """

    tokens: int
    rows: int
    more: int
    step: int


@dataclass(frozen=True)
class Room:
    """What bounds the work that is done together.

    Attributes:
        slot_bytes: of one token's key and value in one block. blocks: of the model.
        cache_bytes: for keys and values of all rows of a batch. batch_tokens: of contexts in a batch, whose
            activations wait between two blocks where a base is streamed.
        piece_tokens: of contexts that are computed at once, as padded. step_tokens: of rows that are.
    """

    slot_bytes: int
    blocks: int
    cache_bytes: int
    batch_tokens: int
    piece_tokens: int
    step_tokens: int

    def bytes_of(self, group: Sequence[Context], prefix: int) -> int:
        """Give the bytes of keys and values of a group, and of the copy that one block's attention reads, in
        which each row has the prefix and its context for itself. As padded.
        """
        widest = max(c.tokens for c in group)
        rows = sum(c.rows for c in group)
        more = max(c.more for c in group)
        kept = len(group) * widest + rows * more
        copied = rows * (prefix + widest + more)
        return self.slot_bytes * (self.blocks * kept + copied)

    def holds_group(self, group: Sequence[Context], prefix: int) -> bool:
        """Whether contexts may be computed as one piece, and their rows as one."""
        padded = len(group) * max(c.tokens for c in group)
        steps = sum(c.rows for c in group) * max(c.step for c in group)
        fits = padded <= self.piece_tokens and steps <= self.step_tokens
        return fits and self.bytes_of(group, prefix) <= self.cache_bytes

    def holds_batch(self, groups: Sequence[Sequence[Context]], prefix: int) -> bool:
        """Whether groups may go through the model together."""
        padded = sum(len(group) * max(c.tokens for c in group) for group in groups)
        return (
            padded <= self.batch_tokens
            and sum(self.bytes_of(group, prefix) for group in groups) <= self.cache_bytes
        )


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Count the tokens that all sequences begin with, each keeping one that is not of them."""
    first = sequences[0]
    shortest = min(map(len, sequences)) - 1
    same = np.ones(shortest, dtype=bool)
    for sequence in sequences[1:]:
        same &= first[:shortest] == sequence[:shortest]
    return int(shortest if same.all() else same.argmin())


def cut(contexts: Sequence[Context], room: Room, prefix: int) -> list[list[list[int]]]:
    """Divide contexts, by number, into batches of groups: a group is computed as one piece, a batch goes
    through the model together. The longest come first, so that a group is of about one length. One alone may
    be larger than the room.
    """
    order = sorted(range(len(contexts)), key=lambda i: (-contexts[i].tokens, i))
    groups = _filled(order, lambda group: room.holds_group([contexts[i] for i in group], prefix))
    return _filled(
        groups, lambda batch: room.holds_batch([[contexts[i] for i in group] for group in batch], prefix)
    )


def _filled(items: Iterable[T], fits: Callable[[list[T]], bool]) -> list[list[T]]:
    """Put items together, in order, as long as they fit."""
    found: list[list[T]] = []
    for item in items:
        if found and fits([*found[-1], item]):
            found[-1].append(item)
        else:
            found.append([item])
    return found


def parts_of_rows(context: Context, room: Room, prefix: int) -> list[range]:
    """Divide the rows of one context, by number, into parts that fit each by itself: halved until they do."""
    most = context.rows
    while most > 1 and not room.holds_group([replace(context, rows=most)], prefix):
        most = -(-most // 2)
    return [range(start, min(start + most, context.rows)) for start in range(0, context.rows, most)]


def right_aligned(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Put sequences under each other, their ends aligned: (tokens [rows, longest] int64, which are tokens
    [rows, longest] bool). What stands before them is token 0.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    real = np.arange(width) >= width - lengths[:, None]
    tokens = np.zeros(real.shape, dtype=np.int64)
    tokens[real] = np.concatenate(sequences)
    return tokens, real
