"""Pack short rows into sequences, so that fewer tokens of a batch are padding.

A sequence is a list of rows. Which rows share one is decided once for a client, and depends on nothing but
the rows' lengths and the client's number. So the rows of a step stay a function of (seed, client, step).
"""

from collections.abc import Sequence

import numpy as np

from fedspeed.data import streams

Sequences = tuple[tuple[int, ...], ...]


def pack(lengths: Sequence[int], limit: int, client: int) -> Sequences:
    """Put rows into sequences: each row, in an order that is drawn once, into the first sequence that still
    has room for it (first fit; Johnson et al., SIAM J. Comput. 1974).

    Args:
        lengths: tokens of each row, none above the limit. limit: tokens of a sequence.
        client: number of the client, from 0; -1 for public rows.

    Returns:
        the numbers of the rows of each sequence, in the order in which they stand there.
    """
    order = np.random.default_rng([streams.PACKING, client + 1]).permutation(len(lengths))
    room = np.full(len(lengths), limit)  # of as many sequences as there could be
    sequences: list[list[int]] = []
    for row in order.tolist():
        first = int(np.argmax(room[: len(sequences) + 1] >= lengths[row]))
        if first == len(sequences):
            sequences.append([])
        sequences[first].append(row)
        room[first] -= lengths[row]
    return tuple(tuple(sequence) for sequence in sequences)


def position_ids(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Return the position of every token in its row, [sequences, width] int64. Padding goes on behind the
    last row.

    Args:
        rows: for each sequence, the tokens of each of its rows.
    """
    positions = np.empty((len(rows), width), dtype=np.int64)
    for sequence, lengths in zip(positions, rows):
        starts = np.cumsum([0, *lengths[:-1]])
        begun = np.zeros(width, dtype=np.int64)
        begun[starts] = starts
        sequence[:] = np.arange(width) - np.maximum.accumulate(begun)
    return positions


def row_lengths(positions: np.ndarray, tokens: Sequence[int]) -> list[list[int]]:
    """Return, for each sequence, the tokens of each of its rows: the reverse of `position_ids`.

    Args:
        positions: [sequences, width] int64. tokens: of each sequence, without padding.
    """
    lengths = []
    for sequence, end in zip(positions, tokens):
        starts = np.nonzero(sequence[:end] == 0)[0]
        lengths.append(np.diff([*starts, end]).tolist())
    return lengths
