"""What adapters add to the modules of a base."""

import numpy as np

from fedspeed.models.factors import pairs
from fedspeed.models.folded import as_factors, folded_parts, module_of


def products(state):
    """What each module adds to its base, by its factor A, in float64."""
    found = {}
    for a, b in pairs(name for name in state if ":" not in name):
        found[a] = state[b].astype(np.float64) @ state[a]
        if folded := folded_parts(state).get(module_of(a)):
            left, right = as_factors(folded)
            found[a] = found[a] + left.astype(np.float64) @ right
    return found
