"""The best cuts of a chain of blocks, compared with a search over all cuts."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspeed.models.catalogue import shape_of
from fedspeed.planner.pipeline.division import (
    boundaries,
    client_traffic,
    cluster_traffic,
    divide,
    stage_bytes,
    usable_bytes,
)
from fedspeed.planner.plan import Task
from tests.planner.cases import HUB, one_profile


def slowest(cuts, costs, speeds):
    return max(sum(costs[a:b]) / speed for a, b, speed in zip(cuts, cuts[1:], speeds))


def holds(cuts, sizes, caps):
    return all(sum(sizes[a:b]) <= cap for a, b, cap in zip(cuts, cuts[1:], caps))


def cut(costs, speeds, sizes=(), caps=()):
    sizes = sizes or [0] * len(costs)
    caps = caps or [0] * len(speeds)
    return boundaries(
        len(costs),
        len(speeds),
        lambda rank, start, end: (
            sum(costs[start:end]) / speeds[rank] if sum(sizes[start:end]) <= caps[rank] else float("inf")
        ),
    )


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
    found = cut(costs, speeds, sizes, caps)
    if not fitting:
        assert found is None
    else:
        assert found in fitting
        assert slowest(found, costs, speeds) == pytest.approx(
            min(slowest(cuts, costs, speeds) for cuts in fitting)
        )


def test_a_rank_twice_as_fast_takes_twice_the_blocks():
    assert cut([1.0] * 48, [2.0, 1.0]) == (0, 32, 48)


def test_memory_moves_the_cut():
    assert cut([1.0] * 12, [2.0, 1.0], [3] * 12, [18, 60]) == (0, 6, 12)
    assert cut([1.0] * 12, [2.0, 1.0], [3] * 12, [18, 12]) is None


def test_more_ranks_than_blocks():
    assert cut([1.0], [1.0, 1.0]) is None


def places(count, facts="gpu=rtx3090 ram_gib=64"):
    return [one_profile(facts)] * count


def task(**changed):
    return Task(shape_of(f"{HUB}Qwen-7B"), 1, dtype="fp16", **changed)


def blocks_of(cuts):
    return [b - a for a, b in zip(cuts, cuts[1:])]


def test_a_faster_card_gets_more_blocks():
    cuts = divide(
        task(), [*places(1), *places(1, "gpu=rtx2080ti ram_gib=64")], client_traffic(2, 1, 4, recompute=True)
    )
    fast, slow = blocks_of(cuts)
    assert fast + slow == 28 and fast > slow


def test_activations_of_the_micro_batches_under_way_move_a_cut():
    """The first stage of 1F1B keeps the most activations and gets the fewest blocks if memory is short; with
    recomputation it does not.
    """
    cards = places(4, "gpu=rtx3090 gpu_mem_gib=11 ram_gib=64")
    kept, again = (divide(task(), cards, client_traffic(4, 3, 8, recompute)) for recompute in (False, True))
    assert blocks_of(kept)[0] < blocks_of(again)[0]
    assert divide(task(), cards, client_traffic(4, 5, 8, recompute=False)) is None
    for rank, blocks in enumerate(blocks_of(kept)):
        assert stage_bytes(task(), cards[rank], client_traffic(4, 3, 8, False), rank, blocks) <= usable_bytes(
            cards[rank]
        )


def test_the_head_is_work_of_its_stage_and_weights_where_labels_are():
    with_head = divide(task(answer_share=1.0), places(2), client_traffic(2, 1, 4, recompute=True))
    assert blocks_of(with_head)[0] > blocks_of(with_head)[1]
    shared = cluster_traffic(4, [0, 2], 1, 8, recompute=True)
    sizes = [stage_bytes(task(), places(1)[0], shared, rank, 7) for rank in range(4)]
    assert shared.heads == (0.5, 0.0, 0.5, 0.0) and sizes[0] > sizes[1] and sizes[2] > sizes[3]
