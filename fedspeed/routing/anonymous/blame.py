"""Find who has spoiled a chunk, from what all members reveal of it afterwards (identifiable abort). Pure.

Each source reveals the ephemeral keys of its cell of this chunk, from which anyone can compute what each
member of the path had to receive and to send. Each member of the path reveals digests of what it received and
sent. A member whose transcript contradicts itself is blamed alone. Where the transcripts of a sender and a
receiver contradict each other, both are blamed: one of the two lies, or the connection between them changed
the cell.

Nothing of this endangers an update: the attempt has failed before anything was unmasked, its keys are never
used again, and the integers of the revealed cells are masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous import cells
from fedspeed.routing.anonymous.crypto import DIGEST, KEY, AuthenticationError, Cipher, digest
from fedspeed.routing.anonymous.lists import make_entry, sum_cores
from fedspeed.routing.anonymous.paths import PathPlan, backup_of


@dataclass(frozen=True)
class Transcript:
    """What a member reveals of one chunk.

    Attributes:
        cell: [size of hop 0] uint8, the cell that it sent as a source.
        ephemeral: private keys of that cell's layers, 32 bytes each.
        received, sent: digests of the cells that it received and sent as a relay or owner, in their order
            (what an owner sends is the cores that it has listed); all zero where it is not on the path.
    """

    cell: np.ndarray
    ephemeral: tuple[bytes, ...]
    received: tuple[bytes, ...]
    sent: tuple[bytes, ...]

    def pack(self) -> bytes:
        """Return the transcript as bytes; their number depends on the path plan only."""
        return b"".join((self.cell.tobytes(), *self.ephemeral, *self.received, *self.sent))

    @classmethod
    def unpack(cls, text: bytes, plan: PathPlan) -> "Transcript":
        """Read a packed transcript of the right number of bytes."""
        size = cells.size(plan, 0)
        layers = plan.relays + 1
        rest = text[size:]
        assert KEY == DIGEST
        fields = tuple(rest[start : start + KEY] for start in range(0, len(rest), KEY))
        return cls(
            np.frombuffer(text, np.uint8, size),
            ephemeral=fields[:layers],
            received=fields[layers : layers + plan.members],
            sent=fields[layers + plan.members :],
        )


@dataclass(frozen=True)
class _Replay:
    """A chunk's cells as they had to be, computed from what the sources reveal.

    Attributes:
        digests: [relays + 2][members] digest of each source's cell in each hop, the core's last.
        cores: [members] the cores.
    """

    digests: list[list[bytes]]
    cores: list[np.ndarray]


def find_culprits(
    cipher: type[Cipher],
    context: bytes,
    plan: PathPlan,
    chunk: int,
    onion_keys: Sequence[bytes],
    *,
    transcripts: Sequence[Transcript],
    entry: bytes,
    accusers: frozenset[int],
) -> list[frozenset[int]]:
    """Return sets of members with at least one at fault in each, for the first hop that went wrong.

    Args:
        onion_keys: public onion keys of all members.
        transcripts: of all members.
        entry: what the chunk's owner has signed about it.
        accusers: members that have complained about the chunk.
    """
    cheating_sources = []
    digests: list[list[bytes]] = [[] for _ in range(plan.relays + 2)]
    cores = []
    for source, transcript in enumerate(transcripts):
        try:
            ephemeral = [X25519PrivateKey.from_private_bytes(key) for key in transcript.ephemeral]
            stages = cells.open_all(
                cipher, context, plan, chunk, onion_keys, cell=transcript.cell, ephemeral=ephemeral
            )
        except (AuthenticationError, ValueError):
            cheating_sources.append(frozenset({source}))
            continue
        cores.append(stages[-1])
        for hop, cell in enumerate(stages):
            digests[hop].append(digest(cell.data))
    if cheating_sources:
        return cheating_sources
    serials = [cells.serial_of(core) for core in cores]
    same_serial = frozenset(i for i, serial in enumerate(serials) if serials.count(serial) > 1)
    if same_serial:  # 16 random bytes do not meet by chance: one copied another's, or they agreed on it
        return [same_serial]
    return _culprits_on_path(
        plan, chunk, transcripts, _Replay(digests, cores), entry=entry
    ) or _culprits_of_complaints(plan.owner(chunk), plan.members, accusers)


def _culprits_on_path(
    plan: PathPlan, chunk: int, transcripts: Sequence[Transcript], replay: _Replay, *, entry: bytes
) -> list[frozenset[int]]:
    """Compare what the members of the path received and sent with what they had to; empty if all is right."""
    path = plan.paths[chunk]
    arrived = transcripts[path[0]].received
    expected = replay.digests[0]
    edges = [
        frozenset({source, path[0]}) for source in range(plan.members) if arrived[source] != expected[source]
    ]
    if edges:
        return edges
    for hop, member in enumerate(path):
        transcript = transcripts[member]
        if hop and transcript.received != transcripts[path[hop - 1]].sent:
            return [frozenset({path[hop - 1], member})]
        if sorted(transcript.sent) != sorted(replay.digests[hop + 1]):
            return [frozenset({member})]
    total = sum_cores(replay.cores, np.empty(plan.chunk_length, np.uint32))
    return [] if entry == make_entry(replay.cores, total) else [frozenset({path[-1]})]


def _culprits_of_complaints(owner: int, members: int, accusers: frozenset[int]) -> list[frozenset[int]]:
    """Blame the accusers: the chunk was right. Only a backup may have been wronged, since nobody else saw the
    sum that the owner sent it to store.
    """
    backup = backup_of(owner, members)
    return [
        frozenset({owner, backup}) if accuser == backup else frozenset({accuser})
        for accuser in sorted(accusers)
    ]
