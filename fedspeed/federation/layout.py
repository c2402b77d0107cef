"""Named tensors as one flat vector, in an order every participant agrees on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in the flat float32 vector of the trainable state."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> "Layout":
        """Return the layout of some tensors, in the order of their names."""
        names = tuple(sorted(tensors))
        return cls(names, tuple(tuple(tensors[n].shape) for n in names))

    @property
    def size(self) -> int:
        """Values of all tensors together."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each tensor."""
        return tuple(int(np.prod(s)) for s in self.shapes)

    def without(self, names: Iterable[str]) -> "Layout":
        """Return the layout without some of its tensors."""
        gone = set(names)
        kept = [(n, s) for n, s in zip(self.names, self.shapes) if n not in gone]
        return Layout(tuple(n for n, _ in kept), tuple(s for _, s in kept))

    def flatten(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the tensors as one vector: [size] float32."""
        parts = [np.asarray(tensors[n], dtype=np.float32).reshape(-1) for n in self.names]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)

    def unflatten(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Return views into a vector [size], by name."""
        out = {}
        at = 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes):
            out[name] = vector[at : at + size].reshape(shape)
            at += size
        return out
