"""Named arrays, as the federation computes with them."""

from collections.abc import Mapping

import numpy as np

Arrays = dict[str, np.ndarray]


def square_norm(arrays: Mapping[str, np.ndarray]) -> float:
    """Return the sum of the squares of all values, in float64."""
    return sum(float(np.sum(array.astype(np.float64) ** 2)) for array in arrays.values())


def are_finite(arrays: Mapping[str, np.ndarray]) -> bool:
    """Say whether every value of all arrays is a finite number."""
    return all(np.isfinite(array).all() for array in arrays.values())
