"""The attacks of a coalition that lies, each played on the sum of real updates, and what it gets by them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.routing.anonymous.paths import PathPlan
from fedspeed.routing.anonymous.phases import AgreedSum, AttemptFailed
from fedspeed.routing.anonymous.unmasking import chunks_to_check
from fedspeed.routing.audit import liars
from fedspeed.routing.audit.knowledge import Closest, closest, learned
from fedspeed.routing.audit.rehearsal import Attempt, Lies, Participants, PlayedSum
from fedspeed.routing.config import MODES, RoutingConfig

RIGHT = "right"
OWN_PART = "right, but for the coalition's own part in chunks of its paths"
SKIPPED = "skipped"
ENDED = "the run ended"
WRONG = "WRONG"
DIFFERENT = "DIFFERENT for honest members"


@dataclass(frozen=True)
class Attack:
    """An attack.

    Attributes:
        name: as it stands in the table. description: one sentence.
        lies: what the coalition does in the sum.
        again: whether the sum is made again in a new start, without an honest participant.
        forgetful: how many of the other honest participants have lost their settled marks by then; None: all.
        masked: whether it is an attack on masks. mixed: on relays.
        limit: why it can succeed nevertheless, if that is known (fedspeed/routing/THREATS.md).
    """

    name: str
    description: str
    lies: Lies = Lies()
    again: bool = False
    forgetful: int | None = 0
    masked: bool = False
    mixed: bool = False
    limit: str = ""


@dataclass(frozen=True)
class AttackResult:
    """What an attack has led to.

    Attributes:
        attack: its name. description: in a sentence.
        closest: how close the coalition has come to one honest update.
        end: what became of the sum; one of the constants of this module.
        attempts: how many it took.
        named: groups of participants that honest ones have named, at least one of each at fault.
        silent: participants that honest ones have left out because they did not answer.
        succeeded: whether the coalition has read an update, spoiled a sum without a sign, or had an honest
            participant named alone.
        limit: why that is known.
    """

    attack: str
    description: str
    closest: Closest
    end: str
    attempts: int
    named: tuple[tuple[int, ...], ...] = ()
    silent: tuple[int, ...] = ()
    succeeded: bool = False
    limit: str = ""


LOOKING = Attack("looks on", "Follows the protocol, and keeps what it sees.")
ATTACKS = (
    LOOKING,
    Attack(
        "two onion keys",
        "Announces another onion key to one member, whose cells then do not open.",
        Lies(liars.TwoOnionKeys),
        mixed=True,
    ),
    Attack(
        "two mask keys",
        "Announces another mask key to one member, so that masks do not cancel.",
        Lies(liars.TwoMaskKeys),
        masked=True,
    ),
    Attack(
        "two contributions",
        "Commits to another contribution to the beacon for one member; paths differ.",
        Lies(liars.TwoContributions),
    ),
    Attack(
        "two marks",
        "Claims a settled mark to all but one member, so that this one alone adds its update.",
        Lies(liars.TwoMarks),
    ),
    Attack(
        "a false mark", "Claims a settled mark to all, so that nobody adds an update.", Lies(liars.FalseMark)
    ),
    Attack(
        "a late contribution",
        "Reveals another contribution to the beacon than it has committed to.",
        Lies(liars.LateChooser),
    ),
    Attack(
        "a ground beacon",
        "Spoils attempts by false complaints until all relays of a chunk collude.",
        Lies(liars.BeaconGrinder, persistent=True),
        mixed=True,
    ),
    Attack(
        "a two-faced list",
        "Signs another list of the cells that it has summed for one member.",
        Lies(liars.TwoFacedLister),
    ),
    Attack("a partial confirmation", "Confirms the set to all but one member.", Lies(liars.PartialConfirmer)),
    Attack("leaving", "Leaves after the set is committed.", Lies(liars.Leaver)),
    Attack(
        "a false secret",
        "Reveals a false secret of its self mask to all.",
        Lies(liars.FalseSecret),
        masked=True,
    ),
    Attack(
        "a two-faced secret",
        "Reveals a false secret of its self mask to one member.",
        Lies(liars.TwoFacedSecret),
        masked=True,
    ),
    Attack(
        "a withheld secret",
        "Takes all secrets of self masks, and reveals its own to nobody.",
        Lies(liars.WithheldSecret),
        masked=True,
    ),
    Attack(
        "a partly withheld secret",
        "Takes all secrets of self masks, and reveals its own to all but one member.",
        Lies(liars.PartlyWithheldSecret),
        masked=True,
    ),
    Attack("false sums", "Opens its chunks falsely to all.", Lies(liars.FalseOpener)),
    Attack("two-faced sums", "Opens its chunks falsely to one member.", Lies(liars.TwoFacedOpener)),
    Attack(
        "retried after a loss",
        "Opens a sum alone when a member is lost, and lets the others retry without it.",
        Lies(liars.KeptSecrets, together=True, death="unmask"),
        masked=True,
    ),
    Attack("repeated with fewer", "Sums the update again, in a new start without one member.", again=True),
    Attack(
        "repeated, one mark lost",
        "The same, after one site has lost its settled marks.",
        again=True,
        forgetful=1,
    ),
    Attack(
        "repeated, all marks lost",
        "The same, after all other sites have begun anew in empty folders.",
        again=True,
        forgetful=None,
        limit="sites that begin anew with other members (--fresh) must choose another run.seed",
    ),
)


def attacks_on(config: RoutingConfig, honest: int) -> list[Attack]:
    """Return the attacks for which there is something to attack.

    Args:
        config: of the exchange, with its mode resolved. honest: how many participants do not lie.
    """
    mode = MODES[config.mode]
    return [
        attack
        for attack in ATTACKS
        if mode.masked >= attack.masked
        and mode.mixed >= attack.mixed
        and (attack.forgetful is None or attack.forgetful < honest - 1)
    ]


def play_attacks(
    config: RoutingConfig,
    updates: Sequence[np.ndarray],
    integers: Sequence[np.ndarray],
    coalition: frozenset[int],
    attacks: Sequence[Attack],
) -> Iterator[AttackResult]:
    """Play attacks, and yield what each has led to.

    Args:
        config: of the exchange, with its mode resolved.
        updates: by participant, [length] float32. integers: the same as they are summed, [length] uint32.
        coalition: participants that collude and lie.
    """
    honest = [update for i, update in enumerate(updates) if i not in coalition]
    looking = _play(LOOKING, Participants(config, integers, coalition), honest, Closest()).closest
    for attack in attacks:
        yield _play(attack, Participants(config, integers, coalition), honest, looking)


def _play(
    attack: Attack, participants: Participants, updates: Sequence[np.ndarray], looking: Closest
) -> AttackResult:
    """Play an attack.

    Args:
        updates: of the honest participants. looking: how close the coalition comes without a lie.
    """
    sums = [PlayedSum(participants, attack.lies, b"first")]
    if attack.again:
        others = participants.honest[:-1]
        participants.forget_marks(others[: attack.forgetful])
        sums.append(PlayedSum(participants, Lies(), b"second", frozenset({participants.victim})))
    attempts = [attempt for played in sums for attempt in played.attempts]
    near = closest(learned(attempts), updates)
    has_read = near.beyond_sum and not looking.beyond_sum
    end = end_of(sums[-1])
    named = _named(sums)
    is_slander = any(len(group) == 1 and group[0] not in participants.liars for group in named)
    return AttackResult(
        attack=attack.name,
        description=attack.description,
        closest=near,
        end=end,
        attempts=len(attempts),
        named=tuple(named),
        silent=tuple(_silent(sums)),
        succeeded=has_read or end in (WRONG, DIFFERENT) or is_slander,
        limit=attack.limit,
    )


def end_of(played: PlayedSum) -> str:
    """Return what became of a sum."""
    sums = [end for end in played.ends.values() if isinstance(end, AgreedSum)]
    if not sums:
        return ENDED
    if len({(end.values.tobytes(), end.skip_reasons) for end in sums}) > 1:
        return DIFFERENT
    if sums[0].skip_reasons:
        return SKIPPED
    attempt = next(made for made in played.attempts if sums[0] in made.honest_results)
    wrong = _wrong_chunks(attempt, sums[0])
    if not wrong:
        return RIGHT
    plan = attempt.members[0].plan
    return OWN_PART if all(attempt.colluders >= checkers(plan, chunk) for chunk in wrong) else WRONG


def checkers(plan: PathPlan, chunk: int) -> frozenset[int]:
    """Return the owner of a chunk, and the members that check how it opens the chunk."""
    checking = {member for member in range(plan.members) if chunk in chunks_to_check(plan, member)}
    return frozenset({plan.owner(chunk), *checking})


def _wrong_chunks(attempt: Attempt, result: AgreedSum) -> list[int]:
    """Return the chunks in which a sum is not that of what the members of an attempt have added."""
    total = np.sum([member.integers for member in attempt.members], axis=0, dtype=np.uint32)
    width = attempt.members[0].plan.chunk_length
    return sorted({int(place) // width for place in np.flatnonzero(total != result.values)})


def _named(sums: Sequence[PlayedSum]) -> list[tuple[int, ...]]:
    """Return the groups of participants that honest ones have named."""
    groups = {
        tuple(sorted(attempt.numbers[i] for i in group))
        for played in sums
        for attempt in played.attempts
        for result in attempt.honest_results
        for group in result.blamed
    }
    return sorted(groups)


def _silent(sums: Sequence[PlayedSum]) -> list[int]:
    """Return the participants that honest ones have left out because they did not answer."""
    silent = {
        attempt.numbers[i]
        for played in sums
        for attempt in played.attempts
        for result in attempt.honest_results
        if isinstance(result, AttemptFailed)
        for i in result.lost
    }
    return sorted(silent)
