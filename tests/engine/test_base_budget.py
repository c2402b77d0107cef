"""How much of the device the base may take: slots and resident blocks within a budget."""

from dataclasses import replace

import pytest

from fedspeed.schedule.loads import spread


@pytest.mark.parametrize("budget,expected", [(200, 10), (95, 10), (94, 9), (50, 5), (49, 4), (14, 1)])
def test_there_are_as_many_slots_as_the_budget_has_room_for(budget, expected):
    """Ten blocks of 9 bytes, and 5 bytes for the rest: the base never takes more than its budget."""
    from fedspeed.engine.base.placement import BaseSizes, resident_count, slots_of
    from fedspeed.engine.config import EngineConfig

    sizes = BaseSizes(block=9, blocks=10, embedding_and_head=8, shared_slot=4, resident=1)
    options = EngineConfig(base_gib=(budget + 0.5) / 2**30)
    assert slots_of(options, sizes) == expected and resident_count(options, sizes) == 0
    assert sizes.on_device(0, expected) <= budget
    divided = replace(sizes, holders=2)
    found = next((n for n in range(10, -1, -1) if divided.on_device(0, n) <= budget), 0)
    assert found <= expected
    assert divided.on_device(0, 2) == 2 * 9 + 4 + 1 + 49, "half of what streams lies on the device too"


def test_a_budget_that_nothing_fits_names_one_that_does():
    from fedspeed.engine.base.placement import BaseSizes, slots_of
    from fedspeed.engine.config import EngineConfig
    from fedspeed.errors import FedSpeedError

    sizes = BaseSizes(600 * 2**20, 48, 200 * 2**20, 100 * 2**20, 5000)
    pipeline = EngineConfig(base_gib=1.0, pipeline="client", block_slots=4)
    for options, least in ((EngineConfig(base_gib=0.6), 1), (pipeline, 4)):
        with pytest.raises(FedSpeedError, match=r"set engine.base_gib=([\d.]+) or more") as refused:
            slots_of(options, sizes)
        named = float(str(refused.value).partition("set engine.base_gib=")[2].split()[0])
        assert slots_of(replace(options, base_gib=named), sizes) == least


def test_no_more_slots_or_blocks_that_stay_than_there_are_blocks():
    from fedspeed.engine.base.placement import BaseSizes, resident_count, slots_of
    from fedspeed.engine.config import EngineConfig

    sizes = BaseSizes(9, 10, 8, 4, 1)
    assert [resident_count(EngineConfig(resident_blocks=n), sizes) for n in (0, 4, 999)] == [0, 4, 10]
    assert [slots_of(EngineConfig(resident_blocks=n, block_slots=7), sizes) for n in (0, 4, 999)] == [7, 6, 0]
    assert BaseSizes(9, 4, 8, 4, 1).on_device(0, slots=64) == 4 * 9 + 5, (
        "slots beyond the blocks are not made"
    )
    assert slots_of(EngineConfig(base_gib=1.0), BaseSizes(0, 0, 8, 4, 1)) == 0, "all blocks train"


def test_blocks_that_stay_are_spread_over_the_depth():
    assert [spread(12, n) for n in (0, 1, 3, 5, 12)] == [[], [0], [0, 4, 8], [0, 2, 4, 7, 9], list(range(12))]
    for blocks in range(1, 40):
        for count in range(1, blocks + 1):
            places = spread(blocks, count)
            gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + blocks])]
            assert len(set(places)) == count and max(gaps) - min(gaps) <= 1
