"""All that one liar can do to the members of the agreement's model, in lockstep (`lockstep.play`).

The liar is the last member. It knows all messages of a phase before it sends its own, sends each member any
message of its menu or none, and signs whatever it likes.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fedspeed.routing.anonymous.recovery import NO_CHUNK
from fedspeed.routing.anonymous.settlement import NO_MARK, reasons_to_skip
from tests.routing.anonymous.agreement_model import (
    ENDED,
    NOBODY,
    RECOVERING,
    SPOILED,
    Answer,
    Crash,
    Failure,
    Rules,
    State,
    Sum,
    after,
    begin,
    message_of,
)

World = tuple[State, ...]  # the honest members
Choice = tuple[str, ...]  # by honest member, what the liar sends it


def start(rules: Rules) -> World:
    """Return the honest members when they have announced themselves."""
    return tuple(begin(i) for i in range(rules.n - 1))


def menu(state: State, world: World, rules: Rules, shown: Answer | None = None) -> dict[str, Any]:
    """Return by name what the liar may send a member now; the first is what an honest one would send.

    Args:
        shown: its message in `recover`, where that is not made up to suit the receiver.
    """
    liar = rules.n - 1
    confirmed = state.lists is not None and all(("confirm", s.me, state.lists) in s.known for s in world)
    shown = shown or Answer(
        state.lost - {liar}, NOBODY, NO_CHUNK, state.lists if confirmed else None, frozenset()
    )
    others = [s.me for s in world if s.me != state.me]
    revealed = frozenset(s.me for s in world if s.settled)
    last = 3**liar  # the liar's digit in a digest of all lists
    messages: dict[str, Any] = {
        "announce": lambda: {"right": (0, True), "other": (1, True), "unsigned": (0, False)},
        "reveal": lambda: {
            "right": (state.echo, True, True),
            "other": ((state.echo or 0) ^ 1 << liar, True, True),
            "unsigned": (state.echo, False, True),
            "uncommitted": (state.echo, True, False),
        },
        "collect": lambda: {
            "right": (0, True, True),
            "other": (1, True, state.me != 0),  # member 0 stores the sums of the last one
            "unsigned": (0, False, True),
            "spoiled": (SPOILED, True, True),
            **({"not stored": (0, True, False)} if state.me == 0 else {}),
        },
        "confirm": lambda: {
            "right": (state.lists, True, True),
            "other": ((state.lists or 0) ^ last, True, True),
            "unsigned": (state.lists, True, False),
            "complaint": (state.lists, False, True),
        },
        "unmask": lambda: {"right": (0, True), "other": (1, True), "unsigned": (0, False)},
        "sums": lambda: {"right": 0, "other": 1},
        "challenge": lambda: {"right": True, "other": False},
        "done": lambda: {
            "right": (state.total, True),
            "other": (1 - (state.total or 0), True),
            "unsigned": (state.total, False),
        },
        "recover": lambda: {
            "right": shown,
            "no certificate": shown._replace(certificate=None),
            "complaint": shown._replace(complaint=0),
            "itself": shown._replace(lost=shown.lost | {liar}),
            "proof": shown._replace(statements=_two_contents("announce", liar)),
            "later proof": shown._replace(statements=_two_contents("collect", liar)),
            **{f"lost {i}": shown._replace(lost=shown.lost ^ {i}) for i in others},
            **{f"accused {i}": shown._replace(accused=frozenset({i})) for i in others},
        },
        "blame": lambda: {
            "right": (state.compared, state.chunk, 0),
            "other": (state.compared, state.chunk, 1),
            "compared": ("?", state.chunk, 0),
        },
        "void": lambda: {"right": state.compared, "other": "?"},
        "secrets": lambda: {"right": revealed | {liar}, "other": revealed},
        "masked": lambda: {"right": True, "other": False},
        "redone": lambda: {"right": NOBODY, **{f"accused {i}": frozenset({i}) for i in others}},
    }[state.phase]()
    messages["nothing"] = None
    messages["ended"] = ENDED
    if state.phase != "recover":
        messages["recovering"] = RECOVERING
    return messages


def _two_contents(label: str, member: int) -> frozenset[tuple[str, int, int]]:
    return frozenset({(label, member, 0), (label, member, 1)})


def listeners(world: World) -> list[int]:
    """Return the members that get messages in this step; the others wait, or hear that somebody recovers."""
    waiting = [s for s in world if s.end is None]
    phases = {s.phase for s in waiting}
    if len(phases) == 1:
        return [s.me for s in waiting]
    elsewhere = {s.me for s in waiting if s.phase != "recover"}
    return [s.me for s in waiting if s.me not in elsewhere and elsewhere <= s.lost]


def _messages_to(state: State, world: World, rules: Rules) -> dict[int, Any]:
    """Return what the members of a world send one of them. Who has lost it sends it nothing."""
    messages: dict[int, Any] = {}
    for s in world:
        if s.me not in state.lost | {state.me}:
            sends = s.end is None and s.phase == state.phase and state.me not in s.lost
            absent = ENDED if isinstance(s.end, Failure) and s.end.fatal else None
            messages[s.me] = message_of(s, rules) if sends else absent
    return messages


def next_states(
    world: World, rules: Rules, only: frozenset[str] | None = None
) -> list[dict[State, tuple[int, str]]]:
    """Return for each member what it may be after one step, with how many deviations that takes of the liar
    (0 or 1), and what it sends.
    """
    hearing = listeners(world)
    outcomes = []
    for state in world:
        waits = state.end is not None or (state.me not in hearing and state.phase == "recover")
        if waits or state.me not in hearing:
            outcomes.append({state if waits else after(state, {}, rules): (0, "")})
            continue
        messages = _messages_to(state, world, rules)
        if rules.n - 1 in state.lost:
            outcomes.append({after(state, messages, rules): (0, "")})
            continue
        reached: dict[State, tuple[int, str]] = {}
        for name, message in menu(state, world, rules).items():
            if only and name not in only:
                continue
            sent = {**messages, rules.n - 1: message}
            reached.setdefault(after(state, sent, rules), (int(name != "right"), name))
        outcomes.append(reached)
    return outcomes


def _canonical(world: World, rules: Rules) -> World:
    """Return the members without what no longer matters, so that fewer situations differ."""
    distinct: list[Any] = []
    for state in world:
        if state.compared not in distinct:
            distinct.append(state.compared)
    return tuple(_reduced(s, rules)._replace(compared=distinct.index(s.compared)) for s in world)


def _reduced(state: State, rules: Rules) -> State:
    """Return a member without statements that all honest ones have alike, and without what it has passed."""
    liar = rules.n - 1
    lists = state.lists or 0
    known = frozenset(s for s in state.known if s[1] == liar)
    if liar in state.convicted:
        known = _two_contents("announce", liar)
    confirmed = frozenset({("confirm", state.me, lists)}) & state.known
    if state.end is not None:
        convicted = known if liar in state.convicted else frozenset()
        return State(
            state.me,
            phase="",
            known=confirmed | convicted,
            lists=state.lists,
            settled=state.settled,
            end=state.end,
        )
    if state.recoveries and not state.total:
        state = state._replace(total=None, signed=False)
    return state._replace(known=known | confirmed, echo=None if state.bound else state.echo)


def play_one(rules: Rules, deviations: dict[tuple[str, int], str]) -> World:
    """Return how an attempt ends in which the liar is honest but for some messages, as `lockstep.play` would.

    Args:
        deviations: by (phase, receiver), the name of what it sends there when the phase comes first.
    """
    left = dict(deviations)
    world = tuple(begin(i) for i in range(rules.n))
    while any(s.end is None for s in world):
        hearing = listeners(world)
        found = []
        for state in world:
            messages = _messages_to(state, world, rules)
            name = left.pop((state.phase, state.me), None) if state.me in hearing else None
            if name and rules.n - 1 in messages:
                shown = messages[rules.n - 1] if state.phase == "recover" else None
                messages[rules.n - 1] = menu(state, world[:-1], rules, shown)[name]
            if state.end is not None or (state.me not in hearing and state.phase == "recover"):
                found.append(state)
            else:
                found.append(after(state, messages if state.me in hearing else {}, rules))
        world = tuple(found)
    return world


@dataclass(frozen=True)
class Violation:
    """A property that does not hold, and how the liar has done it: its choices, step by step."""

    what: str
    choices: tuple[tuple[str, Choice], ...]


@dataclass
class Found:
    """What an exploration has seen: how many different situations, all ends, and the first violation."""

    situations: int
    ends: set[World]
    violation: Violation | None = None


def explore(rules: Rules, deviations: int | None = None, only: frozenset[str] | None = None) -> Found:
    """Play everything that the liar can do; stop at the first violation.

    Args:
        deviations: how many messages at most are not the right ones; None: any number.
        only: the names of what it may send; None: everything.
    """
    first = start(rules)
    budget = 10**6 if deviations is None else deviations
    best = {first: budget}
    stack: list[tuple[World, int, Any]] = [(first, budget, None)]
    ends: set[World] = set()
    while stack:
        world, left, path = stack.pop()
        if best[world] > left:
            continue
        if all(s.end is not None for s in world):
            ends.add(world)
            continue
        for before, crashed in _crashing(world, rules):
            for reached in itertools.product(*(m.items() for m in next_states(before, rules, only))):
                cost = crashed + sum(deviates for _, (deviates, _) in reached)
                if cost > left:
                    continue
                following = _canonical(tuple(state for state, _ in reached), rules)
                remaining = left if deviations is None else left - cost
                if (known := best.get(following, -1)) >= remaining:
                    continue
                best[following] = remaining
                here = (before, tuple(name for _, (_, name) in reached), path)
                if known < 0 and (what := violation_of(following, rules)):
                    return Found(len(best), ends, Violation(what, tuple(_choices(here))[::-1]))
                stack.append((following, remaining, here))
    return Found(len(best), ends)


def _crashing(world: World, rules: Rules) -> Iterator[tuple[World, int]]:
    """Give the members as they are, and with one more that has crashed before it sends anything."""
    yield world, 0
    if len(_ends(world, Crash)) < rules.crashes:
        for i, state in enumerate(world):
            if state.end is None:
                yield (*world[:i], state._replace(end=Crash()), *world[i + 1 :]), 1


def _choices(path: Any) -> Iterator[tuple[str, Choice]]:
    while path is not None:
        world, names, path = path
        phases = sorted({s.phase for s in world if s.end is None})
        yield (" ".join(phases), names)


def violation_of(world: World, rules: Rules) -> str:
    """Return which property does not hold in a situation, or an empty string."""
    return next((name for name, holds in PROPERTIES.items() if not holds(world, rules)), "")


def _ends(world: World, kind: type) -> list[Any]:
    return [s.end for s in world if isinstance(s.end, kind)]


def _retrying(world: World) -> list[State]:
    return [s for s in world if isinstance(s.end, Failure) and not s.end.fatal]


def _next_set(state: State, rules: Rules) -> frozenset[int]:
    """Return the members of the attempt after one that has failed, see `attempts.Attempts`."""
    assert isinstance(state.end, Failure)
    alone = frozenset().union(*(group for group in state.end.blamed if len(group) == 1))
    return frozenset(range(rules.n)) - state.end.lost - alone


def _same_result(world: World, rules: Rules) -> bool:
    return len({(end.value, end.lost, end.convicted) for end in _ends(world, Sum)}) <= 1


def _right_where_checked(world: World, rules: Rules) -> bool:
    return not rules.checkers or all(end.value == 0 for end in _ends(world, Sum))


def _never_named_alone(world: World, rules: Rules) -> bool:
    alone = frozenset({rules.n - 1})
    named = {g for s in world if s.end is not None for g in s.end.blamed if len(g) == 1}
    return named <= {alone} and all(s.convicted <= alone for s in world)


def _no_retry_beside_a_sum(world: World, rules: Rules) -> bool:
    return not (_retrying(world) and _ends(world, Sum))


def _retry_together(world: World, rules: Rules) -> bool:
    """All that make another attempt make it with the same members, and leave out no other one of them."""
    retrying = _retrying(world)
    sets = {_next_set(s, rules) for s in retrying}
    return len(sets) <= 1 and all(s.me in members for s in retrying for members in sets)


def _no_secret_without_certificate(world: World, rules: Rules) -> bool:
    """Secrets leave only for lists that all honest members have signed."""
    signed = [{s.me for s in world if ("confirm", s.me, state.lists) in s.known} for state in world]
    return all(len(who) == len(world) for who, state in zip(signed, world) if state.settled)


def _one_set(world: World, rules: Rules) -> bool:
    """Whose updates may have been opened together is not in another sum with fewer: its mark stops that."""
    retrying = _retrying(world)
    if not all(s.settled for s in world):
        return True
    everybody = frozenset(range(rules.n))
    for members in {_next_set(s, rules) for s in retrying}:
        marks = [_mark(everybody) if s.settled and rules.marks else NO_MARK for s in world if s.me in members]
        if members != everybody and not reasons_to_skip(marks, _mark(members)):
            return False
    return True


def _mark(members: frozenset[int]) -> bytes:
    return bytes(sorted(members)).ljust(32, b"\xff")


def _ends_in_time(world: World, rules: Rules) -> bool:
    return all(s.rounds <= 2 * rules.n for s in world)


PROPERTIES: dict[str, Callable[[World, Rules], bool]] = {
    "all that finish have the same sum": _same_result,
    "sums that an honest member checks are right": _right_where_checked,
    "no honest member is named alone": _never_named_alone,
    "none tries again where another has finished": _no_retry_beside_a_sum,
    "all try again with the same members": _retry_together,
    "no secret leaves without a certificate": _no_secret_without_certificate,
    "no update is in sums over two sets": _one_set,
    "every attempt ends": _ends_in_time,
}
