"""What `flexlora`, `stack` and `residual` have in common: they see every client's product B A. And what the
last two have: an aggregate that is exact, because what is no LoRA of rank r is folded away.

See `models.folded` for the folded adapter itself.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import Method, Turn
from fedspeed.federation.methods.factors import distance, product_norm
from fedspeed.federation.methods.per_client import PerClient
from fedspeed.models.factors import pairs
from fedspeed.models.folded import LEFT, RIGHT, WHOLE, folded_parts, module_of, named

Parts = Mapping[str, np.ndarray]  # of one module, as `folded_parts` gives them; empty where nothing is folded
Factors = tuple[np.ndarray, np.ndarray]  # [out, R] and [R, in] float64, of a product


def fold(parts: Parts, left: np.ndarray, right: np.ndarray) -> Arrays:
    """Return a module's folded arrays with the product of `left` [out, k] and `right` [k, in] added.

    Factors are put beside those that are there. As soon as they would take as many values as their product,
    the product is kept in their place, so that the folded adapter never becomes larger than the matrices that
    it stands beside.
    """
    if WHOLE in parts:
        return {WHOLE: (parts[WHOLE] + left @ right).astype(np.float32)}
    if parts:
        left = np.concatenate([parts[LEFT], left], axis=1)
        right = np.concatenate([parts[RIGHT], right], axis=0)
    if left.size + right.size >= len(left) * right.shape[1]:
        return {WHOLE: (left.astype(np.float64) @ right).astype(np.float32)}
    return {LEFT: left.astype(np.float32), RIGHT: right.astype(np.float32)}


def _product(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    """Return a module's folded product [out, in] in float64; zeros where nothing is folded."""
    if not parts:
        return np.zeros(shape)
    if WHOLE in parts:
        return parts[WHOLE].astype(np.float64)
    return parts[LEFT].astype(np.float64) @ parts[RIGHT]


def folded_delta(before: Parts, after: Parts) -> tuple[list[Factors], np.ndarray | None]:
    """Return what a module's folded product has become more: as products to be added up, or as a whole [out,
    in].
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
    """Return the Frobenius norm of a matrix and some products added up."""
    return float(np.linalg.norm(whole + sum(left.astype(np.float64) @ right for left, right in products)))


class ProductMethod(Method):
    """A method that is exact about products: every client's factors travel in a slot of their own, so the sum
    hides nobody.
    """

    exact_error = True

    def __init__(self, config, layout: Layout, **run):
        super().__init__(config, layout, **run)
        self._slots = PerClient(layout, self.clients)

    def values(self, round):
        return self._slots.values

    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        return self._slots.fill(turn.client, end, weight)

    def update_norm(self, before, after):
        """Return the norm of what has changed, of products: those of the factors, and the folded ones."""
        old = folded_parts(before)
        new = folded_parts(after)
        norms = []
        found = pairs(self.layout.names)
        for a, b in found:
            module = module_of(a)
            products = [(after[b], after[a]), (-before[b], before[a])]
            factors, whole = folded_delta(old.get(module, {}), new.get(module, {}))
            norms.append(product_norm(products + factors) if whole is None else _norm_with(whole, products))
        others = set(self.layout.names) - {name for pair in found for name in pair}
        return math.hypot(*norms, distance(before, after, others))


class FoldingMethod(ProductMethod):
    """One that folds what is no LoRA of rank r. What is no factor (the bias of a B) is averaged."""

    def folded(self, state: Arrays, additions: Mapping[str, Factors]) -> Arrays:
        """Return all folded arrays of a state, with a product added to some modules, by their factor A's
        names.
        """
        parts = folded_parts(state)
        for a, (left, right) in additions.items():
            module = module_of(a)
            parts[module] = fold(parts.get(module, {}), left, right)
        return {name: array for module, own in parts.items() for name, array in named(module, own).items()}
