"""`flexlora`: the best rank-r approximation of the mean of the products B A (FlexLoRA, Bai et al., NeurIPS
2024).

The summed vector has separate values for every client's factors, so that only the plain exchange allows it.
Arrays that are no factors (the bias of a B) are averaged. The factors are new in each round, determined by
their product up to a rotation.

With `adapter.rank_by_client` a client of rank r trains the r directions of the common product that have the
largest singular values, and computes with the others frozen. Its product for the mean is B_i A_i plus these
others. So the common state changes by the mean of the clients' changes, and directions that only few clients
train keep what they are: a mean of the B_i A_i alone would shrink them in every round by the share of the
clients that do not have them.
"""

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import Aggregate
from fedspeed.federation.methods.factors import mean_product, untrained
from fedspeed.federation.methods.folding import ProductMethod
from fedspeed.models.factors import pairs


class FlexLora(ProductMethod):
    """FlexLoRA: truncates the mean product of every module to rank r."""

    def aggregate(
        self,
        state: Arrays,
        total: np.ndarray,
        weight: float,
        *,
        round: int,
        exchange: int = 0,
        factor: float = 1.0,
    ) -> Aggregate:
        shares, ends = self._slots.read(total)
        new: Arrays = {}
        lost = 0.0
        whole = 0.0
        for a, b in pairs(self.layout.names):
            left, right = untrained(state[b], state[a], [len(end[a]) for end in ends], shares)
            mean = mean_product(
                [*(end[b] for end in ends), left],
                [*(end[a] for end in ends), right],
                [*shares, 1.0],
                len(state[a]),
            )
            new[b] = mean.b
            # A direction whose B is zero, as all are before anything is learned, does not get an A of zeros:
            # neither would ever have a gradient again.
            new[a] = np.concatenate([mean.a[: mean.directions], state[a][mean.directions :]])
            lost = lost + mean.lost**2
            whole = whole + mean.norm**2
        new |= self._slots.means(total, set(self.layout.names) - new.keys())
        return Aggregate(new, (lost / whole) ** 0.5 if whole else 0.0)
