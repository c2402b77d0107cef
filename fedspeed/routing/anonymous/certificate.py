"""The certificate that commits an attempt to one set of updates. Pure.

It is the signature of every member over the attempt's context and the digest of all owners' lists. A member
signs only if each of its cells is listed exactly once and nothing else is wrong. Before there is a
certificate nobody reveals anything that unmasks, and after that the set can no longer change: so at most one
set of updates is ever unmasked in an attempt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedspeed.routing.anonymous.crypto import SIGNATURE, AuthenticationError, check_signature
from fedspeed.routing.anonymous.statements import statement

UNSIGNED = bytes(SIGNATURE)  # in place of the signature of a member that does not confirm


@dataclass(frozen=True)
class Certificate:
    """The signatures of all members, in the order of the members."""

    signatures: tuple[bytes, ...]

    def invalid_members(self, members: Sequence[bytes], context: bytes, lists: bytes) -> list[int]:
        """Return the numbers of members whose signature is not valid.

        Args:
            members: identity keys. context: of the attempt. lists: digest of all owners' lists.
        """
        invalid = []
        signed = statement("confirm", context, lists)
        for i, signature in enumerate(self.signatures):
            try:
                check_signature(members[i], signature, signed)
            except AuthenticationError:
                invalid.append(i)
        return invalid

    def pack(self) -> bytes:
        """Return the certificate as bytes, a signature for each member."""
        return b"".join(self.signatures)

    @classmethod
    def unpack(cls, text: bytes) -> "Certificate":
        """Read a packed certificate; its signatures are not checked yet."""
        return cls(tuple(text[start : start + SIGNATURE] for start in range(0, len(text), SIGNATURE)))
