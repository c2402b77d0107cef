"""Attempts at a sum over a transport, one after the other, until one succeeds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.errors import FedSpeedError, LostPeerError
from fedspeed.log import LOG
from fedspeed.routing.anonymous.crypto import digest
from fedspeed.routing.anonymous.deadlines import Deadlines
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed, MembersLost, Payload, Swap
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.anonymous.settlement import (
    NO_MARK,
    Mark,
    MemoryMarks,
    SettledMarks,
    announced_mark,
    set_digest,
)
from fedspeed.routing.config import MODES, RoutingConfig
from fedspeed.routing.transport import PeersLost, Transport, swap_among

# The number of a phase on the wire is its place here. 0 is the recovery: transports tell by it that a peer
# waits for the others (`Transport.swap`).
PHASES = (
    "recover",
    "announce",
    "reveal",
    *(f"hop {hop}" for hop in range(8)),
    "collect",
    "confirm",
    "blame",
    "unmask",
    "sums",
    "challenge",
    "done",
    "secrets",
    "masked",
    "redone",
    "void",
)

# Phases in which a member has all that it needs: one that is silent there ends the next attempt.
LAST_PHASES = ("done", "redone", "void")


@dataclass(frozen=True, kw_only=True)
class Summand:
    """What this participant adds to one sum, in as many attempts as it takes.

    Attributes:
        number, label, state: of the exchange; see `Exchange.start`.
        title: of the exchange, for messages; empty: its number is shown.
        length: how many 32-bit integers are summed. integers: returns this participant's.
        vector: digest of what the integers stand for; empty for exact sums, which have no settled marks.
        marks: where its mark is stored.
    """

    number: int
    label: str
    length: int
    integers: Callable[[], np.ndarray]
    state: bytes = b""
    vector: bytes = b""
    title: str = ""
    marks: SettledMarks = field(default_factory=MemoryMarks)

    @property
    def name(self) -> str:
        """How messages call the sum."""
        return self.title or f"exchange {self.number}"

    @property
    def subject(self) -> bytes:
        """The digest by which participants compare what they sum."""
        return digest(b"subject", repr((self.number, self.label, self.length)).encode(), self.state)

    def announced_mark(self) -> bytes:
        """Return what is announced of this participant's mark."""
        return announced_mark(self.marks.get(self.label), self.vector) if self.vector else NO_MARK

    def settle(self, members: bytes) -> None:
        """Store the mark of a sum over this set of members (`settlement.set_digest`)."""
        if self.vector:
            self.marks.put(self.label, Mark(members, self.vector))


class Attempts:
    """Makes attempts, each without the participants that were lost or convicted before.

    Participants have two numbers: that of the transport, and their place among those that are left, by which
    the members of an attempt are numbered.

    Attributes:
        arrived: when all had arrived at the current exchange (time.perf_counter); set to None before one.
        summed: how many participants are in the last sum.
    """

    def __init__(
        self,
        transport: Transport,
        config: RoutingConfig,
        identity: Ed25519PrivateKey,
        roster: Sequence[bytes],
        settings: bytes,
        *,
        names: Sequence[str] = (),
    ):
        """Begin with all participants of the transport. The arguments are those of `AnonymousExchange`."""
        self.arrived: float | None = None
        self.summed = transport.size
        self._transport = transport
        self._config = config
        self._identity = identity
        self._roster = tuple(roster)
        self._settings = settings
        self._are_named = bool(names)
        self._all_names = tuple(names) or tuple(map(str, range(transport.size)))
        self._present = list(range(transport.size))  # transport numbers of those that are left
        self._made = 0  # attempts so far
        self._deadlines = Deadlines(config.step_deadline_s, config.deadline_s)
        self._begun = False  # whether all have begun the current sum: none is still training

    @property
    def max_wait_s(self) -> float:
        """Seconds that no sum exceeds once all have begun it: each phase of each attempt has a deadline."""
        return self._deadlines.longest_sum_s(self._config.attempts, self._transport.size)

    @property
    def present(self) -> tuple[int, ...]:
        """Transport numbers of the participants that are left."""
        return tuple(self._present)

    def next_step(self) -> tuple[int, int]:
        """Return the step of a swap outside of a sum: an attempt of its own, so that no late message of an
        earlier one is taken for it.
        """
        self._made += 1
        return (self._made, PHASES.index("announce"))

    def agree(self, summand: Summand) -> AgreedSum:
        """Make attempts until one gives a sum; each leaves out whoever was lost or convicted in the one
        before.

        If none does, all others hear that this participant ends the run, and end it too. Otherwise members
        that lie could make honest ones give up one by one, and sum the update of the last one alone.

        Raises:
            LostPeerError: too few participants are left, or no attempt succeeded.
            FedSpeedError: the others have convicted this participant.
        """
        try:
            return self._agree(summand)
        except FedSpeedError:
            self._transport.end_run()
            raise

    def _agree(self, summand: Summand) -> AgreedSum:
        reasons: list[str] = []
        self._begun = self.arrived is not None
        self._deadlines.begin_sum()
        threshold = len(self._roster) // 2 + 1
        needed = max(threshold, self._config.min_participants)
        for _ in range(self._config.attempts):
            if len(self._present) < needed:
                raise LostPeerError(
                    f"{len(self._present)} of {len(self._roster)} participants are left, fewer than the "
                    f"{needed} that a sum needs ({'; '.join(reasons)}); the same command goes on from the "
                    "journal"
                )
            self._made += 1
            try:
                agreed = self._attempt(summand, threshold)
                self._note_blame(agreed, summand)
                return agreed
            except AttemptFailed as failure:
                reasons.append(self._describe(failure))
                if failure.fatal:
                    break
                self._exclude(failure)
                LOG.info(f"{summand.name}: {reasons[-1]}; once more with fresh masks")
        raise LostPeerError(
            f"the exchange failed: {'; '.join(reasons)}; the same command goes on from the journal"
        )

    def _note_blame(self, agreed: AgreedSum, summand: Summand) -> None:
        """Report who is at fault although there is a sum; leave out whom all take for lost or have convicted.

        Those that are only accused stay, even if all accuse them: accusations may have reached some only, and
        all must go on with the same participants.
        """
        self.summed = len(agreed.members)
        if agreed.skip_reasons:
            names = self._names(agreed.skip_reasons, ", ")
            LOG.info(
                f"{summand.name}: participants {names} have taken part in an earlier sum for it, over other "
                "participants. The difference of two sums could be a single update: nobody adds one now"
            )
        for group in agreed.blamed:
            LOG.info(
                f"{summand.name}: the sum is right in spite of a fault of participants {self._names(group)}"
            )
        lost = {self._present[i] for i in agreed.lost}
        self._present = [p for p in self._present if p not in lost]

    def _names(self, members: frozenset[int], separator: str = " or ") -> str:
        return separator.join(self._all_names[self._present[i]] for i in sorted(members))

    def _exclude(self, failure: AttemptFailed) -> None:
        """Leave out the participants that were lost, and those that are blamed alone, which is a proof.

        Raises:
            FedSpeedError: this participant is one of them.
        """
        excluded = [self._present[i] for i in failure.lost | _alone(failure.blamed)]
        if self._transport.rank in excluded:
            raise FedSpeedError(
                f"the others have convicted this participant of spoiling the exchange: {failure}"
            ) from failure
        self._present = [p for p in self._present if p not in excluded]

    def _describe(self, failure: AttemptFailed) -> str:
        """Return the reason, followed by the names of those concerned, or by their transport numbers, where
        those of the attempt are different ones.
        """
        text = str(failure)
        if failure.lost:
            text += f" (lost: {self._names(failure.lost, ', ')})"
        blamed = " or ".join(self._names(group, "/") for group in failure.blamed)
        if blamed and (self._are_named or self._present != list(range(len(self._roster)))):
            text += f" (participants {blamed})"
        return text

    def _attempt(self, summand: Summand, threshold: int) -> AgreedSum:
        """Play one attempt over the transport. Raises AttemptFailed if it gives no sum."""
        mode = MODES[self._config.mode]
        parameters = PublicParameters(
            members=tuple(self._roster[p] for p in self._present),
            length=summand.length,
            settings=self._settings,
            attempt=self._made,
            masked=mode.masked,
            relays=min(self._config.relays, len(self._present) - 1) if mode.mixed else 0,
            chunk_length=self._config.cell_kib * 256,
            cipher=self._config.cipher,
            threshold=threshold,
            subject=summand.subject,
        )
        me = self._present.index(self._transport.rank)
        members = set_digest(parameters.members)
        steps = Member(
            parameters,
            me,
            self._identity,
            summand.integers,
            mark=summand.announced_mark(),
            settle=lambda: summand.settle(members),
        ).run()
        swap = next(steps)
        while True:
            lost: MembersLost | None = None
            try:
                arrived = self._swap(swap)
            except PeersLost as error:
                if swap.phase not in LAST_PHASES:
                    self._check_silent(error)
                lost = MembersLost(error.peers, error.recovering, error.arrived, ahead=error.ahead)
            try:
                swap = steps.throw(lost) if lost else steps.send(arrived)
            except StopIteration as stop:
                return stop.value

    def _check_silent(self, error: PeersLost) -> None:
        """Refuse to go on without members that may be alive.

        One that is silent may be honest, and wait for a liar that has delayed a message to this one only. If
        others went on without it, they could be led into a sum in which all but one lie.

        Raises:
            AttemptFailed: a member is silent, and its process is not known to be gone.
        """
        if error.silent:
            names = ", ".join(map(str, sorted(error.silent)))
            raise AttemptFailed(
                f"members {names} are connected, but did not send what was due ({error}). They may wait for "
                "others, so that nobody goes on without them",
                error.silent,
                fatal=True,
            )

    def _swap(self, swap: Swap) -> list[Payload]:
        """Exchange messages with the members of the attempt; return what arrived, by member.

        Raises:
            PeersLost: some of them do not answer, or have begun to recover; with numbers of members.
        """
        first = swap.phase == "announce" and not self._begun  # the others may still be training
        deadline_s = self._deadlines.next(swap.phase, first=first)
        step = (self._made, PHASES.index(swap.phase))
        arrived = swap_among(
            self._transport, self._present, swap.parts, swap.sizes, deadline_s=deadline_s, step=step
        )
        if self.arrived is None:
            self.arrived = time.perf_counter()
        self._begun = True
        return arrived


def _alone(groups: Sequence[frozenset[int]]) -> frozenset[int]:
    """Return the members that are blamed alone."""
    return frozenset(next(iter(group)) for group in groups if len(group) == 1)
