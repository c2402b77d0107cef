"""Named arrays, as the federation computes with them."""

from collections.abc import Iterable, Mapping

import numpy as np

Arrays = dict[str, np.ndarray]


def square_norm(arrays: Mapping[str, np.ndarray]) -> float:
    """Return the sum of the squares of all values, in float64."""
    return sum(float(np.sum(array.astype(np.float64) ** 2)) for array in arrays.values())


def square_distance(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], names: Iterable[str]
) -> float:
    """Return the squared Euclidean distance of two states over some of their arrays, in float64."""
    return sum(float(np.sum((after[n].astype(np.float64) - before[n]) ** 2)) for n in names)


def are_finite(arrays: Mapping[str, np.ndarray]) -> bool:
    """Say whether every value of all arrays is a finite number."""
    return all(np.isfinite(array).all() for array in arrays.values())
