"""All members of an attempt in one process and one thread, step by step: for tests, for simulation, and for
the audit. Whoever uses it may change, drop or keep any message on its way, and kill any member in any state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedspeed.routing.anonymous.parameters import Agreed, Lost, Swap, Void
from fedspeed.routing.anonymous.protocol import Member

Messages = dict[tuple[int, int], bytes]  # by (sender, receiver)


@dataclass(frozen=True)
class Kill:
    """A member dies in a state, when its messages have reached `heard` and nobody else."""

    member: int
    state: str
    heard: frozenset[int] = frozenset()


@dataclass
class _Player:
    member: Member
    steps: object
    swap: Swap | None = None
    end: Agreed | Void | None = None


@dataclass
class Played:
    """How each member ended, None for those who were killed; `states` are those that anyone was in, in
    order.
    """

    ends: list[Agreed | Void | None]
    states: list[str] = field(default_factory=list)


def play(
    members: Sequence[Member],
    on_messages: Callable[[str, Messages], None] | None = None,
    kills: Sequence[Kill] = (),
) -> Played:
    """Args:
    on_messages: sees all messages of a state before they arrive, and may change them.
    """
    players = [_Player(member, member.run()) for member in members]
    doomed: Mapping[tuple[int, str], Kill] = {(kill.member, kill.state): kill for kill in kills}
    dead: set[int] = set()
    states: list[str] = []
    for player in players:
        _go_on(player, lambda steps: next(steps))
    while any(player.swap for i, player in enumerate(players) if i not in dead):
        waiting = {i: player.swap for i, player in enumerate(players) if player.swap and i not in dead}
        settling = any(swap.state == "settle" for swap in waiting.values()) and any(
            swap.state != "settle" for swap in waiting.values()
        )
        if not settling and len({swap.state for swap in waiting.values()}) > 1:
            for i in waiting:
                _go_on(players[i], lambda steps: steps.throw(Lost(frozenset(), settling=True)))
            continue
        state = "settle" if settling else next(iter(waiting.values())).state
        states.append(state)
        dying = {i: doomed[i, swap.state] for i, swap in waiting.items() if (i, swap.state) in doomed}
        messages = {
            (i, j): _whole(swap.parts[j])
            for i, swap in waiting.items()
            for j in range(len(players))
            if swap.state == state
        }
        if on_messages:
            on_messages(state, messages)
        dead |= dying.keys()
        for i, swap in waiting.items():
            if i in dead:
                continue
            if swap.state != state:
                _go_on(players[i], lambda steps: steps.throw(Lost(frozenset(), settling=True)))
                continue
            # One that sends another number of bytes than everybody knows it must is as good as gone.
            missing = {
                j
                for j, size in enumerate(swap.sizes)
                if size
                and (
                    j in dead
                    and not (j in dying and i in dying[j].heard)
                    or len(messages.get((j, i), b"")) != size
                )
            }
            if settling and missing - dead:  # they are on their way to settle too
                continue
            if missing:
                _go_on(players[i], lambda steps, lost=frozenset(missing): steps.throw(Lost(lost)))
            else:
                came = [messages.get((j, i), b"") for j in range(len(players))]
                _go_on(players[i], lambda steps, came=came: steps.send(came))
    return Played([None if i in dead else player.end for i, player in enumerate(players)], states)


def _whole(part) -> bytes:
    return b"".join(part) if isinstance(part, list) else bytes(part)


def _go_on(player: _Player, step) -> None:
    try:
        player.swap = step(player.steps)
        player.member.state = player.swap.state
    except StopIteration as stop:
        player.swap = None
        player.end = stop.value
    except Void as void:
        player.swap = None
        player.end = void
