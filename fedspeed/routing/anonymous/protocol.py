"""One attempt at an anonymous sum, as one member plays it.

A generator that yields what it sends and is sent what arrived. It knows neither sockets nor clocks, so that
any number of members can be played in one process, with any message changed on its way. Its phases, in order:

    announce   fresh public keys, signed with the identity key; a commitment to a contribution to the beacon,
               and one to the secret of the self mask
    reveal     the contribution; a share of that secret for each member, sealed to it. From here on everything
               is bound to the beacon
    hop 0..L   the cells, from their sources through L relays to the owners of chunks
    collect    owners publish signed lists of the serials that they have summed, with digests of the sums;
               each owner's backup gets its sums
    vote       each member reports whether its own cells are listed, once each, and which lists it has
               received: this catches owners that equivocate
    confirm    each member signs the lists. All signatures together are the certificate that commits the set;
               before it nobody can unmask anything
    unmask     the secrets of the self masks; shares of those of lost members
    sums       owners send the unmasked sums to all
    done       nobody leaves before all have them

Two more phases are played where something goes wrong. If a chunk was spoiled before the certificate, all
reveal their transcripts of it (`blame`), and the attempt fails with whoever is at fault. If a member is lost,
or has seen another one misbehave, the members that are left agree on who is lost (`recover`). Then either all
go on with the set of the certificate, if one of them has it, or all give the attempt up (`void`).
"""

import itertools
from collections.abc import Callable, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.routing.anonymous import ring, shamir
from fedspeed.routing.anonymous.announcement import commit_to_secret
from fedspeed.routing.anonymous.certificate import Certificate
from fedspeed.routing.anonymous.commitment import CommittingMember
from fedspeed.routing.anonymous.crypto import KEY
from fedspeed.routing.anonymous.masks import remove_self_masks, remove_self_masks_from_scalar
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.paths import backup_of
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed, MembersLost, Misbehaviour, Phase
from fedspeed.routing.anonymous.recovery import (
    MEMBER_SET,
    RecoveryMessage,
    groups_at_fault,
    members_to_exclude,
    pack_members,
)
from fedspeed.routing.anonymous.unmasking import chunks_to_unmask, owner_without_backup, reconstruct_secret
from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.transport import as_bytes

# Recovery rounds in which members may differ about who is lost. One is enough for all to hear of a loss.
_MAX_DISAGREEMENTS = 2


class Member(CommittingMember):
    """A member that plays one attempt from the first phase to the last."""

    def __init__(
        self,
        parameters: PublicParameters,
        me: int,
        identity: Ed25519PrivateKey,
        integers: Callable[[], np.ndarray],
    ):
        """Draw the keys and secrets of this attempt.

        Args:
            me: this member's number.
            identity: the private key of `parameters.members[me]`.
            integers: called once all have revealed; returns what this member adds to the sum: [length]
                uint32.
        """
        super().__init__(parameters, me, identity)
        self._get_integers = integers
        self._accused: frozenset[int] = frozenset()  # members that have misbehaved in a message to this one
        self._reason = ""  # why this member has given up the attempt

    def run(self) -> Phase[AgreedSum]:
        """Play the attempt.

        Raises:
            AttemptFailed: there is no sum.
        """
        try:
            yield from self._until_committed()
            return (yield from self._finish())
        except MembersLost as loss:
            self._lost |= loss.members
        except Misbehaviour as fault:
            # The others have not seen it, and would take this member for lost if it just left.
            self._accused = fault.members - {self.me}
            self._reason = str(fault)
        for _ in range(2 * self.n):
            try:
                yield from self._recover()
                return (yield from self._finish())
            except MembersLost as loss:
                self._lost |= loss.members
        raise AttemptFailed("the members cannot agree on who is lost", self._lost, fatal=True)

    def _until_committed(self) -> Phase[None]:
        """Play the phases after which one set of updates is committed."""
        yield from self._announce()
        yield from self._reveal()
        self.integers = self._get_integers()
        assert self.integers.dtype == np.uint32 and len(self.integers) == self.parameters.length
        yield from self._relay_cells()
        yield from self._collect()
        yield from self._vote()
        yield from self._confirm()

    def _finish(self) -> Phase[AgreedSum]:
        """Unmask the committed set. Members that are lost by now stay in the sum."""
        self_secrets = yield from self._unmask()
        total = yield from self._gather_sums(self_secrets)
        self._check_total(total, self_secrets)
        yield from self._leave("done")
        return AgreedSum(total, self.parameters.members)

    # After the commitment.

    def _unmask(self) -> Phase[Mapping[int, bytes]]:
        """Reveal this member's self mask secret and its shares of those of lost members; return the secrets
        of all members.
        """
        if not self.parameters.masked:
            return {}
        shares = b"".join(shamir.to_bytes(self._shares[i] if i in self._lost else 0) for i in range(self.n))
        messages = yield from self._broadcast("unmask", self._self_secret + shares)
        present = {i: message for i, message in enumerate(messages) if i not in self._lost}
        commitments = [announcement.secret_commitment for announcement in self.announced]
        found = {i: message[:KEY] for i, message in present.items()}
        for lost in self._lost:
            start = KEY * (1 + lost)
            held = {i: shamir.from_bytes(message[start : start + KEY]) for i, message in present.items()}
            found[lost] = reconstruct_secret(held, self.parameters.threshold, commitments[lost])
        for i, secret in found.items():
            if commit_to_secret(secret) == commitments[i]:
                continue
            if i in self._lost:
                raise AttemptFailed(
                    f"the shares of member {i}'s secret do not fit together: somebody revealed another one "
                    "than it was given",
                    fatal=True,
                )
            raise MembersLost(frozenset({i}))  # the others hold shares of the secret it has committed to
        return found

    def _gather_sums(self, self_secrets: Mapping[int, bytes]) -> Phase[np.ndarray]:
        """Unmask this member's chunks and exchange the sums: [length] uint32."""
        length = self.plan.chunk_length
        chunks = [chunks_to_unmask(self.plan, i, self._lost) for i in range(self.n)]
        own = BUFFERS.take(len(chunks[self.me]), length, dtype=np.uint32)
        for chunk, integers in zip(chunks[self.me], own):
            integers[:] = self.sums[chunk]
            remove_self_masks(self.cipher, self_secrets, chunk, integers)
        payloads = yield self._swap_with_all(
            "sums", own.reshape(-1).view(np.uint8), [4 * length * len(chunks[i]) for i in range(self.n)]
        )
        total = BUFFERS.take(self.plan.chunks * length, dtype=np.uint32)
        for i, payload in enumerate(payloads):
            data = as_bytes(payload)
            for at, chunk in enumerate(chunks[i]):
                integers = data[4 * length * at : 4 * length * (at + 1)].view(np.uint32)
                total[chunk * length : (chunk + 1) * length] = integers
        return total[: self.parameters.length]

    def _check_total(self, total: np.ndarray, self_secrets: Mapping[int, bytes]) -> None:
        """Compare the checksum of the total with the sum of the members' checksums.

        The coefficients of the checksum follow from the digests of the sums, so that an owner had to choose
        its sums before it could know them.

        Raises:
            AttemptFailed: they differ.
        """
        if self.masks is None:
            return
        assert self._certificate is not None, "only a committed set is unmasked"
        expected = remove_self_masks_from_scalar(self_secrets, sum(self._certificate.scalars))
        if expected != ring.linear_checksum(total, self._coefficients()):
            raise AttemptFailed("the sums that the owners gave are not those of what was sent", fatal=True)

    # When members are lost.

    def _recover(self) -> Phase[None]:
        """Agree with the members that are left on who is lost, and on whether the set was committed.

        Raises:
            AttemptFailed: it was not, or too few members are left.
        """
        accusations = yield from self._agree_on_lost()
        if self._certificate is None:
            yield from self._leave("void")
            default = (
                "members were lost before the sum was committed"
                if self._lost
                else "a member has given up the attempt"
            )
            blamed = [*groups_at_fault(accusations), *self._conflicts]
            raise AttemptFailed(self._reason or default, self._lost, blamed)
        owner = owner_without_backup(self._lost, self.n)
        if owner is not None:
            raise AttemptFailed(
                f"members {owner} and {backup_of(owner, self.n)}, who both stored the same sums, are lost",
                self._lost,
                fatal=True,
            )

    def _agree_on_lost(self) -> Phase[dict[int, frozenset[int]]]:
        """Repeat the phase `recover` until all members that are left name the same lost ones; return whom
        each of them accuses. Takes over a certificate if another member has one.

        Nobody is lost because somebody says so: each member waits for it and hears nothing. Where members
        still differ after that, `members_to_exclude` decides.
        """
        for disagreements in itertools.count(1):
            left = self.n - len(self._lost)
            if left < self.parameters.threshold:
                raise AttemptFailed(
                    f"only {left} of {self.n} members are left, {self.parameters.threshold} are needed",
                    self._lost,
                    fatal=True,
                )
            lost = self._lost
            own = RecoveryMessage(lost, self._accused, self._certificate)
            messages = yield from self._broadcast("recover", own.pack(self.n))
            present = {i: message for i, message in enumerate(messages) if i not in lost}
            answers = {i: RecoveryMessage.unpack(message, self.n) for i, message in present.items()}
            for answer in answers.values():
                self._adopt(answer.certificate)
            if all(message[:MEMBER_SET] == pack_members(lost) for message in present.values()):
                return {i: answer.accused for i, answer in answers.items()}
            if disagreements >= _MAX_DISAGREEMENTS:
                self._lost |= members_to_exclude({i: answer.lost for i, answer in answers.items()})
                if self.me in self._lost:
                    raise AttemptFailed(
                        "the others take this member for lost", self._lost - {self.me}, fatal=True
                    )
        raise AssertionError("unreachable: the loop ends by return or raise")

    def _adopt(self, certificate: Certificate | None) -> None:
        """Take over another member's certificate if it is valid for the lists that this member has seen."""
        if certificate is None or self._certificate is not None or not self._lists_digest:
            return
        if not self._invalid_members(certificate):
            self._certificate = certificate

    def _leave(self, phase: str) -> Phase[None]:
        """Wait until all know how the attempt ends. A member that is lost here no longer matters."""
        try:
            yield from self._broadcast(phase, b"!")
        except MembersLost as loss:
            if loss.recovering:
                raise
