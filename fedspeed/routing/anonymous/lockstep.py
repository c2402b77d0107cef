"""Play all members of an attempt in one process and one thread, phase by phase: for tests, for simulation,
and for the audit. The caller may change, drop or keep any message on its way, and kill any member in any
phase.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed, MembersLost, Phase, Swap, as_message
from fedspeed.routing.anonymous.protocol import Member

# By (sender, receiver). None: the receiver hears that the sender is in another phase.
Messages = dict[tuple[int, int], bytes | None]


@dataclass(frozen=True)
class Kill:
    """The death of a member in a phase, after its messages have reached `heard_by` and nobody else."""

    member: int
    phase: str
    heard_by: frozenset[int] = frozenset()


@dataclass
class _Player:
    """A member with the step that it waits in, or the result that it has ended with."""

    steps: Phase[AgreedSum]
    swap: Swap | None = None
    result: AgreedSum | AttemptFailed | None = None

    def advance(self, step: Callable[[Phase[AgreedSum]], Swap]) -> None:
        """Go on to the next step; `step` starts the generator, or sends or throws something into it."""
        self.swap = None
        try:
            self.swap = step(self.steps)
        except StopIteration as stop:
            self.result = stop.value
        except AttemptFailed as failure:
            self.result = failure

    def receive(self, messages: Sequence[bytes]) -> None:
        """Go on with the messages that have arrived, by sender."""
        self.advance(lambda steps: steps.send(messages))

    def lose(
        self,
        members: frozenset[int],
        *,
        recovering: bool = False,
        arrived: Sequence[bytes] = (),
        ahead: frozenset[int] = frozenset(),
    ) -> None:
        """Go on with the message that members are lost, and with what has arrived from the others.

        Args:
            ahead: those that have ended the run.
        """
        self.advance(lambda steps: steps.throw(MembersLost(members, recovering, arrived, ahead=ahead)))

    @property
    def ended(self) -> bool:
        """Whether the member has ended the run, which all others hear."""
        return isinstance(self.result, AttemptFailed) and self.result.fatal


@dataclass
class Played:
    """The outcome of an attempt.

    Attributes:
        results: by member; None for one that was killed.
        phases: all that any member was in, in order.
    """

    results: list[AgreedSum | AttemptFailed | None]
    phases: list[str] = field(default_factory=list)


def play(
    members: Sequence[Member],
    on_messages: Callable[[str, Messages], object] | None = None,
    kills: Sequence[Kill] = (),
) -> Played:
    """Play an attempt to its end.

    Args:
        on_messages: gets each phase and all its messages before they arrive, and may change them.
    """
    players = [_Player(member.run()) for member in members]
    kill_of: Mapping[tuple[int, str], Kill] = {(kill.member, kill.phase): kill for kill in kills}
    dead: set[int] = set()
    phases: list[str] = []
    for player in players:
        player.advance(next)
    while waiting := {i: p.swap for i, p in enumerate(players) if p.swap is not None and i not in dead}:
        current = {swap.phase for swap in waiting.values()}
        if len(current) > 1 and "recover" not in current:  # they differ: all hear that somebody recovers
            for i in waiting:
                players[i].lose(frozenset(), recovering=True)
            continue
        others_follow = len(current) > 1  # some recover already, the others are on their way to it
        phase = "recover" if others_follow else current.pop()
        phases.append(phase)
        dying = {i: kill_of[i, swap.phase] for i, swap in waiting.items() if (i, swap.phase) in kill_of}
        messages: Messages = {
            (i, j): as_message(swap.parts[j])
            for i, swap in waiting.items()
            for j in range(len(players))
            if swap.phase == phase
        }
        if on_messages:
            on_messages(phase, messages)
        dead |= dying.keys()
        for i, swap in waiting.items():
            if i in dead:
                continue
            if swap.phase != phase:
                players[i].lose(frozenset(), recovering=True)
                continue
            unheard = dead - {j for j, kill in dying.items() if i in kill.heard_by}
            elsewhere = {j for j in range(len(players)) if messages.get((j, i), b"") is None}
            missing = _missing(i, swap, messages, unheard) - elsewhere
            if others_follow and missing - dead:
                continue
            arrived = [b"" if j in missing else messages.get((j, i)) or b"" for j in range(len(players))]
            if missing or elsewhere:
                ended = frozenset(j for j in missing if players[j].ended)
                players[i].lose(frozenset(missing), recovering=bool(elsewhere), arrived=arrived, ahead=ended)
            else:
                players[i].receive(arrived)
    return Played([None if i in dead else player.result for i, player in enumerate(players)], phases)


def _missing(i: int, swap: Swap, messages: Messages, unheard: set[int]) -> set[int]:
    """Return the members from which member i does not get what it waits for. One that sends another number of
    bytes than all know it must counts as lost.
    """
    expected = {j: size for j, size in enumerate(swap.sizes) if size}
    return {j for j, size in expected.items() if j in unheard or len(messages.get((j, i)) or b"") != size}
