"""A fixed choice of some items of an evaluation task."""

import numpy as np

from fedspeed.data import streams

SEED = 0  # not the run's: all runs are compared on the same items


def chosen_items(count: int, limit: int) -> list[int]:
    """Return the numbers of the chosen items, in their order: all of them, or `limit` of them at random.

    The choice depends on nothing but the two numbers. A smaller one is part of a larger one, so that scores
    on 100 and on 1000 items share 100.

    Args:
        count: number of items of the task. limit: number of items to choose; 0: all.
    """
    if not 0 < limit < count:
        return list(range(count))
    order = np.random.default_rng([SEED, streams.EVAL_ITEMS]).permutation(count)
    return sorted(order[:limit].tolist())
