"""Coalitions whose members change what they send, and what must hold whatever they do."""

import numpy as np

from fedspeed.routing.anonymous.phases import AgreedSum, MembersLost, as_message
from fedspeed.routing.anonymous.protocol import Member

SIZES = (3, 4, 5, 7)


def coalitions(turn: int = 0, sizes=SIZES):
    """Return (n, liars, honest) for every size and every number of liars that leaves two honest members.

    Args:
        turn: which members lie. In each attempt every member is source, relay, owner and backup.
    """
    for n in sizes:
        for f in range(1, n - 1):
            liars = frozenset((turn + i) % n for i in range(f))
            yield n, liars, sorted(set(range(n)) - liars)


def liar(changes, victims=None):
    """Return a class of members that change what they send.

    Args:
        changes: by phase, a function of the member, the receiver's number and the message, which returns what
            is sent.
        victims: receivers whose messages are changed; None: all but the member itself.
    """

    class Liar(Member):
        def run(self):
            steps = super().run()
            try:
                swap = next(steps)
                while True:
                    if swap.phase in changes:
                        swap.parts = [self.changed(swap.phase, i, part) for i, part in enumerate(swap.parts)]
                    try:
                        arrived = yield swap
                    except MembersLost as loss:
                        swap = steps.throw(loss)
                    else:
                        swap = steps.send(arrived)
            except StopIteration as stop:
                return stop.value

        def changed(self, phase, i, part):
            chosen = i != self.me if victims is None else i in victims
            return changes[phase](self, i, as_message(part)) if chosen and len(part) else part

    return Liar


def check(results, liars, *, ended: bool | None = None):
    """Check what holds whatever liars do: honest members agree, and name no set of members that has no liar.

    Args:
        results: of all members. ended: whether all honest ones must have a sum; None: that does not matter.
    """
    honest = [result for i, result in enumerate(results) if i not in liars]
    sums = [result.values for result in honest if isinstance(result, AgreedSum)]
    assert all(np.array_equal(values, sums[0]) for values in sums)
    if ended is not None:
        assert len(sums) == (len(honest) if ended else 0), honest
    for result in honest:
        assert all(group & liars for group in result.blamed), result.blamed
        assert result.lost <= liars, result.lost


def alone(result) -> frozenset[int]:
    """Return the members that a result names alone."""
    return frozenset(i for group in result.blamed if len(group) == 1 for i in group)
