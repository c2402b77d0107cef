"""`flexlora`: the best rank-r approximation of the mean of the products B A (FlexLoRA, Bai et al., NeurIPS
2024).

Every client's factors travel in a slot of their own, so the sum hides nobody: for the plain exchange only.
What is no factor (the bias of a B) is averaged. Factors are given anew each round, up to a rotation that
changes nothing.
"""

import math

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import Aggregate, Method, Turn
from fedspeed.federation.methods.factors import distance, mean_product, product_distance
from fedspeed.federation.methods.per_client import PerClient
from fedspeed.models.factors import pairs


class FlexLora(Method):
    """See the module's docstring."""

    exact_error = True

    def __init__(self, config, layout: Layout, **run):
        super().__init__(config, layout, **run)
        self._slots = PerClient(layout, self.clients)

    def values(self, round):
        return self._slots.values

    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        return self._slots.fill(turn.client, end, weight)

    def aggregate(self, state, total, weight, *, round, exchange=0, factor=1.0):
        shares, present = self._slots.read(total)
        new, lost, whole = {}, 0.0, 0.0
        for a, b in pairs(self.layout.names):
            mean = mean_product([t[b] for t in present], [t[a] for t in present], shares)
            new[b] = mean.b
            # Where nobody has moved off B = 0, A stays: with both at zero, neither would ever have a gradient
            # again.
            new[a] = mean.a if mean.norm else state[a]
            lost, whole = lost + mean.lost**2, whole + mean.norm**2
        new |= self._slots.means(total, set(self.layout.names) - new.keys())
        return Aggregate(new, (lost / whole) ** 0.5 if whole else 0.0)

    def update_norm(self, before, after):
        """Return the norm of what has changed, of products B A."""
        found = pairs(self.layout.names)
        products = [product_distance((before[b], before[a]), (after[b], after[a])) for a, b in found]
        others = set(self.layout.names) - {name for pair in found for name in pair}
        return math.hypot(*products, distance(before, after, others))
