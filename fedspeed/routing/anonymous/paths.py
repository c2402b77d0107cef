"""Draw the path of every chunk: a cascade of relays, then the owner. Pure.

Paths are drawn anew for each chunk and attempt from the beacon, public randomness that all members contribute
to. All members send their cells of a chunk through the same cascade, so that these cells mix with each other.
Who sends how many bytes to whom follows from the beacon alone, whatever anybody's data are.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedspeed.routing.anonymous.crypto import digest


@dataclass(frozen=True)
class PathPlan:
    """The paths of one attempt. Members are numbered from 0 to members - 1.

    Attributes:
        paths: [chunks][relays + 1] members that the cells of a chunk visit: its relays, then its owner.
        chunk_length: 32-bit integers of one chunk; the end of the last chunk is padded with zeros.
    """

    members: int
    paths: tuple[tuple[int, ...], ...]
    chunk_length: int

    @property
    def chunks(self) -> int:
        """How many chunks a vector is cut into."""
        return len(self.paths)

    @property
    def relays(self) -> int:
        """How many relays a path has."""
        return len(self.paths[0]) - 1

    def chunks_at(self, hop: int, member: int) -> tuple[int, ...]:
        """Return the chunks whose cells arrive at a member in a hop (0: from their sources), in order."""
        return self._chunks_at[hop].get(member, ())

    @cached_property
    def _chunks_at(self) -> list[dict[int, tuple[int, ...]]]:
        lists: list[dict[int, list[int]]] = [{} for _ in range(self.relays + 1)]
        for chunk, path in enumerate(self.paths):
            for hop, member in enumerate(path):
                lists[hop].setdefault(member, []).append(chunk)
        return [{member: tuple(chunks) for member, chunks in by_member.items()} for by_member in lists]

    def chunks_between(self, hop: int, sender: int, receiver: int) -> tuple[int, ...]:
        """Return the chunks of which `sender` sends cells to `receiver` in a hop: in hop 0 its own cell of
        each, in later hops, as a relay, the cells of all members.
        """
        chunks = self.chunks_at(hop, receiver)
        return chunks if hop == 0 else tuple(c for c in chunks if self.paths[c][hop - 1] == sender)

    def owned(self, member: int) -> tuple[int, ...]:
        """Return the chunks that a member owns: it sums them."""
        return self.chunks_at(self.relays, member)

    def owner(self, chunk: int) -> int:
        """Return the member that sums a chunk."""
        return self.paths[chunk][-1]


def backup_of(owner: int, members: int) -> int:
    """Return the member that stores a copy of an owner's sums, in case the owner is lost."""
    return (owner + 1) % members


def chunk_layout(length: int, members: int, max_chunk_length: int) -> tuple[int, int]:
    """Return (chunks, integers of each) for a vector of `length` integers.

    The number of chunks is a multiple of the members, so that all members carry the same load.
    """
    chunks = members * -(-length // (members * max_chunk_length))
    return chunks, -(-length // chunks)


def draw_paths(beacon: bytes, members: int, length: int, relays: int, max_chunk_length: int) -> PathPlan:
    """Draw the paths for a vector of `length` integers.

    Chunks come in groups of one for each member. A group has a random order of the members, and each hop
    another random distance along it. So every member serves one chunk of a group in each hop, the members of
    a path differ, and each path by itself is uniformly random.

    Args:
        beacon: public randomness that nobody knows before all have committed to their contribution.
        relays: of a path; at most members - 1.
    """
    assert 0 <= relays < members or (relays, members) == (0, 1), (
        f"{relays} relays and an owner among {members} members"
    )
    chunks, chunk_length = chunk_layout(length, members, max_chunk_length)
    random = np.random.Generator(np.random.PCG64(int.from_bytes(digest(b"paths", beacon), "big")))
    paths: list[tuple[int, ...]] = []
    for _ in range(chunks // members):
        order = random.permutation(members)
        distances = random.permutation(members)[: relays + 1]
        paths += [
            tuple(int(order[(start + distance) % members]) for distance in distances)
            for start in range(members)
        ]
    return PathPlan(members, tuple(paths[i] for i in random.permutation(chunks)), chunk_length)
