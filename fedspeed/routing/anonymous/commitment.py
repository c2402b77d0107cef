"""The first half of an attempt, as one member plays it: keys, cells, and the commitment to one set of
updates.

`protocol` says what each phase is for.
"""

import secrets
from collections.abc import Callable, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedspeed.routing.anonymous.announcement import (
    BODY,
    Announcement,
    commit_to_contribution,
    commit_to_secret,
    echo,
)
from fedspeed.routing.anonymous.blame import Transcript, find_culprits
from fedspeed.routing.anonymous.certificate import UNSIGNED, Certificate
from fedspeed.routing.anonymous.crypto import (
    DIGEST,
    KEY,
    AuthenticationError,
    digest,
    public_bytes,
    shared_secret,
)
from fedspeed.routing.anonymous.masks import Masks
from fedspeed.routing.anonymous.mix_node import MixNode
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.paths import draw_paths
from fedspeed.routing.anonymous.phases import AttemptFailed, Misbehaviour, Phase, Swap, as_message
from fedspeed.routing.anonymous.recovery import NO_CHUNK
from fedspeed.routing.anonymous.settlement import NO_MARK, reasons_to_skip, set_digest


class CommittingMember(MixNode):
    """A member until the set of updates is committed: the phases `announce`, `reveal` and `confirm`, and
    `blame` where a chunk was spoiled. The phases between are those of `MixNode`.

    What it knows that no other member does: its integers, its private onion and mask keys, the secret of its
    self mask until `unmask`, its contributions until they are revealed, the serials and ephemeral keys of its
    cells, and the orders in which it shuffles. All of these are of this attempt and forgotten with it.
    """

    def __init__(
        self,
        parameters: PublicParameters,
        me: int,
        identity: Ed25519PrivateKey,
        integers: Callable[[], np.ndarray],
        *,
        mark: bytes = NO_MARK,
    ):
        """Draw the keys and secrets of this attempt.

        Args:
            me: this member's number.
            identity: the private key of `parameters.members[me]`.
            integers: called once all have revealed, unless the sum is skipped; returns what this member adds
                to the sum: [length] uint32.
            mark: what this member announces of its settled mark (`settlement.announced_mark`).
        """
        super().__init__(parameters, me, identity)
        self.skip_reasons: frozenset[int] = frozenset()  # members because of which all add zeros
        self._get_integers = integers
        self._mark = mark
        self._mask = X25519PrivateKey.generate()
        self._self_secret = secrets.token_bytes(KEY)
        self._contribution = secrets.token_bytes(KEY)  # to the beacon
        self._comparison = secrets.token_bytes(KEY)  # contribution to the key of the final comparison
        self._certificate: Certificate | None = None
        self._lost: frozenset[int] = frozenset()
        self._accused: frozenset[int] = frozenset()  # members that have misbehaved in a message to this one
        self._suspects: set[int] = set()  # members that have signed another digest than this one
        self._contradictions: list[frozenset[int]] = []  # one of each pair does not answer the other
        # Members that may have left the attempt: their last message agrees with this member's.
        self._agreeing: frozenset[int] = frozenset()
        self._compared = b""  # digest of what must have arrived alike before an attempt is given up

    # Keys and the beacon.

    def _announce(self) -> Phase[None]:
        """Exchange announcements, each signed by its member."""
        own = Announcement(
            onion_key=public_bytes(self._onion),
            mask_key=public_bytes(self._mask),
            beacon_commitment=commit_to_contribution(self._contribution),
            comparison_commitment=commit_to_contribution(self._comparison),
            secret_commitment=commit_to_secret(self._self_secret),
            subject=self.parameters.subject,
            mark=self._mark,
        )
        messages = yield from self._broadcast("announce", own.pack() + self._sign("announce", own.content))
        self.announced = [self._checked_announcement(i, message) for i, message in enumerate(messages)]

    def _checked_announcement(self, i: int, message: bytes) -> Announcement:
        announcement = Announcement.unpack(message[:BODY])
        self._receive(
            "announce",
            i,
            announcement.content,
            message[BODY:],
            f"member {i} announced itself with other settings, another roster, or a key that is not its own",
        )
        for key in (announcement.onion_key, announcement.mask_key):
            try:
                shared_secret(self._onion, key)
            except AuthenticationError:
                raise Misbehaviour(f"member {i} announced a public key of small order", i) from None
        return announcement

    def _reveal(self) -> Phase[None]:
        """Reveal the contributions to the beacon, and check that all have received the same announcements."""
        own = echo(self.announced)
        messages = yield from self._broadcast("reveal", self._contribution + own + self._sign("reveal", own))
        for i, message in enumerate(messages):
            echoed = message[KEY : KEY + DIGEST]
            reason = f"member {i} did not sign which announcements it has received"
            self._receive("reveal", i, echoed, message[KEY + DIGEST :], reason)
        for i, message in enumerate(messages):
            if message[KEY : KEY + DIGEST] != own:
                self._suspects.add(i)
                raise Misbehaviour(f"members {self.me} and {i} have received different announcements")
            if commit_to_contribution(message[:KEY]) != self.announced[i].beacon_commitment:
                raise Misbehaviour(
                    f"member {i} revealed another contribution to the beacon than it had committed to", i
                )
        self._check_subjects()
        beacon = digest(b"beacon", self.context, own, *(message[:KEY] for message in messages))
        self.context = digest(self.context, beacon)
        self.statements.use_context(self.context)
        self.plan = draw_paths(
            beacon, self.n, self.parameters.length, self.parameters.relays, self.parameters.chunk_length
        )
        self.masks = None
        if self.parameters.masked:
            mask_keys = [announcement.mask_key for announcement in self.announced]
            self.masks = Masks(
                self.cipher, self.context, self.me, self._mask, mask_keys, self_secret=self._self_secret
            )

    def _check_subjects(self) -> None:
        """Compare what the members are about to sum; decide whether the sum is skipped.

        Raises:
            AttemptFailed: they do not sum the same, or start from different states; alike on all members.
        """
        own = self.parameters.subject
        if other := [i for i, announced in enumerate(self.announced) if announced.subject != own]:
            raise AttemptFailed(
                f"members {', '.join(map(str, other))} do not have the state and the round that member "
                f"{self.me} has; compare the versions, the hardware and the files of these sites",
                blamed=[frozenset({self.me, i}) for i in other],
                fatal=True,
            )
        marks = [announced.mark for announced in self.announced]
        self.skip_reasons = reasons_to_skip(marks, set_digest(self.parameters.members))

    def _choose_integers(self) -> None:
        """Take what this member adds to the sum: zeros if the sum is skipped."""
        if self.skip_reasons:
            self.integers = np.zeros(self.parameters.length, np.uint32)
        else:
            self.integers = self._get_integers()
        assert self.integers.dtype == np.uint32 and len(self.integers) == self.parameters.length

    # The commitment.

    def _confirm(self) -> Phase[None]:
        """Sign the lists, unless a chunk was spoiled; take the signatures of all as the certificate.

        A signature that reaches some members only commits all: who has all signatures shows them in the
        recovery.
        """
        complaint = min(self.complaints, default=NO_CHUNK)
        signature = self._sign("confirm", self._lists_digest) if complaint == NO_CHUNK else UNSIGNED
        messages = yield from self._broadcast("confirm", self._lists_digest + signature)
        certificate = Certificate(tuple(message[DIGEST:] for message in messages))
        for i, message in enumerate(messages):
            if message[:DIGEST] != self._lists_digest:
                self._suspects.add(i)
                raise Misbehaviour(f"members {self.me} and {i} have received different lists")
            if message[DIGEST:] == UNSIGNED:
                raise Misbehaviour(f"member {i} says that a chunk did not come through as it was sent")
            reason = f"member {i} did not sign what it confirmed"
            self._receive("confirm", i, self._lists_digest, message[DIGEST:], reason)
        self._certificate = certificate

    def _blame(self, chunk: int, accusers: frozenset[int]) -> Phase[list[frozenset[int]]]:
        """Reveal all transcripts of a spoiled chunk; return sets of members with one at fault in each.

        Without masks the transcripts would show whose integers are whose, so nobody reveals any.
        """
        path = self.plan.paths[chunk]
        if not self.parameters.masked:
            self._reason = (
                f"chunk {chunk} did not come through the members {path} as it was sent; without masks, "
                "looking for who did it would show whose it was"
            )
            return [frozenset(path) | accusers]
        messages = yield from self._broadcast("blame", self._compared + self.transcript(chunk).pack())
        self._check_compared([message[:DIGEST] for message in messages])
        self._compared = digest(b"transcripts", self._compared, *messages)
        blamed = find_culprits(
            self.cipher,
            self.context,
            self.plan,
            chunk,
            self.onion_keys,
            transcripts=[Transcript.unpack(message[DIGEST:], self.plan) for message in messages],
            entry=self.entries[chunk],
            accusers=accusers,
        )
        names = "; ".join(" or ".join(f"member {i}" for i in sorted(group)) for group in blamed)
        self._reason = f"chunk {chunk} did not come through as it was sent, by the doing of {names}"
        return blamed

    def _check_compared(self, digests: Sequence[bytes]) -> None:
        """Compare the digests of what has arrived at each member, empty where they are not known.

        Raises:
            AttemptFailed: they differ. Members would draw different conclusions from it, and go on with
                different others.
        """
        if {self._compared, b""}.issuperset(digests):
            return
        present = frozenset(range(self.n)) - self._lost
        raise AttemptFailed(
            f"one of the members {', '.join(map(str, sorted(present)))} has sent different messages to "
            "different members when they looked for what went wrong",
            self._lost,
            [present],
            fatal=True,
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
