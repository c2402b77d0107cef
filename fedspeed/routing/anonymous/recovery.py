"""Decide who is lost, and who is at fault, where an attempt cannot go on as it began. Pure.

The members that are left exchange a `RecoveryMessage` each, until all name the same lost members.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedspeed.routing.anonymous.certificate import Certificate
from fedspeed.routing.anonymous.crypto import SIGNATURE
from fedspeed.routing.anonymous.statements import packed_size

MEMBER_SET = 32  # bytes of a packed set of members: a bit for each number below 256
NO_CHUNK = 2**32 - 1  # no complaint
NO_LISTS = 2**32 - 2  # cannot complain: it has not received all lists
_NUMBER = 4  # bytes of a chunk's number


def pack_members(numbers: frozenset[int]) -> bytes:
    """Return a set of member numbers as MEMBER_SET bytes, a bit each."""
    return sum(1 << i for i in numbers).to_bytes(MEMBER_SET, "big")


def unpack_members(text: bytes, n: int) -> frozenset[int]:
    """Read a packed set of member numbers; those that are not below n are left out."""
    bits = int.from_bytes(text, "big")
    return frozenset(i for i in range(n) if bits >> i & 1)


@dataclass(frozen=True)
class RecoveryMessage:
    """What a member says when members were lost or the attempt cannot go on.

    Attributes:
        lost: members that it cannot hear.
        accused: members that it has seen misbehave.
        complaint: a chunk whose cells did not come through as they were sent; NO_CHUNK or NO_LISTS.
        certificate: the certificate, if it has a complete one.
        statements: all that it has received (`statements.Statements.pack`).
    """

    lost: frozenset[int]
    accused: frozenset[int]
    complaint: int
    certificate: Certificate | None
    statements: bytes

    def pack(self, n: int) -> bytes:
        """Return the message as bytes; their number depends on the number of members n only."""
        certificate = self.certificate.pack() if self.certificate else bytes(SIGNATURE * n)
        return b"".join((
            pack_members(self.lost),
            pack_members(self.accused),
            self.complaint.to_bytes(_NUMBER, "big"),
            certificate,
            self.statements,
        ))

    @classmethod
    def unpack(cls, text: bytes, n: int) -> "RecoveryMessage":
        """Read a packed message; no signature in it is checked yet."""
        start = 2 * MEMBER_SET + _NUMBER
        certificate = text[start : len(text) - packed_size(n)]
        return cls(
            lost=unpack_members(text[:MEMBER_SET], n),
            accused=unpack_members(text[MEMBER_SET : 2 * MEMBER_SET], n),
            complaint=int.from_bytes(text[2 * MEMBER_SET : start], "big"),
            certificate=Certificate.unpack(certificate) if any(certificate[:SIGNATURE]) else None,
            statements=text[len(text) - packed_size(n) :],
        )


def contradictions(claims: Mapping[int, frozenset[int]]) -> list[frozenset[int]]:
    """Return the pairs of a member that claims not to hear another, and this other one, where somebody else
    does hear it.

    One of the two is at fault, or the connection between them, and nobody else can tell which. The others
    must not go on without either: an honest member could be cut off from those that vouch for it.

    Args:
        claims: whom each member that answers takes for lost.
    """
    claimed_by_all = frozenset.intersection(*claims.values())
    pairs = {frozenset({i, j}) for i, claim in claims.items() for j in claim - claimed_by_all if i != j}
    return sorted(pairs, key=sorted)


def groups_at_fault(accusations: Mapping[int, frozenset[int]]) -> list[frozenset[int]]:
    """Return sets of members with at least one at fault in each.

    A member that all others accuse, if these are more than one, is at fault alone; else accuser and accused
    are one set. (Of any two honest members neither accuses the other, so that none is ever at fault alone.)

    Args:
        accusations: whom each member that is left accuses.
    """
    accusers: dict[int, set[int]] = {}
    for i, accused in accusations.items():
        for j in accused:
            accusers.setdefault(j, set()).add(i)
    others = len(accusations) - 1
    alone = {j for j, of_j in accusers.items() if len(of_j - {j}) == others > 1}
    pairs = {frozenset({i, j}) for j, of_j in accusers.items() for i in of_j if not {i, j} & alone}
    return [*(frozenset({j}) for j in sorted(alone)), *sorted(pairs, key=sorted)]
