"""What members sign in an attempt, and the proof that one of them has signed two different things. Pure.

Every phase whose content must be the same for all is signed: the digest of the content, under the phase's
name and the attempt's context. An honest member signs one content in each phase of an attempt. So two valid
signatures of one member over different contents convict it, whoever shows them: nobody else could have made
them, and a context never comes again (it holds the attempt's number and what all have drawn at the start).

Each member keeps what it has received, and sends all of it to the others when something went wrong
(`recovery`), both contents where it has two. So whoever has signed one content for one peer and another for
another is convicted then, by all that are left.
"""

from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.routing.anonymous.crypto import DIGEST, SIGNATURE, AuthenticationError, check_signature, digest

# Phases with a signed content, in the order in which a table of statements is packed. The first two are under
# the context of the parameters, the others under the one that all announcements and the beacon are part of.
FIRST_LABELS = ("announce", "reveal")
LABELS = (*FIRST_LABELS, "collect", "confirm", "unmask", "done")
RECORD = DIGEST + SIGNATURE  # bytes of a packed statement; zeros where there is none
_KEPT = 2  # statements of one member in one phase: two prove what more would


def statement(label: str, context: bytes, content: bytes) -> bytes:
    """Return what a member signs.

    Args:
        content: a digest, or anything else of 32 bytes that stands for the content.
    """
    return digest(b"statement", label.encode(), context, content)


class Statements:
    """The signed statements that one member has received in an attempt, its own included.

    Attributes:
        convicted: members that have signed two different contents in one phase.
    """

    def __init__(self, members: Sequence[bytes], context: bytes):
        """Begin with no statement.

        Args:
            members: identity keys. context: of the parameters.
        """
        self.convicted: set[int] = set()
        self._members = tuple(members)
        self._contexts = dict.fromkeys(FIRST_LABELS, context)
        # By phase and member, the signature of each content.
        self._received: dict[tuple[str, int], dict[bytes, bytes]] = {}

    def use_context(self, context: bytes) -> None:
        """Set the context of the phases after the reveal."""
        for label in LABELS:
            self._contexts.setdefault(label, context)

    def sign(self, label: str, content: bytes, *, me: int, identity: Ed25519PrivateKey) -> bytes:
        """Sign this member's content of a phase; return the signature."""
        signature = identity.sign(statement(label, self._contexts[label], content))
        self._keep(label, me, content, signature)
        return signature

    def receive(self, label: str, member: int, content: bytes, signature: bytes) -> None:
        """Keep a member's statement.

        Raises:
            AuthenticationError: the member has not signed it.
        """
        check_signature(self._members[member], signature, statement(label, self._contexts[label], content))
        self._keep(label, member, content, signature)

    def _keep(self, label: str, member: int, content: bytes, signature: bytes) -> None:
        """Keep a valid statement; note whether it is the second one."""
        known = self._received.setdefault((label, member), {})
        if len(known) < _KEPT:
            known[content] = signature
        if len(known) == _KEPT:
            self.convicted.add(member)

    def content(self, label: str, member: int) -> bytes | None:
        """Return what a member has signed first in a phase; None if this member has no statement of it."""
        return next(iter(self._received.get((label, member), ())), None)

    @property
    def convictions(self) -> list[frozenset[int]]:
        """The convicted members, each alone in a set."""
        return [frozenset({i}) for i in sorted(self.convicted)]

    def pack(self) -> bytes:
        """Return all statements as bytes; their number depends on the number of members only."""
        keys = ((label, member) for label in LABELS for member in range(len(self._members)))
        records = (b"".join(map(b"".join, self._received.get(key, {}).items())) for key in keys)
        return b"".join(record.ljust(_KEPT * RECORD, b"\0") for record in records)

    def merge(self, packed: bytes) -> None:
        """Add the statements that another member has received; note who has signed two contents.

        A statement without a valid signature under this member's context says nothing and is left out.
        """
        n = len(self._members)
        for place in range(len(LABELS) * n * _KEPT):
            record = packed[place * RECORD : (place + 1) * RECORD]
            label, member = divmod(place // _KEPT, n)
            self._merge_one(LABELS[label], member, record[:DIGEST], record[DIGEST:])

    def _merge_one(self, label: str, member: int, content: bytes, signature: bytes) -> None:
        known = self._received.get((label, member), {})
        if label not in self._contexts or content in known or not any(signature):
            return
        try:
            check_signature(
                self._members[member], signature, statement(label, self._contexts[label], content)
            )
        except AuthenticationError:
            return
        self._keep(label, member, content, signature)


def packed_size(members: int) -> int:
    """Return the bytes of a packed table of statements."""
    return len(LABELS) * members * _KEPT * RECORD
