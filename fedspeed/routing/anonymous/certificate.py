"""The certificate that commits an attempt to one set of updates. Pure.

It is the signature of every member over the attempt's context, the digest of all owners' lists, and the
member's masked checksum. A member signs only if each of its cells is listed exactly once and no member
complains. Before there is a certificate nobody reveals anything that unmasks, and after that the set can no
longer change: so at most one set of updates is ever unmasked in an attempt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedspeed.routing.anonymous.crypto import SIGNATURE, AuthenticationError, check_signature, digest

SCALAR = 8  # bytes of a masked checksum
RECORD = SIGNATURE + SCALAR  # bytes of a packed certificate for each member


def confirmation(context: bytes, lists: bytes, scalar: int) -> bytes:
    """Return what a member signs to confirm the lists.

    Args:
        lists: digest of all owners' lists. scalar: the member's masked checksum.
    """
    return digest(b"confirm", context, lists, scalar.to_bytes(SCALAR, "big"))


@dataclass(frozen=True)
class Certificate:
    """The signatures of all members and their masked checksums, in the order of the members."""

    signatures: tuple[bytes, ...]
    scalars: tuple[int, ...]

    def invalid_members(self, members: Sequence[bytes], context: bytes, lists: bytes) -> list[int]:
        """Return the numbers of members whose signature is not valid.

        Args:
            members: identity keys. context, lists: as of `confirmation`.
        """
        invalid = []
        for i, (signature, scalar) in enumerate(zip(self.signatures, self.scalars, strict=True)):
            try:
                check_signature(members[i], signature, confirmation(context, lists, scalar))
            except AuthenticationError:
                invalid.append(i)
        return invalid

    def pack(self) -> bytes:
        """Return the certificate as bytes, RECORD for each member."""
        records = zip(self.signatures, self.scalars, strict=True)
        return b"".join(signature + scalar.to_bytes(SCALAR, "big") for signature, scalar in records)

    @classmethod
    def unpack(cls, text: bytes) -> "Certificate":
        """Read a packed certificate; its signatures are not checked yet."""
        records = [text[start : start + RECORD] for start in range(0, len(text), RECORD)]
        return cls(
            tuple(record[:SIGNATURE] for record in records),
            tuple(int.from_bytes(record[SIGNATURE:], "big") for record in records),
        )
