"""One attempt at an anonymous sum, as one member plays it.

A generator that yields what it sends and is sent what arrived. It knows neither sockets nor clocks, so that
any number of members can be played in one process, with any message changed on its way. Its phases, in order:

    announce   fresh public keys; commitments to what is revealed later; what is summed, and whether it was
               settled before. Signed
    reveal     a contribution to the beacon, and a signed digest of all announcements: from here on everything
               is bound to the beacon and to announcements that are the same for all
    hop 0..L   the cells, from their sources through L relays to the owners of chunks
    collect    owners publish signed lists of the serials that they have summed, with digests of the masked
               sums; each owner's backup gets its masked sums
    confirm    each member signs the lists, or complains. All signatures together are the certificate that
               commits the set; before it nobody can unmask anything
    unmask     the secrets of the self masks; before that each member writes its settled mark
    sums       owners send the opened sums to all; the relays of a chunk compare them with the list
    challenge  contributions to the key of the comparison
    done       each member signs the keyed digest of all sums that it has received; nobody leaves before all
               have the same

Where something goes wrong, the members that are left exchange what they have seen and what they have been
sent (`recover`), until all agree on who is lost. Then either all go on with the set of the certificate, if
one of them has it:

    secrets    all secrets of self masks that members know, so that those of lost members are not missing
    masked     owners, or the backups of lost ones, send the masked sums, which all check and open themselves
    redone     whom each member accuses; nobody leaves before all have the sums

or all give the attempt up (`void`), after revealing their transcripts if a chunk was spoiled (`blame`). Who
is left out of the next attempt follows from what has arrived in these phases, so in the last ones members
compare digests of it: where it differs, the run ends. It ends too for a member that is still in an
attempt when another one has left it. If it ends for one, it ends for all (`attempts.Attempts.agree`): no
honest member must go on in a set in which all others lie.

Agreement. All honest members that end with a sum have the same: a sum that was opened by `masked` follows
from the lists, which the certificate fixes. A sum that was opened by `sums` is signed by all that are left,
and an honest member that has signed one total leaves with that one, or with another only if all members are
still here, so that nobody has left with the first (`_settle_difference`). Nobody goes on without a member
that it hears and that no two signatures convict (`recovery.contradictions`).
"""

import numpy as np

from fedspeed.routing.anonymous.certificate import Certificate
from fedspeed.routing.anonymous.crypto import digest
from fedspeed.routing.anonymous.paths import backup_of
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed, MembersLost, Misbehaviour, Phase
from fedspeed.routing.anonymous.recovery import (
    NO_CHUNK,
    NO_LISTS,
    RecoveryMessage,
    contradictions,
    groups_at_fault,
)
from fedspeed.routing.anonymous.unmasking import OpeningMember, owner_without_backup

# Recovery rounds in which members may contradict each other about who is lost. One is enough for all to hear
# of a loss.
_MAX_DISAGREEMENTS = 2


class Member(OpeningMember):
    """A member that plays one attempt from the first phase to the last."""

    def run(self) -> Phase[AgreedSum]:
        """Play the attempt.

        Raises:
            AttemptFailed: there is no sum.
        """
        try:
            yield from self._until_committed()
            return (yield from self._open())
        except MembersLost as loss:
            self._lose(loss)
        except Misbehaviour as fault:
            # The others have not seen it, and would take this member for lost if it just left.
            self._accuse(fault)
        for _ in range(2 * self.n):
            try:
                yield from self._recover()
                return (yield from self._open_together())
            except MembersLost as loss:
                self._lose(loss)
        raise AttemptFailed(
            "the members cannot agree on who is lost",
            self._lost,
            self._blamed_by_this_member(),
            fatal=True,
            settled=self.me in self._self_secrets,
        )

    def _accuse(self, fault: Misbehaviour) -> None:
        self._accused |= fault.members - {self.me}
        self._reason = str(fault)

    def _until_committed(self) -> Phase[None]:
        """Play the phases after which one set of updates is committed."""
        yield from self._announce()
        yield from self._reveal()
        self._choose_integers()
        yield from self._relay_cells()
        yield from self._collect()
        yield from self._confirm()

    def _open(self) -> Phase[AgreedSum]:
        """Open the committed set while nobody is lost and nothing is wrong."""
        yield from self._unmask()
        self._total = yield from self._gather_sums()
        self._check_sums(self._total)
        yield from self._compare_totals(self._total)
        return self._agreed(self._total, [])

    def _open_together(self) -> Phase[AgreedSum]:
        """Open the committed set after a loss or a fault. Members that are lost by now stay in the sum."""
        yield from self._share_secrets()
        owner = owner_without_backup(self._lost, self.n)
        if owner is not None:
            raise AttemptFailed(
                f"members {owner} and {backup_of(owner, self.n)}, who both stored the same sums, are lost",
                self._lost,
                fatal=True,
                settled=True,
            )
        total = yield from self._open_masked_sums()
        accusations = yield from self._settle_difference(total)
        return self._agreed(total, groups_at_fault(accusations))

    def _agreed(self, total: np.ndarray, groups: list[frozenset[int]]) -> AgreedSum:
        others = [group for group in groups if not group & self.statements.convicted]
        return AgreedSum(
            total[: self.parameters.length],
            self.parameters.members,
            skip_reasons=self.skip_reasons,
            lost=self._lost,
            blamed=(*self.statements.convictions, *others),
            convicted=frozenset(self.statements.convicted),
        )

    # When members are lost, or something is wrong.

    def _lose(self, loss: MembersLost) -> None:
        """Note that members are lost.

        Raises:
            AttemptFailed: one of them is not lost, but has ended the attempt. Going on without it could lead
                an honest member into a set in which all others lie.
        """
        left = loss.ahead | (loss.members & self._agreeing)
        if left:
            names = ", ".join(map(str, sorted(left)))
            raise AttemptFailed(
                f"member {names} has ended the attempt or the run, and member {self.me} has not",
                self._lost,
                fatal=True,
                settled=self.me in self._self_secrets,
            )
        self._lost |= loss.members

    def _recover(self) -> Phase[None]:
        """Agree with the members that are left on who is lost, and on whether the set was committed.

        Raises:
            AttemptFailed: it was not, or too few members are left.
        """
        answers = yield from self._agree_on_lost()
        if self._certificate is not None:
            return
        blamed = yield from self._find_faults(answers)
        yield from self._leave()
        default = (
            "members were lost before the sum was committed"
            if self._lost
            else "a member has given up the attempt"
        )
        raise AttemptFailed(self._reason or default, self._lost, blamed)

    def _find_faults(self, answers: dict[int, RecoveryMessage]) -> Phase[list[frozenset[int]]]:
        """Return sets of members with at least one at fault in each, of an attempt that has no certificate.

        Args:
            answers: what each member that is left says.
        """
        convicted = self.statements.convicted
        if convicted:
            names = ", ".join(f"member {i}" for i in sorted(convicted))
            self._reason = f"{names} signed different messages for different members"
            return self.statements.convictions
        complaints = {i: answer.complaint for i, answer in answers.items()}
        chunk = min(complaints.values())
        if not self._lost and NO_LISTS not in complaints.values() and chunk < self.plan.chunks:
            return (yield from self._blame(chunk, frozenset(i for i, c in complaints.items() if c == chunk)))
        pairs = [frozenset({self.me, i}) for i in sorted(self._suspects)]
        return [*groups_at_fault({i: answer.accused for i, answer in answers.items()}), *pairs]

    def _agree_on_lost(self) -> Phase[dict[int, RecoveryMessage]]:
        """Repeat the phase `recover` until all members that are left name the same lost ones; return what
        each of them says. Takes over a certificate if another member has one.

        Nobody is lost because somebody says so: each member waits for it and hears nothing, or has seen two
        signatures that convict it. If members still differ after that, the run ends.
        """
        disagreements = 0
        while True:
            known = len(self.statements.convicted)
            self._lost |= self.statements.convicted - {self.me}
            left = self.n - len(self._lost)
            if left < self.parameters.threshold:
                raise AttemptFailed(
                    f"only {left} of {self.n} members are left, {self.parameters.threshold} are needed",
                    self._lost,
                    [*self.statements.convictions, *self._contradictions],
                    fatal=True,
                )
            lost = self._lost
            messages = yield from self._broadcast("recover", self._recovery_message().pack(self.n))
            self._agreeing = frozenset()  # whoever answers here has not left
            present = {i: message for i, message in enumerate(messages) if i not in lost}
            answers = {i: RecoveryMessage.unpack(message, self.n) for i, message in present.items()}
            for answer in answers.values():
                self.statements.merge(answer.statements)
                self._adopt(answer.certificate)
            self._convict_by_secrets()
            convicted = self.statements.convicted
            claims = {i: answer.lost - {i} for i, answer in answers.items()}
            if convicted <= lost | {self.me} and all(claim == lost for claim in claims.values()):
                self._compared = digest(b"answers", *present.values())
                return answers
            # Others may not have seen the proof yet that has just convicted a member here.
            disagreements = 0 if len(convicted) > known else disagreements + 1
            self._contradictions = contradictions(claims)
            if self._contradictions and disagreements >= _MAX_DISAGREEMENTS:
                pairs = (" and ".join(map(str, sorted(pair))) for pair in self._contradictions)
                raise AttemptFailed(
                    f"of the members {'; '.join(pairs)} one does not answer the other",
                    self._lost,
                    self._contradictions,
                    fatal=True,
                )

    def _recovery_message(self) -> RecoveryMessage:
        complaint = min(self.complaints, default=NO_CHUNK) if self._lists_digest else NO_LISTS
        return RecoveryMessage(
            self._lost,
            self._accused,
            complaint=complaint,
            certificate=self._certificate,
            statements=self.statements.pack(),
        )

    def _adopt(self, certificate: Certificate | None) -> None:
        """Take over another member's certificate if it is valid for the lists that this member has seen."""
        if certificate is None or self._certificate is not None or not self._lists_digest:
            return
        if not certificate.invalid_members(self.parameters.members, self.context, self._lists_digest):
            self._certificate = certificate
