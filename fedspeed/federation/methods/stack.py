"""`stack`: the clients' factors stacked, whose product is exactly the mean of the clients' products (FLoRA,
Wang et al., NeurIPS 2024).

With shares p_i that sum to 1, the product of [p_1 B_1 .. p_K B_K] and [A_1; ..; A_K] is the mean of the B_i
A_i. It is added to the folded adapter, and the clients begin the next round with a new A and B = 0. Every
round therefore trains r new directions, and the rank of the folded adapter grows by K r a round until it has
as many values as the weights.

Clients may have different LoRA ranks r_i (`adapter.rank_by_client`). Each trains the first r_i of the new
directions, and the folded product is exact all the same.
"""

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import Aggregate
from fedspeed.federation.methods.factors import fresh_a, untrained
from fedspeed.federation.methods.folding import FoldingMethod
from fedspeed.models.factors import pairs


class Stack(FoldingMethod):
    """FLoRA: folds the stacked factors, and draws new ones."""

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
        stacked = {}
        for number, (a, b) in enumerate(pairs(self.layout.names)):
            lefts = [share * end[b].astype(np.float64) for share, end in zip(shares, ends)]
            rights = [end[a] for end in ends]
            rest, directions = untrained(state[b], state[a], [len(end[a]) for end in ends], shares)
            if rest.any():  # B = 0 at the start of a round, unless it is the run's first
                lefts.append(rest)
                rights.append(directions)
            stacked[a] = (np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0).astype(np.float64))
            new[a] = fresh_a(a, state[a].shape, (self.seed, round, number))
            new[b] = np.zeros_like(state[b])
        new |= self._slots.means(total, set(self.layout.names) - new.keys())
        return Aggregate(new | self.folded(state, stacked), 0.0)
