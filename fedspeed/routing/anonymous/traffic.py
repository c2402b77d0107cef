"""How many bytes members send each other: a function of public facts only. Pure."""

import numpy as np

from fedspeed.routing.anonymous import cells, paths
from fedspeed.routing.anonymous.crypto import KEY, SIGNATURE, TAG
from fedspeed.routing.anonymous.parameters import HASH, PublicParameters


def traffic(terms: PublicParameters, plan: paths.Plan) -> dict[str, np.ndarray]:
    """[members, members] bytes from row to column in every state of an attempt without losses: a function of
    public facts only.
    """
    n = len(terms.members)
    entry = len(terms.members) * cells.SERIAL + HASH
    ones = np.ones((n, n), np.int64)
    found = {}
    found["announce"] = ones * (4 * KEY + SIGNATURE)
    found["reveal"] = ones * (KEY + KEY + TAG)
    for level in range(plan.hops + 1):
        each = 1 if level == 0 else n
        found[f"hop {level}"] = np.array([
            [len(plan.between(level, s, r)) * each * cells.size(plan, level) for r in range(n)]
            for s in range(n)
        ])
    owned = np.array([len(plan.owned(i)) for i in range(n)])
    found["collect"] = ones * (owned * entry + SIGNATURE)[:, None]
    for i in range(n):
        found["collect"][i, paths.backup_of(i, n)] += 4 * plan.chunk_words * owned[i]
    found["vote"] = ones * (HASH * (1 + n) + 4)
    found["confirm"] = ones * (8 + SIGNATURE)
    if terms.masked:
        found["unmask"] = ones * KEY * (1 + n)
    found["sums"] = ones * (4 * plan.chunk_words * owned)[:, None]
    found["done"] = ones
    return found
