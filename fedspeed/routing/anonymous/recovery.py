"""Decide who is lost, and who is at fault, where members differ about it. Pure.

The members that are left exchange a `RecoveryMessage` each, until all name the same lost members.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedspeed.routing.anonymous.certificate import RECORD, Certificate

MEMBER_SET = 32  # bytes of a packed set of members: a bit for each number below 256


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
        lost: members that it takes for lost.
        accused: members that it has seen misbehave.
        certificate: the certificate, if it has a complete one.
    """

    lost: frozenset[int]
    accused: frozenset[int]
    certificate: Certificate | None

    def pack(self, n: int) -> bytes:
        """Return the message as bytes; their number depends on the number of members n only."""
        certificate = self.certificate.pack() if self.certificate else bytes(RECORD * n)
        return pack_members(self.lost) + pack_members(self.accused) + certificate

    @classmethod
    def unpack(cls, text: bytes, n: int) -> "RecoveryMessage":
        """Read a packed message; the signatures of its certificate are not checked yet."""
        certificate = text[2 * MEMBER_SET :]
        return cls(
            lost=unpack_members(text[:MEMBER_SET], n),
            accused=unpack_members(text[MEMBER_SET : 2 * MEMBER_SET], n),
            certificate=Certificate.unpack(certificate) if any(certificate[:RECORD]) else None,
        )


def members_to_exclude(claims: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """Return who counts as lost where members differ about it.

    A member is lost if more than half of the others cannot hear it. If fewer say so, it is excluded together
    with those who say so, since nobody can tell which of them is at fault. So colluders can exclude no more
    honest members than they lose of their own, unless they are more than half.

    Args:
        claims: whom each member that answers takes for lost.
    """
    lost: set[int] = set()
    for j in sorted(set().union(*claims.values())):
        accusers = {i for i, claim in claims.items() if j in claim and i != j}
        others = claims.keys() - {j}
        lost |= {j} if 2 * len(accusers) > len(others) else {j, *accusers}
    return frozenset(lost)


def groups_at_fault(accusations: Mapping[int, frozenset[int]]) -> list[frozenset[int]]:
    """Return sets of members with at least one at fault in each.

    A member that all others accuse, if these are more than one, is at fault alone; else accuser and accused
    are one set.

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
