"""The first message of an attempt: public keys, commitments, and what the member is about to sum. Pure.

    onion key, mask key     fresh in each attempt
    commitments             to a contribution to the beacon, to a contribution to the key of the final
                            comparison, and to the secret of the self mask
    subject                 digest of what is summed, equal on all members
    mark                    whether this member has settled the sum before (`settlement`)

The commitments make everybody choose its contributions before it can know the others', so nobody can steer
the paths or know the key of the comparison in time, and let everybody check later that a revealed secret is
the right one. All members sign a digest of all announcements (`echo`) before they send anything else: whoever
has announced itself differently to different members is found before a cell is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from fedspeed.routing.anonymous.crypto import KEY, SIGNATURE, digest


@dataclass(frozen=True)
class Announcement:
    """The public values of one member in one attempt, 32 bytes each."""

    onion_key: bytes
    mask_key: bytes
    beacon_commitment: bytes
    comparison_commitment: bytes
    secret_commitment: bytes
    subject: bytes
    mark: bytes

    def pack(self) -> bytes:
        """Return the announcement as bytes."""
        return b"".join(getattr(self, field.name) for field in fields(self))

    @classmethod
    def unpack(cls, body: bytes) -> "Announcement":
        """Read an announcement of the right number of bytes."""
        return cls(*(body[start : start + KEY] for start in range(0, len(body), KEY)))

    @property
    def content(self) -> bytes:
        """The digest that the member signs."""
        return digest(self.pack())


BODY = len(fields(Announcement)) * KEY
ANNOUNCEMENT = BODY + SIGNATURE  # bytes


def echo(announced: Sequence[Announcement]) -> bytes:
    """Return the digest of the announcements of all members, in their order."""
    return digest(b"echo", *(announcement.pack() for announcement in announced))


def commit_to_contribution(contribution: bytes) -> bytes:
    """Return the commitment to a contribution (32 random bytes, so the digest hides them)."""
    return digest(b"nonce", contribution)


def commit_to_secret(secret: bytes) -> bytes:
    """Return the commitment to the secret of a self mask."""
    return digest(b"own", secret)
