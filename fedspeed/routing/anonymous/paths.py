"""Which way a chunk goes: a cascade of relays and an owner, drawn anew for each chunk and round from public
randomness. Pure.

All participants send a chunk's cells through the same relays, so that they mix with each other; who sends how
much to whom follows from the beacon alone, whatever anyone has to say.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedspeed.routing.anonymous.crypto import digest


@dataclass(frozen=True)
class Plan:
    """Routes of one attempt. Members are numbered 0 to n-1.

    Attributes:
        stations: [chunks][hops + 1] members that a chunk's cells visit: relays, then the owner.
        chunk_words: ring elements of one chunk; the last chunks are filled up with zeros.
    """

    members: int
    stations: tuple[tuple[int, ...], ...]
    chunk_words: int

    @property
    def chunks(self) -> int:
        return len(self.stations)

    @property
    def hops(self) -> int:
        """Relays of a cascade."""
        return len(self.stations[0]) - 1

    def at(self, level: int, member: int) -> tuple[int, ...]:
        """Chunks whose cells are at a member after `level + 1` hops, in order."""
        return self._at[level].get(member, ())

    @cached_property
    def _at(self) -> list[dict[int, tuple[int, ...]]]:
        out: list[dict[int, list[int]]] = [{} for _ in range(self.hops + 1)]
        for chunk, route in enumerate(self.stations):
            for level, member in enumerate(route):
                out[level].setdefault(member, []).append(chunk)
        return [{member: tuple(chunks) for member, chunks in level.items()} for level in out]

    def between(self, level: int, sender: int, receiver: int) -> tuple[int, ...]:
        """Chunks of which `sender` gives cells to `receiver` in hop `level`: at level 0 a source its own,
        then a relay all members'.
        """
        at = self.at(level, receiver)
        return at if level == 0 else tuple(c for c in at if self.stations[c][level - 1] == sender)

    def owned(self, member: int) -> tuple[int, ...]:
        return self.at(self.hops, member)

    def owner(self, chunk: int) -> int:
        return self.stations[chunk][-1]


def backup_of(owner: int, members: int) -> int:
    """Who keeps an owner's sums too, until all have them."""
    return (owner + 1) % members


def chunks_for(words: int, members: int, most_words: int) -> tuple[int, int]:
    """(number of chunks, words of each): a multiple of the members, so that all carry equally much."""
    count = members * -(-words // (members * most_words))
    return count, -(-words // count)


def draw(beacon: bytes, members: int, words: int, hops: int, most_words: int) -> Plan:
    """Routes for a vector of `words` ring elements.

    Chunks come in groups of one for each member. A group has a random order of members, and each level
    another random distance along it: so every member serves one chunk of a group at each level, the stations
    of a route differ, and each route is a uniformly random one.

    Args:
        beacon: public randomness, known to nobody before all have committed to their part of it.
        hops: relays of a cascade; at most members - 1.
    """
    assert 0 <= hops < members or (hops, members) == (0, 1), (
        f"{hops} relays and an owner among {members} members"
    )
    chunks, chunk_words = chunks_for(words, members, most_words)
    random = np.random.Generator(np.random.PCG64(int.from_bytes(digest(b"paths", beacon), "big")))
    stations: list[tuple[int, ...]] = []
    for _ in range(chunks // members):
        order = random.permutation(members)
        distances = random.permutation(members)[: hops + 1]
        stations += [
            tuple(int(order[(place + distance) % members]) for distance in distances)
            for place in range(members)
        ]
    return Plan(members, tuple(stations[i] for i in random.permutation(chunks)), chunk_words)
