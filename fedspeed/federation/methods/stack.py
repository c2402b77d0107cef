"""`stack`: the clients' factors put beside each other, which is the mean of their products exactly (FLoRA,
Wang et al., NeurIPS 2024).

With shares p_i that sum to 1, the product of [p_1 B_1 .. p_K B_K] and [A_1; ..; A_K] is the mean of the B_i
A_i. It is folded, and the clients begin the next round with a new A and B = 0. So every round trains r more
directions, and the folded adapter grows by K r a round until it is as large as the matrices it stands beside.
"""

import numpy as np

from fedspeed.federation.methods.base import Aggregate
from fedspeed.federation.methods.factors import fresh_a
from fedspeed.federation.methods.folding import FoldingMethod
from fedspeed.models.factors import pairs


class Stack(FoldingMethod):
    """See the module's docstring."""

    def aggregate(self, state, total, weight, *, round, exchange=0, factor=1.0):
        shares, ends = self._slots.read(total)
        new = {}
        stacked = {}
        for number, (a, b) in enumerate(pairs(self.layout.names)):
            left = np.concatenate(
                [share * end[b].astype(np.float64) for share, end in zip(shares, ends)], axis=1
            )
            stacked[a] = left, np.concatenate([end[a] for end in ends], axis=0).astype(np.float64)
            new[a] = fresh_a(a, state[a].shape, (self.seed, round, number))
            new[b] = np.zeros_like(state[b])
        new |= self._slots.means(total, set(self.layout.names) - new.keys())
        return Aggregate(new | self.folded(state, stacked), 0.0)
