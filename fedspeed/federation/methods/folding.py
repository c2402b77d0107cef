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
from fedspeed.models.folded import LEFT, RIGHT, WHOLE, folded_parts, module_of, named

Folded = Mapping[str, np.ndarray]  # one module's arrays from `folded_parts`; empty where nothing is folded
Factors = tuple[np.ndarray, np.ndarray]  # [out, R] and [R, in] float64, of a product


def fold(folded: Folded, left: np.ndarray, right: np.ndarray) -> Arrays:
    """Return a module's folded arrays with the product of `left` [out, k] and `right` [k, in] added.

    Factors are concatenated to the module's earlier ones. As soon as they would have as many values as their
    product, the product replaces them, so that the folded adapter never becomes larger than the weights.
    """
    if WHOLE in folded:
        return {WHOLE: (folded[WHOLE] + left @ right).astype(np.float32)}
    if folded:
        left = np.concatenate([folded[LEFT], left], axis=1)
        right = np.concatenate([folded[RIGHT], right], axis=0)
    if left.size + right.size >= len(left) * right.shape[1]:
        return {WHOLE: (left.astype(np.float64) @ right).astype(np.float32)}
    return {LEFT: left.astype(np.float32), RIGHT: right.astype(np.float32)}


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
    """

    factor_error_is_exact = True

    def __init__(
        self, config: Any, layout: Layout, *, clients: int, seed: int, hides: frozenset[str] = frozenset()
    ):
        super().__init__(config, layout, clients=clients, seed=seed, hides=hides)
        self._slots = PerClient(layout, self.clients)

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
        """Return all folded arrays of a state after some products were added.

        Args:
            additions: factors of the product to add to a module, by the name of the module's factor A.
        """
        by_module = folded_parts(state)
        for a, (left, right) in additions.items():
            module = module_of(a)
            by_module[module] = fold(by_module.get(module, {}), left, right)
        return {
            name: array
            for module, arrays in by_module.items()
            for name, array in named(module, arrays).items()
        }
