"""Named arrays as one flat vector, in an order that is the same on every participant."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """The names and shapes of arrays, in the order of their values in a flat float32 vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Layout":
        """Return the layout of arrays, sorted by name."""
        names = tuple(sorted(arrays))
        return cls(names, tuple(tuple(arrays[n].shape) for n in names))

    @property
    def size(self) -> int:
        """Return the number of values of all arrays."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of values of each array."""
        return tuple(math.prod(s) for s in self.shapes)

    def without(self, names: Iterable[str]) -> "Layout":
        """Return the layout without the arrays of the given names."""
        excluded = set(names)
        remaining = [(n, s) for n, s in zip(self.names, self.shapes) if n not in excluded]
        return Layout(tuple(n for n, _ in remaining), tuple(s for _, s in remaining))

    def flatten(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the arrays' values as one vector: [size] float32."""
        flat = [np.asarray(arrays[n], dtype=np.float32).reshape(-1) for n in self.names]
        return np.concatenate(flat) if flat else np.zeros(0, dtype=np.float32)

    def unflatten(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Return views into a vector of [size] values, by name."""
        arrays = {}
        offset = 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes):
            arrays[name] = vector[offset : offset + size].reshape(shape)
            offset += size
        return arrays
