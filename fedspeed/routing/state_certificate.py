"""The certificate of a state: the signatures of all members that took part in its round.

A site journals a round with its certificate only, and goes on from another site's state only if that site
shows one.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedspeed.errors import FedSpeedError
from fedspeed.routing.agreed_broadcast import Group
from fedspeed.routing.anonymous.crypto import (
    DIGEST,
    KEY,
    SIGNATURE,
    AuthenticationError,
    check_signature,
    digest,
)
from fedspeed.routing.state_claim import StateClaim

_MAGIC = b"fedspeed state 1"
_HEAD = struct.Struct(f">{len(_MAGIC)}s{DIGEST}s{StateClaim.BYTES}sH")
MAX_MEMBERS = 4096
MAX_BYTES = _HEAD.size + MAX_MEMBERS * (KEY + SIGNATURE)


@dataclass(frozen=True, kw_only=True)
class StateCertificate:
    """Hold the signatures of a state.

    Attributes:
        settings: digest of the settings that all sites have, without the roster, which may be replaced.
        claim: describes the state.
        members: public keys of the members that took part, 32 bytes each. signatures: of each.
    """

    settings: bytes
    claim: StateClaim
    members: tuple[bytes, ...]
    signatures: tuple[bytes, ...]

    def pack(self) -> bytes:
        """Return the certificate as at most MAX_BYTES bytes."""
        head = _HEAD.pack(_MAGIC, self.settings, self.claim.pack(), len(self.members))
        return head + b"".join(self.members) + b"".join(self.signatures)

    @classmethod
    def unpack(cls, packed: bytes) -> "StateCertificate":
        """Return the certificate of `pack`; its signatures are not verified.

        Raises:
            ValueError: it is none.
        """
        if len(packed) < _HEAD.size:
            raise ValueError(f"{len(packed)} bytes, too few for a certificate")
        magic, settings, claim, count = _HEAD.unpack_from(packed)
        body = packed[_HEAD.size :]
        if magic != _MAGIC or not 0 < count <= MAX_MEMBERS or len(body) != count * (KEY + SIGNATURE):
            raise ValueError(f"{len(packed)} bytes that are no certificate of a state")
        keys = body[: count * KEY]
        signatures = body[count * KEY :]
        return cls(
            settings=settings,
            claim=StateClaim.unpack(claim),
            members=tuple(_pieces(keys, KEY)),
            signatures=tuple(_pieces(signatures, SIGNATURE)),
        )

    def problem(self, settings: bytes) -> str:
        """Return why the certificate proves nothing here; empty if it is valid.

        Args:
            settings: digest of this site's settings.
        """
        if self.settings != settings:
            return "it is of a run with other settings"
        if len(set(self.members)) != len(self.members) or len(self.members) != len(self.signatures):
            return "it has a member twice"
        statement = statement_of(self.settings, self.members, self.claim)
        for member, signature in zip(self.members, self.signatures, strict=True):
            try:
                check_signature(member, signature, statement)
            except AuthenticationError:
                return f"it lacks a valid signature of {member.hex()[:12]}"
        return ""


def certify(group: Group, settings: bytes, claim: StateClaim) -> StateCertificate:
    """Return the certificate of a state that all members of the group have signed. Collective.

    Args:
        settings: digest of this site's settings. claim: describes the state.

    Raises:
        FedSpeedError: a member has another state, or has not signed it; names it.
        LostPeerError: a member is missing.
    """
    statement = statement_of(settings, group.members, claim)
    own = claim.pack()
    what = f"its signature of the state of round {claim.round}"
    arrived = group.send_all(own + group.key.sign(statement), what)
    problems = []
    for member, message in enumerate(arrived):
        if message[:-SIGNATURE] != own:
            theirs = _described(message[:-SIGNATURE])
            problems.append(
                f"{group.names[member]} has another state, {theirs}, where this site has "
                f"{claim.describe_numbers()}"
            )
        elif not group.is_signed(member, message[-SIGNATURE:], statement):
            problems.append(f"{group.names[member]} has not signed the state of {claim.describe()}")
    if problems:
        raise FedSpeedError(
            f"round {claim.round} is not written to the journal, because not all sites have signed its "
            f"state: {'; '.join(problems)}",
            remedy="compare the versions, the hardware and the files of these sites. The same command goes "
            "on from the last round that all have signed",
        )
    signatures = tuple(message[-SIGNATURE:] for message in arrived)
    return StateCertificate(settings=settings, claim=claim, members=group.members, signatures=signatures)


def statement_of(settings: bytes, members: Sequence[bytes], claim: StateClaim) -> bytes:
    """Return what the members of a certificate sign. Pure."""
    return digest(_MAGIC, settings, claim.pack(), *members)


def has_majority(signers: Iterable[bytes], roster: Sequence[bytes]) -> bool:
    """Return whether more than half of the members of a roster are among the signers. Pure."""
    return 2 * len(set(signers) & set(roster)) > len(roster)


def _described(packed: bytes) -> str:
    try:
        return StateClaim.unpack(packed).describe_numbers()
    except ValueError as error:
        return str(error)


def _pieces(joined: bytes, length: int) -> list[bytes]:
    return [joined[start : start + length] for start in range(0, len(joined), length)]
