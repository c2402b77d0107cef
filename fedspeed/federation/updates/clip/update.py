"""`clip`: bounds the Euclidean norm of each client's delta, and so its influence on the mean.

The bound `norm` is public: it is among the settings that sites compare before training. A client clips its
delta itself, before it is masked. Nobody can check that another participant has done so: a masked sum does
not show single updates, and a participant that lies can send a longer one.
"""

import math
from typing import Any

import numpy as np

from fedspeed.federation.arrays import Arrays, square_norm
from fedspeed.federation.updates.base import UpdateTransform


class Clip(UpdateTransform):
    """Scales a delta down to the norm `norm` where it is longer. It gives no guarantee of privacy, so nothing
    else has to be hidden.
    """

    hides = frozenset()

    def __init__(self, config: Any):
        super().__init__(config)
        self._spent = {"clip_updates": 0.0, "clip_shortened": 0.0, "clip_norms": 0.0}

    def __call__(self, delta: Arrays, weight: float, rng: np.random.Generator) -> tuple[Arrays, float]:
        length = math.sqrt(square_norm(delta))
        self._spent["clip_updates"] += 1
        self._spent["clip_norms"] += length
        if length <= self.config.norm:
            return delta, weight
        self._spent["clip_shortened"] += 1
        factor = self.config.norm / length
        return {name: (factor * array).astype(np.float32) for name, array in delta.items()}, weight

    def spent(self) -> dict[str, float]:
        """Return the numbers of updates and of shortened ones, and the sum of norms before clipping."""
        return dict(self._spent)
