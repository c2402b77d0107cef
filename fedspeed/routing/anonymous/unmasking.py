"""The second half of an attempt, as one member plays it: a committed set of updates is opened.

`protocol` says what each phase is for. There are two ways. If nobody is lost and nothing is wrong, owners
open their chunks and the relays of each chunk's path check them. Else owners, or their backups, send the
masked sums, and every member checks and opens all of them itself.
"""

from collections.abc import Callable, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.routing.anonymous.announcement import commit_to_contribution, commit_to_secret
from fedspeed.routing.anonymous.commitment import CommittingMember
from fedspeed.routing.anonymous.crypto import DIGEST, KEY, digest, keyed_digest
from fedspeed.routing.anonymous.lists import has_sum
from fedspeed.routing.anonymous.masks import remove_self_masks, restore_self_masks
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.paths import PathPlan, backup_of
from fedspeed.routing.anonymous.phases import AttemptFailed, MembersLost, Misbehaviour, Phase, as_message
from fedspeed.routing.anonymous.recovery import MEMBER_SET, pack_members, unpack_members
from fedspeed.routing.anonymous.settlement import NO_MARK
from fedspeed.routing.buffer_pool import BUFFERS
from fedspeed.routing.transport import as_bytes


class OpeningMember(CommittingMember):
    """A member after the commitment: the phases `unmask`, `sums`, `challenge` and `done`, and after a loss or
    a fault `secrets`, `masked` and `redone`.
    """

    def __init__(
        self,
        parameters: PublicParameters,
        me: int,
        identity: Ed25519PrivateKey,
        integers: Callable[[], np.ndarray],
        *,
        mark: bytes = NO_MARK,
        settle: Callable[[], None] = lambda: None,
    ):
        """Draw the keys and secrets of this attempt.

        Args:
            parameters, me, identity, integers, mark: see `CommittingMember`.
            settle: called once the set is committed, before the secret of the self mask leaves: writes the
                settled mark.
        """
        super().__init__(parameters, me, identity, integers, mark=mark)
        self._settle = settle
        self._self_secrets: dict[int, bytes] = {}  # of the self masks, by member
        self._total: np.ndarray | None = None  # as the owners have opened it: [chunks * chunk_length] uint32
        self._has_signed = False  # whether this member has signed that total

    # If nobody is lost and nothing is wrong.

    def _unmask(self) -> Phase[None]:
        """Reveal this member's self mask secret, and take those of all members."""
        if not self.parameters.masked:
            return
        own = self._reveal_own_secret()
        content = commit_to_secret(own)
        messages = yield from self._broadcast("unmask", own + self._sign("unmask", content))
        self._take_secrets([message[:KEY] for message in messages])
        for i, message in enumerate(messages):
            reason = f"member {i} did not sign the secret of its self mask"
            self._receive("unmask", i, commit_to_secret(message[:KEY]), message[KEY:], reason)
        if false := self._convict_by_secrets():
            raise Misbehaviour(
                f"member {false[0]} revealed another secret of its self mask than it had committed to", *false
            )

    def _reveal_own_secret(self) -> bytes:
        """Return this member's secret, which may leave from now on."""
        if self.me not in self._self_secrets:
            if not self.skip_reasons:  # zeros may be summed as often as anybody likes
                self._settle()
            self._self_secrets[self.me] = self._self_secret
        return self._self_secrets[self.me]

    def _take_secrets(self, secrets: Sequence[bytes]) -> None:
        """Keep secrets of self masks that are the committed ones.

        Args:
            secrets: by member; zeros or nothing for one that is not known.
        """
        for i, secret in enumerate(secrets):
            if commit_to_secret(secret) == self.announced[i].secret_commitment:
                self._self_secrets[i] = secret

    def _convict_by_secrets(self) -> list[int]:
        """Convict the members that have signed another secret than they had committed to; return them."""
        false = [
            i
            for i, announced in enumerate(self.announced)
            if self.statements.content("unmask", i) not in (None, announced.secret_commitment)
        ]
        self.statements.convicted.update(false)
        return false

    def _gather_sums(self) -> Phase[np.ndarray]:
        """Open this member's chunks and exchange the sums: [chunks * chunk_length] uint32."""
        owned = [self.plan.owned(i) for i in range(self.n)]
        return (yield from self._exchange_sums("sums", owned, opened=True))

    def _exchange_sums(
        self, phase: str, chunks: Sequence[Sequence[int]], *, opened: bool
    ) -> Phase[np.ndarray]:
        """Send the sums of chunks to all, and return those of all chunks in their order:
        [chunks * chunk_length] uint32.

        Args:
            chunks: by member, those whose sums it sends. opened: whether self masks are taken off first.
        """
        length = self.plan.chunk_length
        own = BUFFERS.take(len(chunks[self.me]), length, dtype=np.uint32)
        for chunk, integers in zip(chunks[self.me], own):
            integers[:] = self.sums[chunk]
            if opened:
                remove_self_masks(self.cipher, self._self_secrets, chunk, integers)
        payloads = yield self._swap_with_all(
            phase, own.reshape(-1).view(np.uint8), [4 * length * len(sent) for sent in chunks]
        )
        total = BUFFERS.take(self.plan.chunks * length, dtype=np.uint32)
        for i, payload in enumerate(payloads):
            data = as_bytes(payload)
            for at, chunk in enumerate(chunks[i]):
                integers = data[4 * length * at : 4 * length * (at + 1)].view(np.uint32)
                self._chunk_of(total, chunk)[:] = integers
        return total

    def _chunk_of(self, total: np.ndarray, chunk: int) -> np.ndarray:
        length = self.plan.chunk_length
        return total[chunk * length : (chunk + 1) * length]

    def _check_sums(self, total: np.ndarray) -> None:
        """Recompute the masked sums of the chunks that this member has to check, and compare them with what
        their owners have signed.

        Raises:
            Misbehaviour: an owner has opened another sum than it has listed.
        """
        masked = BUFFERS.take(self.plan.chunk_length, dtype=np.uint32)
        for chunk in chunks_to_check(self.plan, self.me):
            masked[:] = self._chunk_of(total, chunk)
            restore_self_masks(self.cipher, self._self_secrets, chunk, masked)
            if not has_sum(self.entries[chunk], masked):
                owner = self.plan.owner(chunk)
                raise Misbehaviour(
                    f"owner {owner} opened another sum of chunk {chunk} than it had listed", owner
                )

    def _compare_totals(self, total: np.ndarray) -> Phase[None]:
        """Check that all members have received the same sums.

        The totals are compared by a keyed digest. All contribute to its key, and reveal their contributions
        only now: no owner could know it when it sent its sums.

        Raises:
            Misbehaviour: they have not.
        """
        contributions = yield from self._broadcast("challenge", self._comparison)
        for i, contribution in enumerate(contributions):
            if commit_to_contribution(contribution) != self.announced[i].comparison_commitment:
                raise Misbehaviour(
                    f"member {i} revealed another contribution to the comparison than it had committed to", i
                )
        key = digest(b"comparison", self.context, *contributions)
        content = digest(b"total", keyed_digest(key, total.view(np.uint8).data))
        self._has_signed = True
        messages = yield from self._last_broadcast("done", content + self._sign("done", content))
        for i, message in messages.items():
            reason = f"member {i} did not sign its total"
            self._receive("done", i, message[:KEY], message[KEY:], reason)
            if message[:KEY] != content:
                self._suspects.add(i)
                raise Misbehaviour(f"members {self.me} and {i} have received different sums")

    # After a loss or a fault.

    def _share_secrets(self) -> Phase[None]:
        """Give all members that are left every secret of a self mask that this member knows.

        Raises:
            AttemptFailed: nobody that is left knows the secret of a lost member.
        """
        if not self.parameters.masked:
            return
        self._reveal_own_secret()
        known = b"".join(self._self_secrets.get(i, bytes(KEY)) for i in range(self.n))
        for message in (yield from self._broadcast("secrets", known)):
            self._take_secrets([message[start : start + KEY] for start in range(0, len(message), KEY)])
        if missing := sorted(set(range(self.n)) - self._self_secrets.keys()):
            self._accused |= frozenset(missing) - self._lost  # they answer, without their own secret
            yield from self._leave()
            names = ", ".join(map(str, missing))
            raise AttemptFailed(
                f"the self mask of member {names} is not known to those that are left, so that the committed "
                "sum cannot be opened",
                self._lost,
                self._blamed_by_this_member(),
                settled=True,
            )

    def _open_masked_sums(self) -> Phase[np.ndarray]:
        """Exchange the masked sums, check all of them, and open them: [chunks * chunk_length] uint32.

        Raises:
            MembersLost: a member has sent another sum than was listed; its backup is asked next.
        """
        chunks = [chunks_to_send(self.plan, i, self._lost) for i in range(self.n)]
        total = yield from self._exchange_sums("masked", chunks, opened=False)
        false = {
            i
            for i, sent in enumerate(chunks)
            for chunk in sent
            if not has_sum(self.entries[chunk], self._chunk_of(total, chunk))
        }
        if false:
            raise MembersLost(frozenset(false))
        for chunk in range(self.plan.chunks):
            remove_self_masks(self.cipher, self._self_secrets, chunk, self._chunk_of(total, chunk))
        return total

    def _settle_difference(self, total: np.ndarray) -> Phase[dict[int, frozenset[int]]]:
        """Compare the sums that owners had opened with the right ones; return whom each member accuses.

        Raises:
            AttemptFailed: a member that is no longer here may have ended with another total.
        """
        if self._total is not None and not np.array_equal(total, self._total):
            if self._has_signed and self._lost:
                raise AttemptFailed(
                    "this member has confirmed other sums than are right, and members that have left may "
                    "have ended with these",
                    self._lost,
                    fatal=True,
                    settled=True,
                )
            self._accused |= {
                self.plan.owner(chunk)
                for chunk in range(self.plan.chunks)
                if not np.array_equal(self._chunk_of(total, chunk), self._chunk_of(self._total, chunk))
            }
        messages = yield from self._last_broadcast("redone", pack_members(self._accused))
        return {i: unpack_members(message[:MEMBER_SET], self.n) for i, message in messages.items()}

    # Ends of an attempt.

    def _blamed_by_this_member(self) -> list[frozenset[int]]:
        """Return the members that are convicted, alone, and those that this one accuses, with itself."""
        accused = sorted(self._accused - self.statements.convicted)
        return [*self.statements.convictions, *(frozenset({self.me, i}) for i in accused)]

    def _last_broadcast(self, phase: str, message: bytes) -> Phase[dict[int, bytes]]:
        """Send one message to all, and return those that arrive: a member that is lost here no longer
        matters.
        """
        try:
            messages = yield from self._broadcast(phase, message)
            self._note_agreeing(phase, message, messages)
        except MembersLost as loss:
            messages = [as_message(payload) for payload in loss.arrived]
            self._note_agreeing(phase, message, messages)
            if loss.recovering or loss.ahead or not loss.arrived:
                raise
        return {i: found for i, found in enumerate(messages) if len(found) == len(message)}

    def _note_agreeing(self, phase: str, own: bytes, messages: Sequence[bytes]) -> None:
        """Note which members have said their last word, if it is one with which they may leave."""
        self._agreeing = frozenset(
            i
            for i, message in enumerate(messages)
            if i != self.me
            and len(message) == len(own)
            and (phase == "redone" or message[:DIGEST] == own[:DIGEST])
        )

    def _leave(self) -> Phase[None]:
        """Wait until all give the attempt up, for the same reasons.

        Raises:
            AttemptFailed: the others draw other conclusions.
        """
        messages = yield from self._last_broadcast("void", self._compared)
        self._check_compared(list(messages.values()))


def chunks_to_check(plan: PathPlan, member: int) -> list[int]:
    """Return the chunks whose opened sums a member checks: those that it has relayed; without relays, those
    that it stores as a backup.
    """
    if not plan.relays:
        return [
            chunk
            for i in range(plan.members)
            if backup_of(i, plan.members) == member
            for chunk in plan.owned(i)
        ]
    return [chunk for hop in range(plan.relays) for chunk in plan.chunks_at(hop, member)]


def chunks_to_send(plan: PathPlan, member: int, lost: frozenset[int]) -> list[int]:
    """Return the chunks whose masked sums a member sends: its own, and those of lost owners whose backup it
    is.
    """
    if member in lost:
        return []
    owners = (member, *(owner for owner in lost if backup_of(owner, plan.members) == member))
    return sorted(chunk for owner in owners for chunk in plan.owned(owner))


def owner_without_backup(lost: frozenset[int], members: int) -> int | None:
    """Return a lost owner whose backup is lost too; None if there is none."""
    return next((owner for owner in lost if backup_of(owner, members) in lost), None)
