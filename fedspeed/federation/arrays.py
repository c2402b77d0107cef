"""Named arrays, and the sums over their values that the federation computes."""

from collections.abc import Iterable, Mapping

import numpy as np

Arrays = dict[str, np.ndarray]  # by name


def square_norm(arrays: Mapping[str, np.ndarray]) -> float:
    """Return the sum of the squares of all values of all arrays, in float64."""
    return sum(float(np.sum(array.astype(np.float64) ** 2)) for array in arrays.values())


def square_distance(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], names: Iterable[str]
) -> float:
    """Return the squared Euclidean distance of two states over some of their arrays, in float64."""
    return sum(float(np.sum((after[n].astype(np.float64) - before[n]) ** 2)) for n in names)


def are_finite(arrays: Mapping[str, np.ndarray]) -> bool:
    """Return whether every value of all arrays is finite."""
    return all(np.isfinite(array).all() for array in arrays.values())
