"""The interface of signatures of a server's results, as the rounds use it (routing.signed_broadcast)."""

from typing import Protocol

import numpy as np


class ServerWitness(Protocol):
    """Signs the results of the method's server, and verifies them."""

    def sign(self, name: str, vector: np.ndarray, /) -> np.ndarray:
        """Return this participant's signature of a vector and its name, [64] uint8."""
        ...

    def problem(self, name: str, received: np.ndarray, signature: np.ndarray, /) -> str:
        """Return what is wrong with what the participants have received; empty if nothing is. Collective."""
        ...
