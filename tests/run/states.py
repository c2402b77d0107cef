"""Claims and certificates of states, made up for tests."""

import numpy as np

from fedspeed.federation.packed_tensors import tensors_digest
from fedspeed.routing.anonymous.crypto import public_bytes
from fedspeed.routing.state_certificate import StateCertificate, statement_of
from fedspeed.routing.state_claim import StateClaim

SETTINGS = b"s" * 32
RUN = b"r" * 32


def tensors(round: int, value: float = 0.5) -> dict:
    """Return the tensors of a journal's entry."""
    return {"global/w": np.full(3, round + value, np.float32), "server/m/w": np.ones((1, 2), np.float32)}


def claim(round: int, value: float = 0.5, run: bytes = RUN, **more) -> StateClaim:
    """Return the claim of `tensors`."""
    return StateClaim(run=run, round=round, state=tensors_digest(tensors(round, value)), **more)


def signed(keys, of: StateClaim, settings: bytes = SETTINGS) -> StateCertificate:
    """Return a certificate that all owners of the keys have signed."""
    members = tuple(map(public_bytes, keys))
    statement = statement_of(settings, members, of)
    return StateCertificate(
        settings=settings, claim=of, members=members, signatures=tuple(key.sign(statement) for key in keys)
    )
