"""What a member exchanges in the phases of an attempt, and how an attempt can end."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fedspeed.routing.transport import Payload

T = TypeVar("T")


@dataclass
class Swap:
    """One communication step: send `parts[i]` to member i, and expect `sizes[i]` bytes from it.

    An empty part is not sent, and a size of 0 is not waited for. What arrives has the types of `Payload`.

    Attributes:
        phase: the name of the phase, the same on all members that take part.
    """

    phase: str
    parts: list[Payload]
    sizes: list[int]


# A phase as a member plays it: it yields what it wants to send, and is sent what arrived from each member.
Phase = Generator[Swap, Sequence[Payload], T]


@dataclass(frozen=True)
class AgreedSum:
    """The sum that an attempt ends with.

    Attributes:
        values: [length] uint32, the sum modulo 2^32 of the integers of all `members`.
        members: identity keys of those that are in the sum.
        skip_reasons: members because of which all have added zeros: they have settled the update in another
            sum before (`settlement`). Empty if the updates are in the sum.
        lost: numbers of members that no longer answer, or that are convicted; the same on all members.
        blamed: sets of members with at least one at fault in each; a set of one is a proof against it. The
            sum is right in spite of them.
        convicted: members that two signatures of their own convict, the same for all that end with the sum.
    """

    values: np.ndarray
    members: tuple[bytes, ...]
    skip_reasons: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()
    blamed: tuple[frozenset[int], ...] = ()
    convicted: frozenset[int] = frozenset()


class MembersLost(Exception):
    """Thrown into a phase in place of messages that will not arrive, once all other members were heard.

    Attributes:
        members: numbers of those that no longer answer.
        recovering: whether a member that does answer is in another phase: all go to the recovery.
        arrived: what has arrived from the others, by member.
        ahead: those of `members` that have ended this attempt, or the run.
    """

    def __init__(
        self,
        members: frozenset[int],
        recovering: bool = False,
        arrived: Sequence[Payload] = (),
        *,
        ahead: frozenset[int] = frozenset(),
    ):
        super().__init__(f"lost: {sorted(members)}")
        self.members = members
        self.ahead = ahead
        self.recovering = recovering
        self.arrived = arrived


class Misbehaviour(Exception):
    """A message to this member that breaks the protocol. No other member has seen it.

    Attributes:
        members: numbers of those that are at fault; empty if that is for all to find out.
    """

    def __init__(self, reason: str, *members: int):
        super().__init__(reason)
        self.members = frozenset(members)


class AttemptFailed(Exception):
    """The attempt has failed; none of its messages can be used for anything.

    Attributes:
        lost: numbers of members that no longer answer.
        blamed: sets of members with at least one at fault in each; a set of one is a proof against it.
        fatal: whether another attempt is useless.
        settled: whether secrets of self masks have left, so that a sum of this set may be opened by somebody.
    """

    def __init__(
        self,
        reason: str,
        lost: frozenset[int] = frozenset(),
        blamed: Sequence[frozenset[int]] = (),
        *,
        fatal: bool = False,
        settled: bool = False,
    ):
        super().__init__(reason)
        self.lost = lost
        self.blamed = tuple(blamed)
        self.fatal = fatal
        self.settled = settled


def as_message(payload: Payload) -> bytes:
    """Return a short message that arrived, as bytes."""
    if isinstance(payload, list):
        return b"".join(piece.tobytes() for piece in payload)
    return payload if isinstance(payload, bytes) else payload.tobytes()
