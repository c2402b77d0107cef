"""Passes are counted where ranks must pass together, because a wrong number would make the other ranks wait
forever.
"""

import pytest

from fedspeed.engine.client_engine import ClientEngine
from tests.tiny import NoClock


class Passing(ClientEngine):
    """Makes passes without work; another rank of its group makes four."""

    def __init__(self, matched):
        self._matched_group = matched
        self._clock = NoClock()
        self.idle = 0
        self._passes_declared = None
        self._passes_made = 0

    def _agree(self, passes):
        return 4

    def _idle_pass(self, backward):
        self.idle += 1

    def make(self, declared, made):
        with self.matched_passes(declared, backward=True):
            for _ in range(made):
                self._count_pass()


Passing.__abstractmethods__ = frozenset()


@pytest.mark.parametrize(("declared", "made", "counted"), [(3, 2, 2), (3, 5, 4), (0, 1, 1)])
def test_a_wrong_number_of_passes_is_refused_at_once(declared, made, counted):
    """If more passes are made than declared, the error comes before one that no other rank joins."""
    engine = Passing("others")
    message = f"{declared} passes were declared .* and {counted} made: Method.passes"
    with pytest.raises(AssertionError, match=message):
        engine.make(declared, made)
    assert not engine.idle
    engine.make(3, 3)
    assert engine.idle == 1
    engine._count_pass()  # outside of matched_passes nothing is counted


def test_where_nobody_keeps_step_nobody_counts():
    Passing(None).make(3, 5)


def test_an_error_inside_is_raised_unchanged():
    engine = Passing("others")
    with pytest.raises(KeyError), engine.matched_passes(3, backward=True):
        raise KeyError("x")
    engine.make(4, 4)
