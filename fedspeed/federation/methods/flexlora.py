"""`flexlora`: the best rank-r approximation of the mean of the products B A (FlexLoRA, Bai et al., NeurIPS
2024).

The summed vector has separate values for every client's factors, so that only the plain exchange allows it.
Arrays that are no factors (the bias of a B) are averaged. The factors are new in each round, determined by
their product up to a rotation.
"""

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import Aggregate
from fedspeed.federation.methods.factors import mean_product
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
            mean = mean_product([end[b] for end in ends], [end[a] for end in ends], shares)
            new[b] = mean.b
            # While B = 0 on all clients, A is not replaced by zeros: neither would ever have a gradient
            # again.
            new[a] = mean.a if mean.norm else state[a]
            lost = lost + mean.lost**2
            whole = whole + mean.norm**2
        new |= self._slots.means(total, set(self.layout.names) - new.keys())
        return Aggregate(new, (lost / whole) ** 0.5 if whole else 0.0)
