"""Masks that hide a member's words and vanish in the sum: one for each pair of members, added by one and
subtracted by the other, and one of each member alone, which is told only when the set of updates is settled
(Bonawitz et al., 2017).
"""

from collections.abc import Collection, Mapping, Sequence
from copy import copy

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous.crypto import BLOCK, agree, derive_key

_SCALAR = 2**64


class Masks:
    """One member's masks of one attempt.

    Args:
        me: this member. private: its mask key of this attempt; keys: everyone's.
        own: the secret of its own mask.
    """

    def __init__(
        self, cipher, context: bytes, me: int, private: X25519PrivateKey, keys: Sequence[bytes], *, own: bytes
    ):
        self._cipher = cipher
        self._me = me
        self.pairs: dict[int, bytes] = {}
        for other, key in enumerate(keys):
            if other != me:
                low, high = sorted((me, other))
                self.pairs[other] = derive_key(
                    agree(private, key), b"mask", context, low.to_bytes(4, "big"), high.to_bytes(4, "big")
                )
        self._own = own

    def only_with(self, others: Collection[int]) -> "Masks":
        """As much of these masks as `others` know together when the secret of the own one is told."""
        known = copy(self)
        known.pairs = {other: seed for other, seed in self.pairs.items() if other in others}
        return known

    def apply(self, chunk: int, words: np.ndarray) -> None:
        """Mask [n] uint32 in place."""
        for other, seed in self.pairs.items():
            add_stream(self._cipher, seed, chunk, words, 1 if other > self._me else -1)
        add_stream(self._cipher, own_seed(self._own), chunk, words, 1)

    def scalar(self, value: int) -> int:
        """Mask one number modulo 2^64."""
        for other, seed in self.pairs.items():
            value += scalar_of(seed) if other > self._me else -scalar_of(seed)
        return (value + scalar_of(own_seed(self._own))) % _SCALAR


def add_stream(cipher, seed: bytes, chunk: int, words: np.ndarray, sign: int) -> None:
    """Add or subtract a key stream, modulo 2^32."""
    operate = np.add if sign > 0 else np.subtract
    for i, block in enumerate(cipher.blocks(seed, chunk, len(words))):
        piece = words[i * BLOCK : i * BLOCK + len(block)]
        operate(piece, block, out=piece)


def remove_own(cipher, secrets: Mapping[int, bytes], chunk: int, words: np.ndarray) -> None:
    """Take all members' own masks out of a sum [n] uint32; those of pairs have cancelled."""
    for secret in secrets.values():
        add_stream(cipher, own_seed(secret), chunk, words, -1)


def remove_own_scalars(secrets: Mapping[int, bytes], value: int) -> int:
    return (value - sum(scalar_of(own_seed(secret)) for secret in secrets.values())) % _SCALAR


def own_seed(secret: bytes) -> bytes:
    return derive_key(secret, b"own mask")


def scalar_of(seed: bytes) -> int:
    return int.from_bytes(derive_key(seed, b"scalar", length=8), "big")
