"""`clip`: no client's delta is longer than a bound, so that none moves the mean by more than its share of
that.
"""

import math

import numpy as np

from fedspeed.federation.arrays import square_norm
from fedspeed.federation.updates.base import Update


class Clip(Update):
    """Scales a delta down to `norm` where it is longer. It promises nothing about what a delta tells, so
    nothing else has to be hidden with it.
    """

    hides = frozenset()

    def __init__(self, config):
        super().__init__(config)
        self._spent = {"clip_updates": 0.0, "clip_shortened": 0.0, "clip_norms": 0.0}

    def __call__(self, delta, weight, rng):
        length = math.sqrt(square_norm(delta))
        self._spent["clip_updates"] += 1
        self._spent["clip_norms"] += length
        if length <= self.config.norm:
            return delta, weight
        self._spent["clip_shortened"] += 1
        factor = self.config.norm / length
        return {name: (factor * array).astype(np.float32) for name, array in delta.items()}, weight

    def spent(self):
        """Return updates that were seen, those of them that were shortened, and the sum of their norms
        before.
        """
        return dict(self._spent)
