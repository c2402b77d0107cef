"""Agree on how large the values of a sum may be, so that none of them is cut. Pure.

An update travels in fixed-point numbers, and these need a span that no member's value and no sum of values is
beyond. A span that the last round's update gives fits neither the first round nor one in which other tensors
train. So each member tells, in an exact masked sum before its update, a size for each block of values: their
Euclidean norm, times a factor between 1 and 2 that it draws anew each time. The sum of all sizes bounds every
value and every sum of values. A largest value is never told. The factor keeps the summands apart from what
they sum to (of powers of two, say, each could be read from the sum), and leaves of the size of a member that
is lost between the two sums no more than its order of magnitude.

What it costs: the span is at most 2.02 * sqrt(n) * K times the root mean square of a member's values, for n
    values in a block and K
members. One unit of the fixed-point numbers is span / 2^30, so that with blocks of BLOCK_VALUES the rounding
error of a sum is at most 2e-7 * K of the sum where updates have nothing in common, and 2e-7 * sqrt(K) where
they are equal (root mean squares; tests/routing/anonymous/test_bounds.py). One float32 number is rounded by
up to 6e-8 of itself.
"""

import math
from collections.abc import Sequence

import numpy as np

from fedspeed.routing.anonymous.ring import EXACT_LIMIT, FRACTION_BITS

BLOCK_VALUES = (
    1 << 16
)  # most values that share a span: fewer would be told apart more finely, at the price of more sums
LARGEST = EXACT_LIMIT / 2  # that a size can be
SMALLEST = 2.0**-FRACTION_BITS  # that one is, unless all values are zero
_ABOVE = 1.01  # no rounding of a sum of BLOCK_VALUES squares takes more away
_EASY = (
    2.0**-80,
    2.0**100,
)  # sums of squares that float32 gets right: no square is lost that counts, and none is infinite


def blocks_of(parts: Sequence[int]) -> list[slice]:
    """Cut a vector into the ranges that have a span of their own.

    Args:
        parts: lengths of what belongs together in the vector, such as tensors. No block contains values of
            two of them.

    Returns:
        Ranges of at most BLOCK_VALUES values, in order; those of one part are equally long, but for the last.
    """
    found = []
    start = 0
    for length in parts:
        count = -(-length // BLOCK_VALUES)
        width = -(-length // count) if count else 0
        found += [slice(start + i * width, start + min((i + 1) * width, length)) for i in range(count)]
        start += length
    return found


def norm_bound(values: np.ndarray, factor: float = 1.0) -> float:
    """Return the Euclidean norm of `values` [n] float32, more by more than all rounding, times `factor`.

    Values that are no numbers do not count. 0 where all are zero, infinity where the size is beyond LARGEST.

    Args:
        factor: at least 1.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.dot(values, values))
    if not _EASY[0] < square < _EASY[1]:
        wide = np.where(np.isfinite(values), values, 0).astype(np.float64)
        square = float(np.dot(wide, wide))
    if square == 0.0:
        return 0.0
    size = max(SMALLEST, factor * _ABOVE * math.sqrt(square))
    return size if size <= LARGEST else math.inf


def norm_bounds(vector: np.ndarray, blocks: Sequence[slice], bits: np.ndarray) -> np.ndarray:
    """Return [blocks] float64: the size of each block of `vector` [n] float32.

    Args:
        bits: [blocks] uint32, random: which factor from 1 to 2 each size gets, even on a scale of logarithms.
    """
    factors = np.exp2(bits * 2.0**-32)
    return np.array(
        [norm_bound(vector[block], factor) for block, factor in zip(blocks, factors, strict=True)],
        dtype=np.float64,
    )
