"""Sums among honest members and liars, in one thread, with the retries of a run (`anonymous.attempts`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.routing.anonymous.attempts import Summand
from fedspeed.routing.anonymous.crypto import digest, public_bytes
from fedspeed.routing.anonymous.lockstep import Kill, Played, play
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.anonymous.settlement import MemoryMarks, set_digest
from fedspeed.routing.audit.liars import Colluder
from fedspeed.routing.config import MODES, RoutingConfig

_LABEL = "update of the audit"
End = AgreedSum | AttemptFailed


@dataclass(frozen=True)
class Lies:
    """What the coalition does in a sum.

    Attributes:
        liar: the class of the member that lies; the others of the coalition are `Colluder`s.
        together: whether all of the coalition are of that class.
        persistent: whether it lies in every attempt, not only in the first one.
        death: the phase of the first attempt in which an honest member is lost, by nobody's fault, after its
            message has reached the coalition and nobody else. Empty: none is lost.
    """

    liar: type[Colluder] = Colluder
    together: bool = False
    persistent: bool = False
    death: str = ""


class Participants:
    """The participants of the sums of an audit, which add the same whenever they are started again.

    Attributes:
        config: of the exchange, with its mode resolved.
        integers: by participant, [length] uint32: what it adds.
        liars: numbers of those that collude and lie.
        identities: private keys. marks: settled marks, which outlive a start.
    """

    def __init__(self, config: RoutingConfig, integers: Sequence[np.ndarray], liars: frozenset[int]):
        """Draw identities; nobody has a mark."""
        self.config = config
        self.integers = integers
        self.liars = liars
        self.identities = [Ed25519PrivateKey.generate() for _ in integers]
        self.marks = [MemoryMarks() for _ in integers]

    @property
    def honest(self) -> list[int]:
        """The numbers of the participants that do not lie."""
        return [i for i in range(len(self.integers)) if i not in self.liars]

    @property
    def victim(self) -> int:
        """The honest participant that is lost, where an attack needs a loss."""
        return self.honest[-1]

    def forget_marks(self, participants: Sequence[int]) -> None:
        """Let participants lose their settled marks."""
        for i in participants:
            self.marks[i] = MemoryMarks()


@dataclass
class Attempt:
    """An attempt that was played.

    Attributes:
        numbers: of the participants, by member of the attempt. members: themselves, with all that they know.
        colluders: members of the coalition.
    """

    numbers: tuple[int, ...]
    members: list[Member]
    colluders: frozenset[int]
    played: Played

    @property
    def coalition(self) -> list[Colluder]:
        """The members of the coalition."""
        return [member for member in self.members if isinstance(member, Colluder)]

    @property
    def honest_results(self) -> list[End]:
        """How the attempt has ended for the honest members that were not lost."""
        results = enumerate(self.played.results)
        return [end for i, end in results if end is not None and i not in self.colluders]


class PlayedSum:
    """A sum in one start of a run.

    A participant that ends the run ends it for all honest ones. One that goes on with other participants than
    another honest one does is silent for that one.

    Attributes:
        attempts: in order.
        ends: by honest participant that was not lost, how the sum has ended for it.
    """

    def __init__(
        self, participants: Participants, lies: Lies, settings: bytes, without: frozenset[int] = frozenset()
    ):
        """Make the sum.

        Args:
            settings: another digest in every start. without: participants that are not in the roster.
        """
        self.attempts: list[Attempt] = []
        self.ends: dict[int, End] = {}
        self._participants = participants
        self._lies = lies
        self._settings = settings
        roster = tuple(i for i in range(len(participants.integers)) if i not in without)
        self._threshold = len(roster) // 2 + 1
        self._made = 0
        # By honest participant, whom it takes for present.
        self._views = {i: roster for i in roster if i not in participants.liars}
        for _ in range(participants.config.attempts):
            self._made += 1
            for view in sorted({self._views[i] for i in self._waiting}):
                self._attempt(view)

    @property
    def _waiting(self) -> list[int]:
        """Honest participants for which the sum has not ended."""
        return [i for i in self._views if i not in self.ends]

    def _attempt(self, view: tuple[int, ...]) -> None:
        """Make an attempt of those that take `view` for present, and note how it ends for each of them."""
        config = self._participants.config
        acting = [i for i in self._waiting if self._views[i] == view]
        if not acting:
            return
        if len(view) < max(self._threshold, config.min_participants):
            self._end_all(AttemptFailed("too few participants are left", fatal=True))
            return
        attempt = self._play(view, acting)
        self.attempts.append(attempt)
        for participant in acting:
            self._note(participant, attempt.played.results[view.index(participant)])
        failed = [end for end in self.ends.values() if isinstance(end, AttemptFailed)]
        if failed:
            self._end_all(failed[0])

    def _note(self, participant: int, result: End | None) -> None:
        """Note how an attempt has ended for a participant."""
        view = self._views[participant]
        if result is None:  # it was lost
            del self._views[participant]
            return
        excluded = set()
        if isinstance(result, AttemptFailed):
            alone = [next(iter(group)) for group in result.blamed if len(group) == 1]
            excluded = {view[i] for i in (*result.lost, *alone)}
        if isinstance(result, AgreedSum) or result.fatal or participant in excluded:
            self.ends[participant] = result
        else:
            self._views[participant] = tuple(i for i in view if i not in excluded)

    def _end_all(self, failure: AttemptFailed) -> None:
        for participant in self._views:
            self.ends.setdefault(participant, failure)

    def _play(self, view: tuple[int, ...], acting: Sequence[int]) -> Attempt:
        parameters = self._parameters(view)
        lies = self._lies
        colluders = frozenset(place for place, i in enumerate(view) if i in self._participants.liars)
        liars = colluders if lies.together else frozenset(sorted(colluders)[:1])
        if self._made > 1 and not lies.persistent:
            liars = frozenset()
        members = []
        for place in range(len(view)):
            kind: type[Member] = Colluder if place in colluders else Member
            member = self._member(lies.liar if place in liars else kind, parameters, place, view[place])
            if isinstance(member, Colluder):
                member.colluders = colluders
            members.append(member)
        silent = [i for i in view if i not in acting and i not in self._participants.liars]
        kills = [Kill(view.index(i), "announce") for i in silent]
        if lies.death and self._made == 1:
            kills.append(Kill(view.index(self._participants.victim), lies.death, colluders))
        return Attempt(view, members, colluders, play(members, kills=kills))

    def _parameters(self, view: tuple[int, ...]) -> PublicParameters:
        participants = self._participants
        config = participants.config
        mode = MODES[config.mode]
        return PublicParameters(
            tuple(public_bytes(participants.identities[i]) for i in view),
            len(participants.integers[0]),
            self._settings,
            attempt=self._made,
            masked=mode.masked,
            relays=min(config.relays, len(view) - 1) if mode.mixed else 0,
            chunk_length=config.cell_kib * 256,
            cipher=config.cipher,
            threshold=self._threshold,
            subject=digest(_LABEL.encode()),
        )

    def _member(
        self, kind: type[Member], parameters: PublicParameters, place: int, participant: int
    ) -> Member:
        integers = self._participants.integers[participant]
        summand = Summand(
            number=1,
            label=_LABEL,
            length=len(integers),
            integers=lambda: integers,
            vector=digest(b"vector", integers.tobytes()),
            marks=self._participants.marks[participant],
        )
        identity = self._participants.identities[participant]
        if issubclass(kind, Colluder):  # it keeps no marks
            return kind(parameters, place, identity, summand.integers)
        members = set_digest(parameters.members)
        return kind(
            parameters,
            place,
            identity,
            summand.integers,
            mark=summand.announced_mark(),
            settle=lambda: summand.settle(members),
        )
