"""Statements that every member makes to all others, with a check that it made the same one to everybody.

Two swaps. First each member sends its statement (a body and a signature) to all. Then each sends all others
a signed table of what it has received: for each member a digest of the body, and the signature. A member that
has signed two different bodies is convicted by its own two signatures, whoever shows them. Where a table
says that somebody's statement was not signed, or a table is not signed itself, one of two members lies and
nobody else can know which: the pair is named.

Whoever calls gives a context that is never used twice and contains something random of its own, so that a
signature of an earlier start proves nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.routing.anonymous.crypto import DIGEST, SIGNATURE, AuthenticationError, check_signature, digest
from fedspeed.routing.transport import Payload, PeersLost, TransportError, as_bytes

ROW = DIGEST + SIGNATURE  # bytes of a table for each member

# For each member the digest of its body; None where no valid signature came with it.
Row = Sequence[bytes | None]
Swap = Callable[[Sequence[Payload], Sequence[int]], list[Payload]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The members that make statements to each other, as one of them sees them.

    Attributes:
        me: number of this member. key: its private key.
        members: public keys of all in the order of their numbers, 32 bytes each. names: of all, for messages.
        swap: sends `parts[i]` to member i, and returns what each has sent, of `sizes[i]` bytes. It raises
            PeersLost with numbers of members, or TransportError.
    """

    me: int
    key: Ed25519PrivateKey
    members: tuple[bytes, ...]
    names: tuple[str, ...]
    swap: Swap

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.members)

    def exchange(self, parts: Sequence[Payload], sizes: Sequence[int], what: str) -> list[bytes]:
        """Send `parts[i]` to member i, and return what each has sent to this one, of `sizes[i]` bytes.

        Args:
            what: is exchanged, for the message.

        Raises:
            LostPeerError: a member has not sent it; names the members that are known to be missing.
        """
        try:
            arrived = self.swap(parts, sizes)
        except PeersLost as error:
            lost = self.list_names(error.peers) if error.peers else "a site"
            raise LostPeerError(
                f"{lost} did not send {what}: {error}", remedy="the same command tries again"
            ) from error
        except TransportError as error:
            raise LostPeerError(
                f"a site did not send {what}: {error}", remedy="the same command tries again"
            ) from error
        return [as_bytes(payload).tobytes() for payload in arrived]

    def send_all(self, own: bytes, what: str) -> list[bytes]:
        """Send the same to all members, and return what each has sent, of the same length."""
        return self.exchange([own] * self.size, [len(own)] * self.size, what)

    def list_names(self, numbers: Sequence[int] | frozenset[int]) -> str:
        """Return the names of members as one text."""
        return ", ".join(self.names[i] for i in sorted(numbers))

    def is_signed(self, member: int, signature: bytes, statement: bytes) -> bool:
        """Return whether a signature is that of a member over a statement."""
        try:
            check_signature(self.members[member], signature, statement)
        except AuthenticationError:
            return False
        return True


@dataclass(frozen=True)
class Verdict:
    """Hold who has not made the same statement to everybody.

    Attributes:
        convicted: members that have signed two different bodies.
        pairs: members that contradict each other; one of the two lies.
    """

    convicted: frozenset[int] = frozenset()
    pairs: frozenset[frozenset[int]] = frozenset()


def broadcast(group: Group, context: bytes, label: str, body: bytes) -> list[bytes]:
    """Return the bodies of all members, which have made the same statements to everybody. Collective.

    Args:
        context: bytes that no earlier start can have had, the same on all members.
        label: what the bodies are; never the same twice under one context.
        body: of this member, as long as those of the others.

    Raises:
        FedSpeedError: a member has made different statements; names it, or the two that contradict each
            other.
        LostPeerError: a member is missing.
    """
    own = body + group.key.sign(_statement(context, label, digest(body)))
    table: list[bytes] = []
    bodies: list[bytes] = []
    for statement in group.send_all(own, label):
        bodies.append(statement[:-SIGNATURE])
        table.append(digest(statement[:-SIGNATURE]) + statement[-SIGNATURE:])
    joined = b"".join(table)
    tables = group.send_all(
        joined + group.key.sign(_table_statement(context, label, joined)), f"its table of {label}"
    )
    rows = [_row(group, context, label, witness, table) for witness, table in enumerate(tables)]
    raise_verdict(group, verdict(rows, group.me), label)
    return bodies


def verdict(rows: Sequence[Row | None], me: int) -> Verdict:
    """Return who has not made the same statement to everybody. Pure.

    Args:
        rows: by witness, the row of its table; None if the table is not signed by the witness.
        me: number of this member, which knows its own row to be true.
    """
    legible = {witness: row for witness, row in enumerate(rows) if row is not None}
    numbers = range(len(rows))
    convicted = {
        speaker
        for speaker in numbers
        if len({row[speaker] for row in legible.values() if row[speaker] is not None}) > 1
    }
    pairs = {frozenset({witness, me}) for witness in numbers if witness not in legible}
    for witness, row in legible.items():
        # A witness that has no statement of itself contradicts whoever reads its table.
        pairs |= {
            frozenset({witness, speaker if speaker != witness else me})
            for speaker in numbers
            if row[speaker] is None
        }
    return Verdict(frozenset(convicted), frozenset(pairs))


def raise_verdict(group: Group, found: Verdict, label: str) -> None:
    """Raise an error that names who is at fault; do nothing if nobody is.

    Raises:
        FedSpeedError: somebody is.
    """
    if found.convicted:
        raise FedSpeedError(
            f"{label}: {group.list_names(found.convicted)} signed different statements for different sites, "
            "which its signatures prove",
            remedy="ask that site; it may have been changed, or its key may be in use elsewhere. A roster "
            "without it excludes it",
        )
    if found.pairs:
        pairs = ", ".join(sorted(" and ".join(group.names[i] for i in sorted(pair)) for pair in found.pairs))
        raise FedSpeedError(
            f"{label}: sites contradict each other about what they sent each other: {pairs}",
            remedy="one of the two is changed, or runs another version of FedSpeed; ask both",
        )


def _row(group: Group, context: bytes, label: str, witness: int, signed_table: bytes) -> Row | None:
    """Verify a witness's table; return its row, None if the witness has not signed it."""
    table = signed_table[:-SIGNATURE]
    if not group.is_signed(witness, signed_table[-SIGNATURE:], _table_statement(context, label, table)):
        return None
    row: list[bytes | None] = []
    for speaker in range(group.size):
        entry = table[speaker * ROW : (speaker + 1) * ROW]
        body_digest = entry[:DIGEST]
        is_signed = group.is_signed(speaker, entry[DIGEST:], _statement(context, label, body_digest))
        row.append(body_digest if is_signed else None)
    return row


def _statement(context: bytes, label: str, body_digest: bytes) -> bytes:
    """Return what is signed of a statement."""
    return digest(b"agreed broadcast", context, label.encode(), body_digest)


def _table_statement(context: bytes, label: str, table: bytes) -> bytes:
    """Return what is signed of a table."""
    return digest(b"table of an agreed broadcast", context, label.encode(), table)
