"""An abstract model of how the members of an attempt agree: the phases of `protocol.Member` with contents as
small tokens, so that all behaviours of a liar can be explored (`agreement_search`).

A member is a `State`, and `after` is what it does with the messages of a phase: None stands for a message
that does not arrive, RECOVERING for a sign that its sender is in another phase, ENDED for one that it has
ended the run. Signatures are facts (phase,
member, content). Who is at fault or contradicted, and whether a sum is skipped, is decided by the real code.

Contents: in every phase 0 is the right one and 1 another one. A list with the content SPOILED lacks the cells
of other members. Chunk 1 is the one that honest members complain about; a liar may complain about chunk 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedspeed.routing.anonymous.recovery import NO_CHUNK, NO_LISTS, contradictions, groups_at_fault
from fedspeed.routing.anonymous.unmasking import owner_without_backup

RECOVERING = "recovering"
ENDED = "ended"
SPOILED = 2
CHUNKS = 2
NOBODY: frozenset[int] = frozenset()
# Phases in which a member that is lost no longer matters.
LAST = ("done", "redone", "void")


class Sum(NamedTuple):
    """An end with a sum; `value` 0 is the right one."""

    value: int
    lost: frozenset[int]
    blamed: tuple[frozenset[int], ...]
    convicted: frozenset[int]


class Failure(NamedTuple):
    """An end without a sum, see `phases.AttemptFailed`."""

    lost: frozenset[int]
    blamed: tuple[frozenset[int], ...]
    fatal: bool = False
    settled: bool = False


class Crash(NamedTuple):
    """The end of a member that has crashed."""

    blamed: tuple[frozenset[int], ...] = ()


class Answer(NamedTuple):
    """A message of the phase `recover`, see `recovery.RecoveryMessage`; of the certificate, the lists."""

    lost: frozenset[int]
    accused: frozenset[int]
    complaint: int
    certificate: int | None
    statements: frozenset[tuple[str, int, int]]


@dataclass(frozen=True)
class Rules:
    """What members do where the tests of the model change it, to see that the exploration would notice.

    Attributes:
        n, threshold: members, and how many must be left. recoveries: how often a member begins to recover.
        crashes: how many honest members may crash.
        checkers: members that check the opened sums of the
            liars.
        compares: whether members that give up compare what has arrived.
        returns: whether a member in `void` notices that another one is not.
        signs_once: whether a member that has signed a wrong total keeps to it when others have left.
        needs_all: whether a certificate needs all signatures.
        ignores_self: whether what a member claims of itself counts for nothing.
        stays: whether the run ends for a member that is still in the attempt when another one has left it.
        marks: whether there are settled marks.
        proofs: whether both contents of a liar are shown to the others.
        pairs: whether an accuser is at fault no less than whom it accuses.
    """

    n: int = 3
    threshold: int = 2
    recoveries: int = 6
    crashes: int = 0
    checkers: frozenset[int] = NOBODY
    compares: bool = True
    returns: bool = True
    signs_once: bool = True
    needs_all: bool = True
    ignores_self: bool = True
    stays: bool = True
    marks: bool = True
    proofs: bool = True
    pairs: bool = True


class State(NamedTuple):
    """One member in one phase, waiting for the messages of the others. Fields as in `protocol.Member`.

    Attributes:
        known: statements. echo: what it has received as announcements. bound: whether it knows the context of
            the phases after `reveal`. lists: digest of the lists.
        total, value: as owners have opened it, and what the attempt ends with.
        rounds, recoveries: how often it has sent `recover`, since it began to and in all.
        agreeing: members that may have left, since their last message agrees with this one's.
        pending: the end that it gives the attempt up with, once it has left `void`.
    """

    me: int
    phase: str = "announce"
    lost: frozenset[int] = NOBODY
    accused: frozenset[int] = NOBODY
    suspects: frozenset[int] = NOBODY
    pairs: tuple[frozenset[int], ...] = ()
    known: frozenset[tuple[str, int, int]] = frozenset()
    echo: int | None = None
    bound: bool = False
    lists: int | None = None
    complains: bool = False
    certified: bool = False
    settled: bool = False
    secrets: frozenset[int] = NOBODY
    total: int | None = None
    value: int = 0
    signed: bool = False
    compared: Any = None
    chunk: int = NO_CHUNK
    rounds: int = 0
    recoveries: int = 0
    agreeing: frozenset[int] = NOBODY
    pending: Failure | None = None
    end: Sum | Failure | Crash | None = None

    @property
    def convicted(self) -> frozenset[int]:
        """Members that have signed two contents, or another secret than the committed one."""
        seen = [(label, member) for label, member, _ in self.known]
        twice = {member for label, member in seen if seen.count((label, member)) > 1}
        return frozenset(twice | {m for label, m, content in self.known if label == "unmask" and content})

    def signing(self, label: str, content: int) -> "State":
        """Return the state with a statement of this member's own."""
        return self._replace(known=self.known | {(label, self.me, content)})

    def hearing(self, label: str, member: int, content: int) -> "State":
        """Return the state with a statement of another member."""
        return self._replace(known=self.known | {(label, member, content)})


def begin(me: int) -> State:
    """Return a member that has just announced itself."""
    return State(me).signing("announce", 0)


def _one_of_each(statements: frozenset[tuple[str, int, int]]) -> frozenset[tuple[str, int, int]]:
    """Return a statement of each member and phase."""
    return frozenset({s[:2]: s for s in sorted(statements, reverse=True)}.values())


def message_of(state: State, rules: Rules) -> Any:
    """Return what a member sends to all in its phase."""
    complaint = 1 if state.complains else NO_CHUNK
    return {
        "announce": lambda: (0, True),
        "reveal": lambda: (state.echo, True, True),
        "collect": lambda: (0, True, True),
        "confirm": lambda: (state.lists, not state.complains, True),
        "unmask": lambda: (0, True),
        "sums": lambda: 0,
        "challenge": lambda: True,
        "done": lambda: (state.total, True),
        "recover": lambda: Answer(
            state.lost,
            state.accused,
            NO_LISTS if state.lists is None else complaint,
            state.lists if state.certified else None,
            state.known if rules.proofs else _one_of_each(state.known),
        ),
        "blame": lambda: (state.compared, state.chunk, 0),
        "void": lambda: state.compared,
        "secrets": lambda: state.secrets,
        "masked": lambda: True,
        "redone": lambda: state.accused,
    }[state.phase]()


def after(state: State, messages: Mapping[int, Any], rules: Rules) -> State:
    """Return a member after the messages of its phase.

    Args:
        messages: by sender, the member itself and lost ones left out; empty if others are in other phases.
    """
    missing = frozenset(i for i, message in messages.items() if message is None)
    recovering = not messages or RECOVERING in messages.values()
    ignores = state.phase in LAST and not recovering or state.phase == "void" and not rules.returns
    ahead = frozenset(i for i, message in messages.items() if message == ENDED)
    heard = {i: m for i, m in messages.items() if m not in (None, RECOVERING, ENDED)}
    if state.phase in LAST:
        state = state._replace(agreeing=_agreeing(state, heard))
    if (missing or recovering or ahead) and (ahead or not ignores):
        return _lose(state, missing | ahead, ahead, rules)
    everybody = {**heard, state.me: message_of(state, rules)}
    return _STEPS[state.phase](state, dict(sorted(everybody.items())), rules)


def _agreeing(state: State, heard: dict[int, Any]) -> frozenset[int]:
    if state.phase == "done":
        return frozenset(i for i, (content, _) in heard.items() if content == state.total)
    return frozenset(i for i, m in heard.items() if state.phase == "redone" or m == state.compared)


def _lose(state: State, members: frozenset[int], ahead: frozenset[int], rules: Rules) -> State:
    if rules.stays and ahead | (members & state.agreeing):
        return state._replace(end=Failure(state.lost, (), fatal=True, settled=state.settled))
    return _recover(state._replace(lost=state.lost | members), rules)


def _blamed_by(state: State) -> tuple[frozenset[int], ...]:
    """Return the members that are convicted, alone, and those that a member accuses, with itself."""
    accused = sorted(state.accused - state.convicted)
    return (*_alone(state.convicted), *(frozenset({state.me, i}) for i in accused))


def _misbehaved(state: State, rules: Rules, *accused: int) -> State:
    return _recover(state._replace(accused=state.accused | frozenset(accused) - {state.me}), rules)


def _announced(state: State, messages: dict[int, Any], rules: Rules) -> State:
    for i, (content, valid) in messages.items():
        if not valid:
            return _misbehaved(state, rules, i)
        state = state.hearing("announce", i, content)
    # What liars have announced: a digit each.
    echo = sum(content << i for i, (content, _) in messages.items())
    return state._replace(phase="reveal", echo=echo).signing("reveal", echo)


def _revealed(state: State, messages: dict[int, Any], rules: Rules) -> State:
    for i, (echo, valid, _) in messages.items():
        if not valid:
            return _misbehaved(state, rules, i)
        state = state.hearing("reveal", i, echo)
    for i, (echo, _, committed) in messages.items():
        if echo != state.echo:
            return _misbehaved(state._replace(suspects=state.suspects | {i}), rules)
        if not committed:
            return _misbehaved(state, rules, i)
    return state._replace(phase="collect", bound=True).signing("collect", 0)


def _collected(state: State, messages: dict[int, Any], rules: Rules) -> State:
    for i, (content, valid, stored) in messages.items():
        if not valid:
            return _misbehaved(state, rules, i)
        complains = state.complains or content == SPOILED or not stored
        state = state.hearing("collect", i, content)._replace(complains=complains)
    lists = sum(content * 3**i for i, (content, _, _) in messages.items())
    state = state._replace(phase="confirm", lists=lists)
    return state if state.complains else state.signing("confirm", lists)


def _confirmed(state: State, messages: dict[int, Any], rules: Rules) -> State:
    for i, (lists, signed, valid) in messages.items():
        if lists != state.lists:
            return _misbehaved(state._replace(suspects=state.suspects | {i}), rules)
        if not signed:
            if not rules.needs_all:
                continue
            return _misbehaved(state, rules)
        if not valid:
            return _misbehaved(state, rules, i)
        state = state.hearing("confirm", i, lists)
    return _reveal_secret(state._replace(phase="unmask", certified=True)).signing("unmask", 0)


def _reveal_secret(state: State) -> State:
    return state._replace(settled=True, secrets=state.secrets | {state.me})


def _unmasked(state: State, messages: dict[int, Any], rules: Rules) -> State:
    state = state._replace(secrets=state.secrets | {i for i, (content, _) in messages.items() if not content})
    for i, (content, valid) in messages.items():
        if not valid:
            return _misbehaved(state, rules, i)
        state = state.hearing("unmask", i, content)
    if state.convicted:
        return _misbehaved(state, rules, *state.convicted)
    return state._replace(phase="sums")


def _opened(state: State, messages: dict[int, Any], rules: Rules) -> State:
    false = [i for i, opened in messages.items() if opened]
    state = state._replace(total=int(bool(false)))
    if false and state.me in rules.checkers:
        return _misbehaved(state, rules, false[0])
    return state._replace(phase="challenge")


def _challenged(state: State, messages: dict[int, Any], rules: Rules) -> State:
    for i, committed in messages.items():
        if not committed:
            return _misbehaved(state, rules, i)
    return state._replace(phase="done", signed=True).signing("done", state.total)


def _compared_totals(state: State, messages: dict[int, Any], rules: Rules) -> State:
    for i, (content, valid) in messages.items():
        if not valid:
            return _misbehaved(state, rules, i)
        state = state.hearing("done", i, content)
        if content != state.total:
            return _misbehaved(state._replace(suspects=state.suspects | {i}), rules)
    return _agreed(state._replace(value=state.total or 0), [])


def _agreed(state: State, groups: list[frozenset[int]]) -> State:
    convicted = state.convicted
    blamed = (*_alone(convicted), *(group for group in groups if not group & convicted))
    return state._replace(end=Sum(state.value, state.lost, blamed, convicted))


def _alone(members: frozenset[int]) -> tuple[frozenset[int], ...]:
    return tuple(frozenset({i}) for i in sorted(members))


# When members are lost, or something is wrong.


def _recover(state: State, rules: Rules) -> State:
    """Return a member that begins to recover."""
    if state.recoveries == rules.recoveries:
        return state._replace(end=Failure(state.lost, _blamed_by(state), fatal=True, settled=state.settled))
    return _send_answer(state._replace(recoveries=state.recoveries + 1, rounds=0, pending=None), rules)


def _send_answer(state: State, rules: Rules) -> State:
    lost = state.lost | state.convicted - {state.me}
    if rules.n - len(lost) < rules.threshold:
        return state._replace(
            lost=lost, end=Failure(lost, (*_alone(state.convicted), *state.pairs), fatal=True)
        )
    return state._replace(lost=lost, phase="recover")


def _answered(state: State, messages: dict[int, Any], rules: Rules) -> State:
    lost = state.lost
    before = state.convicted
    state = state._replace(agreeing=NOBODY)
    known = state.known.union(*(answer.statements for answer in messages.values()))
    if not state.bound:
        known = frozenset(s for s in known if s[0] in ("announce", "reveal"))
    state = state._replace(known=known)
    for answer in messages.values():
        if answer.certificate is not None and answer.certificate == state.lists:
            state = state._replace(certified=True)
    convicted = state.convicted
    claims = {i: answer.lost - ({i} if rules.ignores_self else set()) for i, answer in messages.items()}
    if convicted <= lost | {state.me} and all(claim == lost for claim in claims.values()):
        compared = tuple(messages.items()) if rules.compares else 0
        state = state._replace(compared=compared)
        if state.certified:
            return _reveal_secret(state)._replace(phase="secrets")
        return _find_faults(state, messages, rules)
    pairs = tuple(contradictions(claims))
    rounds = 0 if convicted - before else state.rounds + 1
    state = state._replace(pairs=pairs, rounds=rounds)
    if pairs and state.rounds >= 2:
        return state._replace(end=Failure(lost, pairs, fatal=True))
    return _send_answer(state, rules)


def _find_faults(state: State, answers: dict[int, Answer], rules: Rules) -> State:
    """Return a member of an attempt that has no certificate: it gives up, or looks at transcripts first."""
    if state.convicted:
        return _leave(state, _alone(state.convicted))
    complaints = {i: answer.complaint for i, answer in answers.items()}
    chunk = min(complaints.values())
    if not state.lost and NO_LISTS not in complaints.values() and chunk < CHUNKS:
        return state._replace(phase="blame", chunk=chunk)
    accusations = {i: answer.accused for i, answer in answers.items()}
    groups = _groups(accusations, rules)
    return _leave(state, (*groups, *(frozenset({state.me, i}) for i in sorted(state.suspects))))


def _groups(accusations: dict[int, frozenset[int]], rules: Rules) -> list[frozenset[int]]:
    if rules.pairs:
        return groups_at_fault(accusations)
    return [frozenset({j}) for j in sorted(frozenset().union(*accusations.values()))]


def _blamed(state: State, messages: dict[int, Any], rules: Rules) -> State:
    """Return a member that has seen all transcripts.

    Those of another chunk look like forgeries. The liars' transcript 0 shows that they are at fault, 1 only
    that they or a member before them is.
    """
    if any(compared != state.compared for compared, _, _ in messages.values()):
        return _end_apart(state, rules)
    if rules.compares:
        state = state._replace(compared=(state.compared, tuple(messages.items())))
    forgers = [i for i, (_, chunk, _) in messages.items() if chunk != state.chunk]
    liar = rules.n - 1
    culprits = [frozenset({liar, 0}) if messages[liar][2] else frozenset({liar})]
    return _leave(state, tuple(frozenset({i}) for i in forgers) or tuple(culprits))


def _end_apart(state: State, rules: Rules) -> State:
    present = frozenset(range(rules.n)) - state.lost
    return state._replace(end=Failure(state.lost, (present,), fatal=True))


def _leave(state: State, blamed: tuple[frozenset[int], ...], *, settled: bool = False) -> State:
    pending = Failure(state.lost, blamed, settled=settled)
    return state._replace(phase="void", pending=pending)


def _left(state: State, messages: dict[int, Any], rules: Rules) -> State:
    if any(compared != state.compared for compared in messages.values()):
        return _end_apart(state, rules)
    return state._replace(end=state.pending)


def _shared(state: State, messages: dict[int, Any], rules: Rules) -> State:
    known = state.secrets.union(*messages.values())
    state = state._replace(secrets=known)
    if len(known) < rules.n:
        missing = frozenset(range(rules.n)) - known - state.lost
        state = state._replace(accused=state.accused | missing)
        return _leave(state, _blamed_by(state), settled=True)
    if owner_without_backup(state.lost, rules.n) is not None:
        return state._replace(end=Failure(state.lost, (), fatal=True, settled=True))
    return state._replace(phase="masked")


def _opened_masked(state: State, messages: dict[int, Any], rules: Rules) -> State:
    if false := {i for i, right in messages.items() if not right}:
        return _lose(state, frozenset(false), NOBODY, rules)
    if state.total:  # another one than the right one, which is 0
        if state.signed and state.lost and rules.signs_once:
            return state._replace(end=Failure(state.lost, (), fatal=True, settled=True))
        state = state._replace(accused=state.accused | {rules.n - 1})
    return state._replace(phase="redone", value=0)


def _redone(state: State, messages: dict[int, Any], rules: Rules) -> State:
    return _agreed(state, _groups(messages, rules))


_STEPS = {
    "announce": _announced,
    "reveal": _revealed,
    "collect": _collected,
    "confirm": _confirmed,
    "unmask": _unmasked,
    "sums": _opened,
    "challenge": _challenged,
    "done": _compared_totals,
    "recover": _answered,
    "blame": _blamed,
    "void": _left,
    "secrets": _shared,
    "masked": _opened_masked,
    "redone": _redone,
}
