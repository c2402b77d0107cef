"""The first half of an attempt, as one member plays it: keys, cells, and the commitment to one set of
updates.

`protocol` says what each phase is for.
"""

import secrets

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous import ring, shamir
from fedspeed.routing.anonymous.announcement import (
    Announcement,
    commit_to_contribution,
    commit_to_secret,
    share_key,
)
from fedspeed.routing.anonymous.blame import Transcript, find_culprits
from fedspeed.routing.anonymous.certificate import SCALAR, Certificate, confirmation
from fedspeed.routing.anonymous.crypto import (
    DIGEST,
    KEY,
    AuthenticationError,
    derive_key,
    digest,
    fill_key_stream,
    open_sealed,
    public_bytes,
    seal,
    shared_secret,
)
from fedspeed.routing.anonymous.masks import Masks
from fedspeed.routing.anonymous.mix_node import MixNode
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.paths import draw_paths
from fedspeed.routing.anonymous.phases import AttemptFailed, Misbehaviour, Payload, Phase, Swap, as_message

NO_CHUNK = 2**32 - 1  # in a vote: no complaint


class CommittingMember(MixNode):
    """A member until the set of updates is committed: the phases `announce`, `reveal`, `vote`, `confirm`, and
    `blame` where a chunk was spoiled. The phases between are those of `MixNode`.

    What it knows that no other member does: its integers, its private onion and mask keys, the secret of its
    self mask until `unmask`, the serials and ephemeral keys of its cells, and the orders in which it
    shuffles. All of these are of this attempt and forgotten with it.
    """

    def __init__(self, parameters: PublicParameters, me: int, identity: Ed25519PrivateKey):
        """Draw the keys and secrets of this attempt.

        Args:
            me: this member's number.
            identity: the private key of `parameters.members[me]`.
        """
        super().__init__(parameters, me, identity)
        self._mask = X25519PrivateKey.generate()
        self._self_secret = shamir.to_bytes(shamir.draw_secret())
        self._contribution = secrets.token_bytes(KEY)  # to the beacon
        self._shares: dict[int, int] = {}  # of the others' self mask secrets, by the member that gave it
        self._certificate: Certificate | None = None
        self._lost: frozenset[int] = frozenset()
        self._conflicts: list[frozenset[int]] = []  # sets with one at fault in each that others may not see

    # Keys and the beacon.

    def _announce(self) -> Phase[None]:
        own = Announcement(
            onion_key=public_bytes(self._onion),
            mask_key=public_bytes(self._mask),
            contribution_commitment=commit_to_contribution(self._contribution),
            secret_commitment=commit_to_secret(self._self_secret),
        )
        messages = yield from self._broadcast("announce", own.sign(self._identity, self.context))
        self.announced = [self._checked_announcement(i, message) for i, message in enumerate(messages)]

    def _checked_announcement(self, i: int, message: bytes) -> Announcement:
        """Read the announcement of member i. Raises Misbehaviour if it is not signed or its keys are weak."""
        try:
            announcement = Announcement.verified(message, self.parameters.members[i], self.context)
        except AuthenticationError:
            raise Misbehaviour(
                f"member {i} announced itself with other settings, another roster, or a key that is not its "
                "own",
                i,
            ) from None
        for key in (announcement.onion_key, announcement.mask_key):
            try:
                shared_secret(self._onion, key)
            except AuthenticationError:
                raise Misbehaviour(f"member {i} announced a public key of small order", i) from None
        return announcement

    def _reveal(self) -> Phase[None]:
        shares = shamir.split(shamir.from_bytes(self._self_secret), self.n, self.parameters.threshold)
        parts: list[Payload] = [
            self._contribution
            + seal(
                self.cipher,
                self._share_key(giver=self.me, holder=i),
                shamir.to_bytes(shares[i]),
                self.parameters.context,
            )
            for i in range(self.n)
        ]
        payloads = yield Swap("reveal", parts, [len(part) for part in parts])
        messages = [as_message(payload) for payload in payloads]
        for i, message in enumerate(messages):
            if commit_to_contribution(message[:KEY]) != self.announced[i].contribution_commitment:
                raise Misbehaviour(
                    f"member {i} revealed another contribution to the beacon than it had committed to", i
                )
            self._shares[i] = self._opened_share(i, message[KEY:])
        beacon = digest(b"beacon", self.context, *(message[:KEY] for message in messages))
        self.context = digest(self.context, beacon)
        self.plan = draw_paths(
            beacon, self.n, self.parameters.length, self.parameters.relays, self.parameters.chunk_length
        )
        self.masks = None
        if self.parameters.masked:
            mask_keys = [announcement.mask_key for announcement in self.announced]
            self.masks = Masks(
                self.cipher, self.context, self.me, self._mask, mask_keys, self_secret=self._self_secret
            )

    def _opened_share(self, giver: int, sealed: bytes) -> int:
        """Open the share that a member has entrusted to this one. Raises Misbehaviour if it does not open."""
        key = self._share_key(giver=giver, holder=self.me)
        try:
            return shamir.from_bytes(open_sealed(self.cipher, key, sealed, self.parameters.context))
        except AuthenticationError:
            raise Misbehaviour(
                f"the share that member {giver} sent to member {self.me} does not open", giver
            ) from None

    def _share_key(self, *, giver: int, holder: int) -> bytes:
        peer = self.announced[holder if giver == self.me else giver].mask_key
        return share_key(self._mask, peer, self.parameters.context, giver=giver, holder=holder)

    # The commitment.

    def _vote(self) -> Phase[None]:
        """Find out whether any member complains, and whether all have received the same lists.

        Nobody signs before it has heard all votes: so a member that complains to some others only keeps them,
        and thereby all, from committing.
        """
        complaint = min(self.complaints, default=NO_CHUNK)
        votes = yield from self._broadcast(
            "vote", self._lists_digest + b"".join(self._list_digests) + complaint.to_bytes(4, "big")
        )
        for i, vote in enumerate(votes):
            if vote[:DIGEST] != self._lists_digest:
                self._report_equivocation(i, vote)
        complaints = {i: int.from_bytes(vote[-4:], "big") for i, vote in enumerate(votes)}
        chunk = min((c for c in complaints.values() if c < self.plan.chunks), default=NO_CHUNK)
        if chunk != NO_CHUNK:
            yield from self._blame(chunk, frozenset(i for i, c in complaints.items() if c == chunk))

    def _report_equivocation(self, i: int, vote: bytes) -> None:
        """Raise Misbehaviour: member i has voted on another list than this member has received."""
        starts = range(DIGEST, DIGEST * (1 + self.n), DIGEST)
        digests = [vote[start : start + DIGEST] for start in starts]
        differing = (owner for owner in range(self.n) if digests[owner] != self._list_digests[owner])
        owner = next(differing, self.me)
        self._conflicts = [frozenset({owner, i})]
        raise Misbehaviour(
            f"owner {owner} sent members {i} and {self.me} different lists, or one of them claims so"
        )

    def _confirm(self) -> Phase[None]:
        scalar = 0
        if self.masks:
            checksum = ring.linear_checksum(self.integers, self._coefficients())
            scalar = self.masks.apply_to_scalar(checksum)
        signature = self._identity.sign(confirmation(self.context, self._lists_digest, scalar))
        messages = yield from self._broadcast("confirm", scalar.to_bytes(SCALAR, "big") + signature)
        certificate = Certificate(
            tuple(message[SCALAR:] for message in messages),
            tuple(int.from_bytes(message[:SCALAR], "big") for message in messages),
        )
        if invalid := self._invalid_members(certificate):
            raise Misbehaviour(f"member {invalid[0]} did not sign what it confirmed", invalid[0])
        self._certificate = certificate

    def _invalid_members(self, certificate: Certificate) -> list[int]:
        return certificate.invalid_members(self.parameters.members, self.context, self._lists_digest)

    def _coefficients(self) -> ring.RandomStream:
        """Return the coefficients of the checksum: nobody could know them before all lists were published."""
        key = derive_key(self._lists_digest, b"factors")
        number = iter(range(2**32))
        return lambda out: fill_key_stream(self.cipher, key, next(number), out)

    def _blame(self, chunk: int, accusers: frozenset[int]) -> Phase[None]:
        """Reveal all transcripts of a spoiled chunk, and find who is at fault. Raises AttemptFailed, always.

        Without masks the transcripts would show whose integers are whose, so nobody reveals any.
        """
        path = self.plan.paths[chunk]
        if not self.parameters.masked:
            raise AttemptFailed(
                f"chunk {chunk} did not come through the members {path} as it was sent; without masks, "
                "looking for who did it would show whose it was",
                blamed=[frozenset(path) | accusers],
            )
        messages = yield from self._broadcast("blame", self.transcript(chunk).pack())
        blamed = find_culprits(
            self.cipher,
            self.context,
            self.plan,
            chunk,
            self.onion_keys,
            transcripts=[Transcript.unpack(message, self.plan) for message in messages],
            entry=self.entries[chunk],
            accusers=accusers,
        )
        names = "; ".join(" or ".join(f"member {i}" for i in sorted(group)) for group in blamed)
        raise AttemptFailed(
            f"chunk {chunk} did not come through as it was sent, by the doing of {names}", blamed=blamed
        )

    # Messages to all.

    def _broadcast(self, phase: str, message: bytes) -> Phase[list[bytes]]:
        """Send one message to all, and return those of all, each of as many bytes; empty from the lost."""
        payloads = yield self._swap_with_all(phase, message, [len(message)] * self.n)
        return [as_message(payload) for payload in payloads]

    def _swap_with_all(self, phase: str, message: bytes | np.ndarray, sizes: list[int]) -> Swap:
        """Return the step that sends one message to all members that are not lost."""
        return Swap(
            phase,
            [b"" if i in self._lost else message for i in range(self.n)],
            [0 if i in self._lost else sizes[i] for i in range(self.n)],
        )
