"""A summed vector with separate values for each client, for methods that need more than the sum of all
states. The sum therefore hides no client's update.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.models.lora_ranks import shape_of_rank


class PerClient:
    """The layout of a vector in which every client has a slot: its weight, then its state.

    Attributes:
        values: length of the vector.
    """

    def __init__(self, layout: Layout, clients: int, lora_ranks: Sequence[int] = ()):
        """Lay out the vector.

        Args:
            layout: of the common state. clients: their number.
            lora_ranks: by client, the rank of the factors that it sends; empty: that of the layout.
        """
        ranked = [_with_rank(layout, lora_rank) for lora_rank in lora_ranks]
        self._layouts = ranked or [layout] * clients
        ends = np.cumsum([0, *(layout.size + 1 for layout in self._layouts)]).tolist()
        self._slots = [slice(*bounds) for bounds in pairwise(ends)]
        self.values: int = ends[-1]

    def fill(self, client: int, state: Arrays, weight: float) -> np.ndarray:
        """Return a vector [values] float32 that is zero outside the client's slot."""
        vector = np.zeros(self.values, dtype=np.float32)
        slot = vector[self._slots[client]]
        slot[0] = weight
        slot[1:] = self._layouts[client].flatten(state)
        return vector

    def means(self, total: np.ndarray, names: Iterable[str]) -> Arrays:
        """Return the weighted means of the arrays of some names over the clients' states, float32; these
        arrays have the same shape for all clients.
        """
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
        slots = [(total[slot], layout) for slot, layout in zip(self._slots, self._layouts)]
        present = [(float(s[0]), layout.unflatten(s[1:])) for s, layout in slots if s[0] > 0]
        shares = [w / sum(w for w, _ in present) for w, _ in present]
        return shares, [state for _, state in present]


def _with_rank(layout: Layout, lora_rank: int) -> Layout:
    """Return the layout of a state whose LoRA factors have another rank."""
    named = zip(layout.names, layout.shapes)
    return replace(layout, shapes=tuple(shape_of_rank(name, shape, lora_rank) for name, shape in named))
