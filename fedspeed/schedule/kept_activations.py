"""Which activations of a step are kept for its backward pass, within a budget; the others are recomputed.
Pure.
"""

from collections.abc import Sequence


def kept_counts(budget: int, nbytes: Sequence[int], blocks: int, lowest: int = 0) -> list[int]:
    """Return, for each block, how many micro-batches keep their activations; these are the first ones.

    The budget is spent from the last block backwards, because its activations are needed soonest. The last
    block itself keeps none, since its backward pass follows its forward pass at once.

    Args:
        budget: bytes.
        nbytes: for each micro-batch, the bytes of one block's activations.
        lowest: the first block that has a backward pass.
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
    """Return what `kept_counts` returns if all micro-batches are of one size and the budget is enough for
    `count` pairs of a block and a micro-batch.
    """
    full, rest = divmod(min(count, micro_batches * (blocks - 1)), micro_batches)
    kept = [0] * (blocks - 1 - full) + [micro_batches] * full + [0]
    if rest:
        kept[blocks - 2 - full] = rest
    return kept
