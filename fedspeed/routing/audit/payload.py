"""Encode updates as members of an anonymous sum do, for the sums that an audit plays."""

import secrets

import numpy as np

from fedspeed.routing.anonymous import ring
from fedspeed.routing.anonymous.crypto import KEY, AesGcm, fill_key_stream


def encoded(values: np.ndarray, bound: float) -> np.ndarray:
    """Return values [n] float32 as fixed-point integers [n] uint32, rounded at random.

    Args:
        bound: the magnitude that becomes 2^30.
    """
    key = secrets.token_bytes(KEY)
    number = iter(range(2**32))
    out = np.empty(len(values), np.uint32)
    ring.encode(values, bound, lambda bits: fill_key_stream(AesGcm, key, next(number), bits), out)
    return out
