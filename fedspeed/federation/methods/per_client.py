"""A summed vector with separate values for each client, for methods that need more than the sum of all
states. The sum therefore hides no client's update.
"""

from collections.abc import Iterable

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout


class PerClient:
    """The layout of a vector in which every client has a slot: its weight, then its state.

    Attributes:
        values: length of the vector.
    """

    def __init__(self, layout: Layout, clients: int):
        self._layout = layout
        self._clients = clients
        self.values = clients * (layout.size + 1)

    def fill(self, client: int, state: Arrays, weight: float) -> np.ndarray:
        """Return a vector [values] float32 that is zero outside the client's slot."""
        slots = np.zeros((self._clients, self._layout.size + 1), dtype=np.float32)
        slots[client, 0] = weight
        slots[client, 1:] = self._layout.flatten(state)
        return slots.reshape(-1)

    def means(self, total: np.ndarray, names: Iterable[str]) -> Arrays:
        """Return the weighted means of the arrays of some names over the clients' states, float32."""
        shares, states = self.read(total)
        return {
            name: np.asarray(
                sum(share * state[name].astype(np.float64) for share, state in zip(shares, states)),
                np.float32,
            )
            for name in names
        }

    def read(self, total: np.ndarray) -> tuple[list[float], list[Arrays]]:
        """Return (shares of the total weight, states) of the clients whose slot is filled, in order."""
        slots = total.reshape(self._clients, -1)
        present = [(float(s[0]), self._layout.unflatten(s[1:])) for s in slots if s[0] > 0]
        shares = [w / sum(w for w, _ in present) for w, _ in present]
        return shares, [state for _, state in present]
