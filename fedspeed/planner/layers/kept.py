"""Which activations of a step are kept for its backward pass, within a budget; the others are computed again. Pure."""

from collections.abc import Sequence


def kept_counts(budget: int, nbytes: Sequence[int], blocks: int, lowest: int = 0) -> list[int]:
    """For each block, how many micro-batches, the first ones, keep what their backward needs.

    The last blocks come first: theirs are needed soonest. The last block itself keeps nothing, since its backward follows its forward; blocks below
    `lowest` have none.

    Args:
        budget: bytes. nbytes: what one block keeps of each micro-batch.
    """
    counts = [0] * blocks
    for block in range(blocks - 2, lowest - 1, -1):
        for size in nbytes:
            if size > budget:
                return counts
            budget -= size
            counts[block] += 1
    return counts
