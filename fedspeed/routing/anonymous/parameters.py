"""What the members of an attempt agree on beforehand, what they exchange in it, and how it may end. Values
only.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.routing.anonymous.crypto import digest

NO_CHUNK = 2**32 - 1
HASH = 32  # bytes of a digest


@dataclass(frozen=True)
class PublicParameters:
    """What the members of an attempt agree on beforehand; an attempt in which they do not fails at its first
    message.

    Attributes:
        members: identity keys (Ed25519, 32 bytes) in the order of the roster.
        words: ring elements of everyone's vector.
        settings: digest of everything that must be equal on all sites: roster, base, tokenizer, run.
        attempt: its number in the run, the retries of an exchange counted too.
        masked: whether words are masked; else owners see a member's chunk, without its name.
        hops: relays of a path; 0: cells go to the owner directly, who sees from whom.
        threshold: how many must survive; so many together can tell a lost member's mask.
    """

    members: tuple[bytes, ...]
    words: int
    settings: bytes
    attempt: int = 0
    masked: bool = True
    hops: int = 2
    chunk_words: int = 1 << 18
    cipher: str = "aes-128-gcm"
    threshold: int = 2

    @property
    def context(self) -> bytes:
        parts = (
            self.words,
            self.attempt,
            self.masked,
            self.hops,
            self.chunk_words,
            self.cipher,
            self.threshold,
        )
        return digest(b"fedspeed sum", self.settings, repr(parts).encode(), *self.members)


@dataclass
class Swap:
    """Give `parts[i]` to member i: bytes, or a list of pieces of one size, which may come as such a list too.
    `sizes[i]` bytes will come from it. One that is lost gets and gives nothing.
    """

    state: str
    parts: list
    sizes: list[int]


@dataclass(frozen=True)
class Agreed:
    """The sum of all members' words [words] uint32, modulo 2^32, and whose they are."""

    words: np.ndarray
    members: tuple[bytes, ...]


class Lost(Exception):
    """Thrown into the generator instead of what it waits for, once everyone else has been heard.

    Attributes:
        members: those that no longer answer, by number.
        settling: whether somebody who does is settling already.
    """

    def __init__(self, members: frozenset[int], settling: bool = False):
        super().__init__(f"lost: {sorted(members)}")
        self.members = members
        self.settling = settling


class Void(Exception):
    """The attempt has failed, and nothing of it can be used.

    Attributes:
        lost: members that are gone. blamed: sets of members, each of which has one at fault in it; a set of
            one is a proof.
        fatal: whether another attempt is useless.
    """

    def __init__(
        self,
        reason: str,
        lost: frozenset[int] = frozenset(),
        blamed: Sequence[frozenset[int]] = (),
        fatal: bool = False,
    ):
        super().__init__(reason)
        self.lost, self.blamed, self.fatal = lost, tuple(blamed), fatal


class Suspicion(Exception):
    """What members did wrong in messages to this one; nobody else has seen it."""

    def __init__(self, reason: str, *members: int):
        super().__init__(reason)
        self.members = frozenset(members)


Steps = Generator[Swap, list, "Agreed"]
