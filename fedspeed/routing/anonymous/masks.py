"""Additive masks that hide a member's integers and cancel in the sum (Bonawitz et al., 2017).

Each member adds two kinds of masks to its integers, modulo 2^32:

    pairwise mask   one for each other member, from a secret that only the two share (X25519, then HKDF under
                    b"mask", the attempt's context and both numbers). The member with the lower number adds
                    it, the other one subtracts it, so that it cancels in the sum of both.
    self mask       one from a secret of its own. It is revealed only once the set of summed updates is
                    committed. Until then, even somebody who knows all pairwise masks of a member learns
                    nothing from its masked integers.
"""

from collections.abc import Collection, Mapping, Sequence
from copy import copy

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous.crypto import Cipher, Combine, combine_key_streams, derive_key, shared_secret


class Masks:
    """The masks of one member in one attempt.

    Args:
        context: the attempt's context, beacon included, which every pairwise key is bound to.
        me: this member's number. private: its X25519 mask key, fresh in this attempt.
        keys: the public mask keys of all members, 32 bytes each.
        self_secret: the secret of its self mask, 32 bytes.
    """

    def __init__(
        self,
        cipher: type[Cipher],
        context: bytes,
        me: int,
        private: X25519PrivateKey,
        keys: Sequence[bytes],
        *,
        self_secret: bytes,
    ):
        self._cipher = cipher
        self._me = me
        self.pairwise_keys: dict[int, bytes] = {}
        for other, key in enumerate(keys):
            if other != me:
                low, high = sorted((me, other))
                numbers = (low.to_bytes(4, "big"), high.to_bytes(4, "big"))
                self.pairwise_keys[other] = derive_key(
                    shared_secret(private, key), b"mask", context, *numbers
                )
        self._self_secret = self_secret

    def known_to(self, coalition: Collection[int]) -> "Masks":
        """Return the masks without those shared with members outside a coalition: what the coalition knows of
        these masks once the self mask is revealed.
        """
        known = copy(self)
        known.pairwise_keys = {i: key for i, key in self.pairwise_keys.items() if i in coalition}
        return known

    def apply(self, chunk: int, integers: np.ndarray) -> None:
        """Add all masks of a chunk to `integers` [n] uint32, in place."""
        streams: list[tuple[bytes, Combine]] = [
            (key, np.add if other > self._me else np.subtract) for other, key in self.pairwise_keys.items()
        ]
        streams.append((self_mask_key(self._self_secret), np.add))
        combine_key_streams(self._cipher, chunk, integers, streams)


def remove_self_masks(
    cipher: type[Cipher], secrets: Mapping[int, bytes], chunk: int, integers: np.ndarray
) -> None:
    """Subtract the self masks of all members from a sum [n] uint32, in place; its pairwise masks have
    cancelled.

    Args:
        secrets: of the self masks, by member.
    """
    streams = [(self_mask_key(secret), np.subtract) for secret in secrets.values()]
    combine_key_streams(cipher, chunk, integers, streams)


def restore_self_masks(
    cipher: type[Cipher], secrets: Mapping[int, bytes], chunk: int, integers: np.ndarray
) -> None:
    """Add the self masks of all members to a sum [n] uint32, in place: the inverse of `remove_self_masks`."""
    streams = [(self_mask_key(secret), np.add) for secret in secrets.values()]
    combine_key_streams(cipher, chunk, integers, streams)


def self_mask_key(secret: bytes) -> bytes:
    """Return the key of a self mask from its secret."""
    return derive_key(secret, b"own mask")
