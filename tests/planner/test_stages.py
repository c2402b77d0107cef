"""Cuts of a chain of blocks: exact, held against trying all of them."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspeed.planner.stages import boundaries


def slowest(cuts, costs, speeds):
    return max(sum(costs[a:b]) / speed for a, b, speed in zip(cuts, cuts[1:], speeds))


def holds(cuts, sizes, caps):
    return all(sum(sizes[a:b]) <= cap for a, b, cap in zip(cuts, cuts[1:], caps))


def all_cuts(blocks, ranks):
    return [(0, *inner, blocks) for inner in combinations(range(1, blocks), ranks - 1)]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_other_division_is_faster(data):
    blocks = data.draw(st.integers(1, 8))
    ranks = data.draw(st.integers(1, blocks))
    costs = data.draw(st.lists(st.integers(1, 9), min_size=blocks, max_size=blocks))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=blocks, max_size=blocks))
    speeds = data.draw(st.lists(st.integers(1, 5), min_size=ranks, max_size=ranks))
    caps = data.draw(st.lists(st.integers(1, 40), min_size=ranks, max_size=ranks))
    fitting = [cuts for cuts in all_cuts(blocks, ranks) if holds(cuts, sizes, caps)]
    found = boundaries(costs, speeds, sizes, caps)
    if not fitting:
        assert found is None
    else:
        assert found in fitting
        assert slowest(found, costs, speeds) == pytest.approx(min(slowest(cuts, costs, speeds) for cuts in fitting))


def test_a_rank_twice_as_fast_takes_twice_the_blocks():
    assert boundaries([1.0] * 48, [2.0, 1.0]) == (0, 32, 48)


def test_memory_moves_the_cut():
    assert boundaries([1.0] * 12, [2.0, 1.0], [3] * 12, [18, 60]) == (0, 6, 12)
    assert boundaries([1.0] * 12, [2.0, 1.0], [3] * 12, [18, 12]) is None


def test_more_ranks_than_blocks():
    assert boundaries([1.0], [1.0, 1.0]) is None
