"""Who is lost, and who is at fault, where members differ about it. Pure."""

from collections.abc import Mapping

from fedspeed.routing.anonymous.parameters import HASH


def pack_members(numbers: frozenset[int]) -> bytes:
    """Numbers below 256 as a bit each."""
    return sum(1 << i for i in numbers).to_bytes(HASH, "big")


def unpack_members(text: bytes, n: int) -> frozenset[int]:
    bits = int.from_bytes(text, "big")
    return frozenset(i for i in range(n) if bits >> i & 1)


def outvoted(claims: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """Who is lost where members differ: one whom more than half of the others cannot hear; else both it and
    those who say so, for nobody can tell which of them is at fault. So colluders have no more of the others
    left out than of themselves, unless they are more than half.

    Args:
        claims: by member that speaks, whom it takes for lost.
    """
    lost: set[int] = set()
    for j in sorted(set().union(*claims.values())):
        believers = {i for i, claim in claims.items() if j in claim and i != j}
        others = claims.keys() - {j}
        lost |= {j} if 2 * len(believers) > len(others) else {j, *believers}
    return frozenset(lost)


def suspicions(accused: dict[int, set[int]], present: int) -> list[frozenset[int]]:
    """Who has one at fault in it: a member that all others accuse, and not just one other, alone; else
    accuser and accused.

    Args:
        accused: by member, who accuses it. present: members that are left.
    """
    alone = {j for j, accusers in accused.items() if len(accusers - {j}) == present - 1 > 1}
    pairs = {frozenset({i, j}) for j, accusers in accused.items() for i in accusers if not {i, j} & alone}
    return [*(frozenset({j}) for j in sorted(alone)), *sorted(pairs, key=sorted)]
