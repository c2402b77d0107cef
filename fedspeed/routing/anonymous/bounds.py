"""Agree on bounds for the values of a sum, so that none of them is clipped. Pure.

An update travels as fixed-point integers, whose range must hold every member's values and every sum of
values. A range taken from the last round's update fits neither the first round nor one in which other tensors
train. So before each update the members sum, exactly and masked, a norm bound for each block of values: the
block's Euclidean norm, times a secret factor between 1 and 2 that each member derives from its key and its
update, so that a repeated round has the same one. The sum of all norm bounds is the bound of the block: no
value and no sum of values is above it. A largest value is never revealed.

The factor hides the summands: had they a grid (say powers of two), each could be read from the sum. And if a
member is lost between the two sums, the difference tells no more than the order of magnitude of its norms.

Precision: with K members and n values in a block, the bound is at most 2.02 * sqrt(n) * K times the root mean
square of one member's values, and the unit of the fixed-point numbers is bound / 2^30. With BLOCK_VALUES
values in a block, the rounding error of a sum is at most 2e-7 * K of the sum if updates have nothing in
common, and 2e-7 * sqrt(K) if they are equal (root mean squares; tests/routing/anonymous/test_bounds.py). A
float32 number is rounded by up to 6e-8 of itself.
"""

import math
from collections.abc import Sequence

import numpy as np

from fedspeed.routing.anonymous.ring import EXACT_LIMIT, FRACTION_BITS

# Values that share a bound, at most. Smaller blocks would reveal more about an update, and cost more sums.
BLOCK_VALUES = 1 << 16
MAX_NORM_BOUND = EXACT_LIMIT / 2
MIN_NORM_BOUND = 2.0**-FRACTION_BITS  # unless all values are zero
_SAFETY = 1.01  # above the rounding error of a float32 sum of BLOCK_VALUES squares
# Sums of squares between these are right in float32: no square that matters underflows, and none overflows.
_FLOAT32_SAFE = (2.0**-80, 2.0**100)


def blocks_of(tensor_lengths: Sequence[int]) -> list[slice]:
    """Cut a vector into the blocks that have a bound of their own.

    Args:
        tensor_lengths: lengths of the tensors that the vector consists of. No block spans two of them.

    Returns:
        Ranges of at most BLOCK_VALUES values, in order; those of one tensor have the same length, but for the
        last.
    """
    blocks = []
    start = 0
    for length in tensor_lengths:
        count = -(-length // BLOCK_VALUES)
        width = -(-length // count) if count else 0
        blocks += [slice(start + i * width, start + min((i + 1) * width, length)) for i in range(count)]
        start += length
    return blocks


def norm_bound(values: np.ndarray, factor: float = 1.0) -> float:
    """Return the Euclidean norm of `values` [n] float32, rounded up, times `factor`.

    Values that are not finite do not count. Returns 0 if all are zero, and infinity above MAX_NORM_BOUND.

    Args:
        factor: at least 1.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.dot(values, values))
    if not _FLOAT32_SAFE[0] < square < _FLOAT32_SAFE[1]:
        wide = np.where(np.isfinite(values), values, 0).astype(np.float64)
        square = float(np.dot(wide, wide))
    if square == 0.0:
        return 0.0
    bound = max(MIN_NORM_BOUND, factor * _SAFETY * math.sqrt(square))
    return bound if bound <= MAX_NORM_BOUND else math.inf


def norm_bounds(vector: np.ndarray, blocks: Sequence[slice], random_bits: np.ndarray) -> np.ndarray:
    """Return the norm bound of each block of `vector` [n] float32: [blocks] float64.

    Args:
        random_bits: [blocks] uint32, from which the factors between 1 and 2 are made, uniform on a
            logarithmic scale.
    """
    factors = np.exp2(random_bits * 2.0**-32)
    return np.array(
        [norm_bound(vector[block], factor) for block, factor in zip(blocks, factors, strict=True)],
        dtype=np.float64,
    )
