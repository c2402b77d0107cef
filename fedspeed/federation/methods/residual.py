"""`residual`: the mean of A and of B, and beside it, folded, what they are off (FedEx-LoRA, Singhal et al.,
ACL 2025).

The mean of the products B_i A_i is the product of the means and

    sum p_i (B_i - mean B) (A_i - mean A)  =  sum over i < K of p_i (B_i - mean B) (A_i - A_K),

since the p_i (B_i - mean B) add up to zero. So K clients fold away factors of rank (K - 1) r, never a matrix,
and train on with the means.
"""

import numpy as np

from fedspeed.federation.methods.base import Aggregate
from fedspeed.federation.methods.folding import FoldingMethod
from fedspeed.models.factors import pairs


class Residual(FoldingMethod):
    """See the module's docstring."""

    def aggregate(self, state, total, weight, *, round, exchange=0, factor=1.0):
        shares, ends = self._slots.read(total)
        new = self._slots.means(total, self.layout.names)
        residuals = {}
        for a, b in pairs(self.layout.names):
            mean = sum(share * end[b].astype(np.float64) for share, end in zip(shares, ends))
            last = ends[-1][a].astype(np.float64)
            if len(ends) > 1:
                left = [share * (end[b] - mean) for share, end in zip(shares[:-1], ends)]
                right = [end[a] - last for end in ends[:-1]]
                residuals[a] = np.concatenate(left, axis=1), np.concatenate(right, axis=0)
        return Aggregate(new | self.folded(state, residuals), 0.0)
