"""The interfaces of signatures, as the rounds use them: of a server's results (routing.signed_broadcast), and
of a run's state between organisations (session.site_agreement).
"""

from typing import Protocol

import numpy as np

from fedspeed.routing.state_claim import StateClaim


class ServerWitness(Protocol):
    """Signs the results of the method's server, and verifies them."""

    def sign(self, name: str, vector: np.ndarray, /) -> np.ndarray:
        """Return this participant's signature of a vector and its name, [64] uint8."""
        ...

    def problem(self, name: str, received: np.ndarray, signature: np.ndarray, /) -> str:
        """Return what is wrong with what the participants have received; empty if nothing is. Collective."""
        ...


class StateCertifier(Protocol):
    """Collects the signatures of all sites for a state of the run.

    Attributes:
        run: digest of the session in which the run began; part of every claim.
    """

    run: bytes

    def certify(self, claim: StateClaim, /) -> bytes:
        """Return the certificate of a state, packed. Collective over the sites."""
        ...
