"""The first messages of an attempt: fresh public keys with commitments, and the sealed shares. Pure.

    announcement    onion key, mask key, commitment to a contribution to the beacon, commitment to the secret
                    of the self mask; signed with the identity key under b"announce" and the context of
                    the parameters
    reveal          the contribution; a share of that secret, sealed to one member with a key from the mask
                    keys of both under b"share", the context of the parameters, giver and holder

The commitments make everybody choose its contribution before it can know the others', so nobody can steer the
paths, and let everybody check later that a revealed or reconstructed secret is the right one.
"""

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous.crypto import (
    KEY,
    SIGNATURE,
    check_signature,
    derive_key,
    digest,
    shared_secret,
)

ANNOUNCEMENT = 4 * KEY + SIGNATURE  # bytes


@dataclass(frozen=True)
class Announcement:
    """The public values of one member in one attempt, 32 bytes each."""

    onion_key: bytes
    mask_key: bytes
    contribution_commitment: bytes
    secret_commitment: bytes

    def sign(self, identity: Ed25519PrivateKey, context: bytes) -> bytes:
        """Return the announcement as a signed message."""
        body = self.onion_key + self.mask_key + self.contribution_commitment + self.secret_commitment
        return body + identity.sign(digest(b"announce", context, body))

    @classmethod
    def verified(cls, message: bytes, identity: bytes, context: bytes) -> "Announcement":
        """Read a signed announcement of the member with this public identity key.

        Raises:
            AuthenticationError: the signature is not the member's for this context.
        """
        body = message[:-SIGNATURE]
        check_signature(identity, message[-SIGNATURE:], digest(b"announce", context, body))
        return cls(*(body[start : start + KEY] for start in range(0, 4 * KEY, KEY)))


def commit_to_contribution(contribution: bytes) -> bytes:
    """Return the commitment to a contribution to the beacon (32 random bytes, so the digest hides them)."""
    return digest(b"nonce", contribution)


def commit_to_secret(secret: bytes) -> bytes:
    """Return the commitment to the secret of a self mask."""
    return digest(b"own", secret)


def share_key(private: X25519PrivateKey, peer: bytes, context: bytes, *, giver: int, holder: int) -> bytes:
    """Return the key that seals the share which `giver` entrusts to `holder`.

    Args:
        private: the mask key of one of the two. peer: the public mask key of the other one.
    """
    numbers = (giver.to_bytes(4, "big"), holder.to_bytes(4, "big"))
    return derive_key(shared_secret(private, peer), b"share", context, *numbers)
