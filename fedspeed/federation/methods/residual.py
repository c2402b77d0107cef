"""`residual`: the means of A and of B, with the error of their product added to the folded adapter
(FedEx-LoRA, Singhal et al., ACL 2025).

The mean of the products B_i A_i is the product of the means plus

    sum p_i (B_i - mean B) (A_i - mean A)  =  sum over i < K of p_i (B_i - mean B) (A_i - A_K),

since the p_i (B_i - mean B) add up to zero. K clients therefore fold factors of rank (K - 1) r rather than a
whole matrix, and continue with the means.
"""

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import Aggregate
from fedspeed.federation.methods.folding import FoldingMethod
from fedspeed.models.factors import pairs


class Residual(FoldingMethod):
    """FedEx-LoRA: averages factors, and folds the residual of their product."""

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
