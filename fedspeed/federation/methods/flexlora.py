"""`flexlora`: the best rank-r approximation of the mean of the products B A (FlexLoRA, Bai et al., NeurIPS
2024).

Every client's factors travel in a slot of their own, so the sum hides nobody: for the plain exchange only.
What is no factor (the bias of a B) is averaged. Factors are given anew each round, up to a rotation that
changes nothing.
"""

from fedspeed.federation.methods.base import Aggregate
from fedspeed.federation.methods.factors import mean_product
from fedspeed.federation.methods.folding import ProductMethod
from fedspeed.models.factors import pairs


class FlexLora(ProductMethod):
    """See the module's docstring."""

    def aggregate(self, state, total, weight, *, round, exchange=0, factor=1.0):
        shares, present = self._slots.read(total)
        new = {}
        lost = 0.0
        whole = 0.0
        for a, b in pairs(self.layout.names):
            mean = mean_product([t[b] for t in present], [t[a] for t in present], shares)
            new[b] = mean.b
            # Where nobody has moved off B = 0, A stays: with both at zero, neither would ever have a gradient
            # again.
            new[a] = mean.a if mean.norm else state[a]
            lost = lost + mean.lost**2
            whole = whole + mean.norm**2
        new |= self._slots.means(total, set(self.layout.names) - new.keys())
        return Aggregate(new, (lost / whole) ** 0.5 if whole else 0.0)
