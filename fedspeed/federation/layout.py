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
        names = tuple(sorted(tensors))
        return cls(names, tuple(tuple(tensors[n].shape) for n in names))

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Values of each tensor."""
        return tuple(int(np.prod(s)) for s in self.shapes)

    def without(self, names: Iterable[str]) -> "Layout":
        gone = set(names)
        kept = [(n, s) for n, s in zip(self.names, self.shapes) if n not in gone]
        return Layout(tuple(n for n, _ in kept), tuple(s for _, s in kept))

    def flatten(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        parts = [np.asarray(tensors[n], dtype=np.float32).reshape(-1) for n in self.names]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)

    def unflatten(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Views into `vector`, by name."""
        out, at = {}, 0
        for name, shape in zip(self.names, self.shapes):
            n = int(np.prod(shape))
            out[name] = vector[at:at + n].reshape(shape)
            at += n
        return out
