"""Compute how many bytes members send each other: it follows from public facts only. Pure."""

import numpy as np

from fedspeed.routing.anonymous import cells
from fedspeed.routing.anonymous.announcement import ANNOUNCEMENT
from fedspeed.routing.anonymous.crypto import DIGEST, KEY, SIGNATURE
from fedspeed.routing.anonymous.lists import entry_size
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.paths import PathPlan, backup_of


def traffic(parameters: PublicParameters, plan: PathPlan) -> dict[str, np.ndarray]:
    """Return by phase the bytes [sender, receiver] of an attempt in which nobody is lost."""
    n = len(parameters.members)
    ones = np.ones((n, n), np.int64)
    phases = {"announce": ones * ANNOUNCEMENT, "reveal": ones * (KEY + DIGEST + SIGNATURE)}
    for hop in range(plan.relays + 1):
        size = cells.size(plan, hop) * (1 if hop == 0 else n)
        counts = [
            [len(plan.chunks_between(hop, sender, receiver)) for receiver in range(n)] for sender in range(n)
        ]
        phases[f"hop {hop}"] = np.array(counts) * size
    owned = np.array([len(plan.owned(i)) for i in range(n)])
    phases["collect"] = ones * (owned * entry_size(n) + SIGNATURE)[:, None]
    for i in range(n):
        phases["collect"][i, backup_of(i, n)] += 4 * plan.chunk_length * owned[i]
    phases["confirm"] = ones * (DIGEST + SIGNATURE)
    if parameters.masked:
        phases["unmask"] = ones * (KEY + SIGNATURE)
    phases["sums"] = ones * (4 * plan.chunk_length * owned)[:, None]
    phases["challenge"] = ones * KEY
    phases["done"] = ones * (DIGEST + SIGNATURE)
    return phases
