"""Settled marks: an update is never summed over two different sets of members. Pure, but for `MemoryMarks`.

The difference of two sums of the same updates over different sets is the update of whoever is in one of them
only. A member that retries, resumes or goes on with fewer others trains a round again bit for bit, so it must
know whether an earlier sum of that round may have been opened. It may have been from the moment on at which
the member lets the secret of its self mask leave. Before that, it writes a mark that survives the loss of
power: what was summed (the label), by whom, and the digest of its own vector.

All members announce their marks. If one of them has a mark of the label over another set, or with another
vector of its own, all add zeros: the update is given up, and the round counts as skipped. Else the sum is the
same one again, or no sum with these updates was ever opened, and all add their updates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedspeed.routing.anonymous.crypto import DIGEST, digest, keyed_digest

NO_MARK = bytes(DIGEST)  # announced by a member without a mark of the label
OTHER_VECTOR = b"\xff" * DIGEST  # announced by a member that no longer has the vector of its mark


@dataclass(frozen=True)
class Mark:
    """A sum whose opening a member has made possible.

    Attributes:
        members: digest of the set (`set_digest`). vector: digest of what the member has added.
    """

    members: bytes
    vector: bytes


class SettledMarks(Protocol):
    """The marks of one member, by label."""

    def get(self, label: str) -> Mark | None:
        """Return the mark of a label; None if there is none."""
        ...

    def put(self, label: str, mark: Mark) -> None:
        """Store a mark. It is durable when this returns."""
        ...


class MemoryMarks:
    """Marks that last as long as the process: for one operator's job, whose updates no other job sums."""

    def __init__(self) -> None:
        self._marks: dict[str, Mark] = {}

    def get(self, label: str) -> Mark | None:
        """Return the mark of a label; None if there is none."""
        return self._marks.get(label)

    def put(self, label: str, mark: Mark) -> None:
        """Store a mark."""
        self._marks[label] = mark


def set_digest(members: Sequence[bytes]) -> bytes:
    """Return the digest of a set of members, given by their identity keys in any order: that of the roster
    may be another one in the next start.
    """
    return digest(b"set", *sorted(members))


def vector_digest(key: bytes, vector: np.ndarray, weight: float) -> bytes:
    """Return the digest of what a member adds to a sum: its vector [n] float32 and its weight.

    Args:
        key: a secret of the member. Without it, the digest confirms no guess of the vector.
    """
    content = keyed_digest(key, np.ascontiguousarray(vector).view(np.uint8).data)
    return digest(b"vector", content, np.float64(weight).tobytes())


def announced_mark(mark: Mark | None, vector: bytes) -> bytes:
    """Return what a member announces of its mark.

    Args:
        mark: of the label, None if there is none. vector: digest of what the member would add now.
    """
    if mark is None:
        return NO_MARK
    return mark.members if mark.vector == vector else OTHER_VECTOR


def reasons_to_skip(announced: Iterable[bytes], members: bytes) -> frozenset[int]:
    """Return the members because of which all add zeros: their mark is of another set, or of another vector.

    Args:
        announced: the marks of all members, by number. members: digest of the present set.
    """
    return frozenset(i for i, mark in enumerate(announced) if mark not in (NO_MARK, members))
