"""A summed vector that keeps clients apart, for methods that need more than the sum of their states. It hides
nobody.
"""

from collections.abc import Iterable

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout


class PerClient:
    """A vector in which every client has a slot of its own: its weight, then its state."""

    def __init__(self, layout: Layout, clients: int):
        self._layout = layout
        self._clients = clients
        self.values = clients * (layout.size + 1)

    def fill(self, client: int, state: Arrays, weight: float) -> np.ndarray:
        """Return [values] float32 that is zero but for the client's slot."""
        slots = np.zeros((self._clients, self._layout.size + 1), dtype=np.float32)
        slots[client, 0] = weight
        slots[client, 1:] = self._layout.flatten(state)
        return slots.reshape(-1)

    def means(self, total: np.ndarray, names: Iterable[str]) -> Arrays:
        """Return the weighted means of some of the states' arrays, float32."""
        shares, states = self.read(total)
        sums = {
            name: sum(share * state[name].astype(np.float64) for share, state in zip(shares, states))
            for name in names
        }
        return {name: value.astype(np.float32) for name, value in sums.items()}

    def read(self, total: np.ndarray) -> tuple[list[float], list[Arrays]]:
        """Return (shares, which sum to 1, and states) of the clients whose slot is filled, in the order of
        their numbers.
        """
        slots = total.reshape(self._clients, -1)
        present = [(float(s[0]), self._layout.unflatten(s[1:])) for s in slots if s[0] > 0]
        shares = [w / sum(w for w, _ in present) for w, _ in present]
        return shares, [state for _, state in present]
