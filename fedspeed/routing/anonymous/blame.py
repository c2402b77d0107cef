"""Who has spoiled a chunk, from what everybody says of it afterwards. Pure.

Sources give the keys of their cells of this chunk, so that anyone can compute what each station had to get
and to pass on; stations say what they got and what they passed on. Where a station's own words convict it, it
is named alone. Where sender and receiver contradict each other, both are
named: one of the two lies, or the way between them changed the cell. The attempt is void by then, and the
    cells are masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedspeed.routing.anonymous import cells
from fedspeed.routing.anonymous.crypto import KEY, Refused, digest
from fedspeed.routing.anonymous.paths import backup_of

_HASH = 32


@dataclass(frozen=True)
class Testimony:
    """What a member says of a chunk.

    Attributes:
        cell, ephemeral: the cell it sent as a source, and the private keys of its layers.
        got, gave: digests of the cells it got and passed on as a station, in their order; nothing for members
            that are none.
    """

    cell: np.ndarray
    ephemeral: tuple[bytes, ...]
    got: tuple[bytes, ...]
    gave: tuple[bytes, ...]

    @classmethod
    def of(cls, member, chunk: int) -> "Testimony":
        """Of a `protocol.Member`, told as it has acted."""
        plan = member.plan
        keys = tuple(
            key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
            for key in member._sent[chunk].ephemeral
        )
        empty = tuple(bytes(_HASH) for _ in range(member.n))
        got = gave = empty
        if member.me in plan.stations[chunk]:
            level = plan.stations[chunk].index(member.me)
            got = tuple(digest(cell) for cell in member._inputs[level][chunk])
            passed = cells.room(plan, level + 1, member.n)
            if level < plan.hops:
                passed = member._mixed(level, chunk, passed)
            else:
                member._open(level, chunk, passed)
            gave = tuple(digest(cell) for cell in passed)  # an owner passes on the cores it has listed
        cell = cells.room(plan, 0, 1)[0]
        member._build_own(chunk, cell)
        return cls(cell, keys, got, gave)

    def pack(self) -> bytes:
        return b"".join((self.cell, *self.ephemeral, *self.got, *self.gave))

    @classmethod
    def unpack(cls, text: bytes, plan, n: int) -> "Testimony":
        size = cells.size(plan, 0)
        layers = plan.hops + 1
        rest = text[size:]
        pieces = [rest[at : at + KEY] for at in range(0, len(rest), KEY)]
        return cls(
            np.frombuffer(text, np.uint8, size),
            tuple(pieces[:layers]),
            tuple(pieces[layers : layers + n]),
            tuple(pieces[layers + n :]),
        )


def list_of(cores: Sequence[np.ndarray], total: np.ndarray) -> bytes:
    """What an owner says of a chunk: the sorted serials of its cells, and the digest of their sum."""
    return b"".join(sorted(core[: cells.SERIAL].tobytes() for core in cores)) + digest(total.view(np.uint8))


def add_up(cores: Sequence[np.ndarray], out: np.ndarray) -> np.ndarray:
    """The sum of the cells that an owner has opened, into `out` [chunk_words] uint32."""
    out[:] = 0
    for core in cores:
        out += cells.words_of(core)
    return out


def judge(
    cipher,
    context: bytes,
    plan,
    chunk: int,
    keys: Sequence[bytes],
    *,
    stories: Sequence[Testimony],
    listed: bytes,
    accusers: frozenset[int],
) -> list[frozenset[int]]:
    """Sets of members, each with one at fault in it, from the first place on the way where something is
    wrong.

    Args:
        keys: onion keys of all members. listed: what the owner has signed of the chunk. accusers: who has
            complained about it.
    """
    n = len(stories)
    route = plan.stations[chunk]
    expected: list[list[bytes]] = [[] for _ in range(plan.hops + 2)]  # by level, of each source
    cores = []
    broken = []
    for source, story in enumerate(stories):
        try:
            private = [X25519PrivateKey.from_private_bytes(key) for key in story.ephemeral]
            found = cells.trace(
                cipher, context, plan, chunk=chunk, keys=keys, cell=story.cell, ephemeral=private
            )
            cores.append(found[-1])
            for level, cell in enumerate(found):
                expected[level].append(digest(cell))
        except (Refused, ValueError):
            broken.append(frozenset({source}))
    if broken:
        return broken
    serials = [core[: cells.SERIAL].tobytes() for core in cores]
    same = frozenset(i for i, serial in enumerate(serials) if serials.count(serial) > 1)
    if same:  # nobody draws another's by chance: one of them has copied it, or all have agreed on it
        return [same]
    first = stories[route[0]].got
    edges = [frozenset({source, route[0]}) for source in range(n) if first[source] != expected[0][source]]
    if edges:
        return edges
    for level, station in enumerate(route):
        story = stories[station]
        if level and story.got != stories[route[level - 1]].gave:
            return [frozenset({route[level - 1], station})]
        if sorted(story.gave) != sorted(expected[level + 1]):
            return [frozenset({station})]
    # All cells have reached the owner.
    if listed != list_of(cores, add_up(cores, np.empty(plan.chunk_words, np.uint32))):
        return [frozenset({route[-1]})]
    keeper = backup_of(route[-1], n)  # what it was given to keep, nobody else has seen
    return [
        frozenset({route[-1], keeper}) if accuser == keeper else frozenset({accuser})
        for accuser in sorted(accusers)
    ]
