"""Which activations of a step are kept for its backward pass, within a budget; the others are computed again.
Pure.
"""

from collections.abc import Sequence


def kept_counts(budget: int, nbytes: Sequence[int], blocks: int, lowest: int = 0) -> list[int]:
    """For each block, how many micro-batches, the first ones, keep what their backward needs.

    The last blocks come first: theirs are needed soonest. The last block itself keeps nothing, since its
        backward follows its forward; blocks below
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


def equal_kept_counts(count: int, micro_batches: int, blocks: int) -> list[int]:
    """Tell what `kept_counts` gives where all micro-batches are of one size and `count` of them, over all
    blocks, fit into the budget.
    """
    full, rest = divmod(min(count, micro_batches * (blocks - 1)), micro_batches)
    kept = [0] * (blocks - 1 - full) + [micro_batches] * full + [0]
    if rest:
        kept[blocks - 2 - full] = rest
    return kept
