"""Base classes of `flexlora`, `stack` and `residual`, which read every client's product B A; and of the last
two, whose aggregate is exact because what exceeds rank r is added to a frozen folded adapter
(`models.folded`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import Method
from fedspeed.federation.methods.factors import distance, product_norm
from fedspeed.federation.methods.per_client import PerClient
from fedspeed.federation.methods.turns import Turn
from fedspeed.models.factors import pairs
from fedspeed.models.folded import LEFT, RIGHT, WHOLE, folded_parts, module_of, rank_of, with_folded
from fedspeed.models.lora_ranks import cut

Folded = Mapping[str, np.ndarray]  # one module's arrays from `folded_parts`; empty where nothing is folded
Factors = tuple[np.ndarray, np.ndarray]  # [out, R] and [R, in] float64, of a product


def _product(folded: Folded, shape: tuple[int, ...]) -> np.ndarray:
    """Return a module's folded product [out, in] in float64; zeros where nothing is folded."""
    if not folded:
        return np.zeros(shape)
    if WHOLE in folded:
        return folded[WHOLE].astype(np.float64)
    return folded[LEFT].astype(np.float64) @ folded[RIGHT]


def folded_delta(before: Folded, after: Folded) -> tuple[list[Factors], np.ndarray | None]:
    """Return the change of a module's folded product: as (factors of products whose sum it is, None), or as
    ([], the matrix [out, in]).
    """
    if WHOLE in after:
        return [], after[WHOLE] - _product(before, after[WHOLE].shape)
    if not after:
        return [(-before[LEFT], before[RIGHT])] if before else [], None
    if not before:
        return [(after[LEFT], after[RIGHT])], None
    count = before[LEFT].shape[1]
    if np.array_equal(after[LEFT][:, :count], before[LEFT]) and np.array_equal(
        after[RIGHT][:count], before[RIGHT]
    ):
        return [(after[LEFT][:, count:], after[RIGHT][count:])], None
    return [(after[LEFT], after[RIGHT]), (-before[LEFT], before[RIGHT])], None


def _norm_with(whole: np.ndarray, products: Sequence[Factors]) -> float:
    """Return the Frobenius norm of the sum of a matrix and some products."""
    return float(np.linalg.norm(whole + sum(left.astype(np.float64) @ right for left, right in products)))


class ProductMethod(Method):
    """A method that computes with every client's product. The summed vector has separate values for each
    client's factors, so the sum hides no client's update.

    Clients may have smaller LoRA ranks than the common state (`models.lora_ranks`). A client then starts
    from the leading directions of the common product, with the others frozen as folded arrays, and sends the
    factors of its own rank.
    """

    factor_error_is_exact = True

    def __init__(self, config: Any, layout: Layout, *, lora_ranks: Sequence[int] = (), **run: Any):
        """Prepare the method for a run.

        Args:
            lora_ranks: by client; empty: all have the rank of the layout. The others: see `Method`.
        """
        super().__init__(config, layout, **run)
        self._lora_ranks = tuple(lora_ranks)
        self._slots = PerClient(layout, self.clients, self._lora_ranks)
        self._cut_of: Arrays = {}  # the state that clients of the current round start from
        self._cuts: dict[int, Arrays] = {}  # what it is for clients of a rank

    def turn(self, client: int, round: int, state: Arrays, **task: Any) -> Turn:
        turn = super().turn(client, round, state, **task)
        return turn.starting_at(self._start_of(client, state)) if self._lora_ranks else turn

    def _start_of(self, client: int, state: Arrays) -> Arrays:
        """Return what a client of its rank starts from. Clients of one rank get the same arrays, so that an
        engine uploads the folded ones once.
        """
        lora_rank = self._lora_ranks[client]
        if lora_rank == rank_of(state):
            return state
        if self._cut_of is not state:
            self._cut_of = state
            self._cuts = {}
        if lora_rank not in self._cuts:
            self._cuts[lora_rank] = cut(state, lora_rank)
        return self._cuts[lora_rank]

    def values(self, round: int) -> int:
        return self._slots.values

    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        return self._slots.fill(turn.client, end, weight)

    def update_norm(self, before: Arrays, after: Arrays) -> float:
        """Return the norm of the change between two states, computed from products of factors, folded ones
        included, rather than from the factors.
        """
        old = folded_parts(before)
        new = folded_parts(after)
        norms = []
        factor_pairs = pairs(self.layout.names)
        for a, b in factor_pairs:
            module = module_of(a)
            products = [(after[b], after[a]), (-before[b], before[a])]
            factors, whole = folded_delta(old.get(module, {}), new.get(module, {}))
            norms.append(product_norm(products + factors) if whole is None else _norm_with(whole, products))
        others = set(self.layout.names) - {name for pair in factor_pairs for name in pair}
        return math.hypot(*norms, distance(before, after, others))


class FoldingMethod(ProductMethod):
    """A method that folds what exceeds rank r. Arrays that are no factors (the bias of a B) are averaged."""

    def folded(self, state: Arrays, additions: Mapping[str, Factors]) -> Arrays:
        """Return all folded arrays of a state after some products were added; see `with_folded`."""
        return with_folded(state, additions)
