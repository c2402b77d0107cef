"""The time model: against the arithmetic it stands for, and against a simulation of the store's own order of loads."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspeed.models.catalogue import shape_of
from fedspeed.planner.hardware import PCIE
from fedspeed.planner.memory import sizes
from fedspeed.planner.plan import Setting, Task
from fedspeed.planner.timing import Visits, exchange_s, gather_s, load_s, seconds_of, walk
from tests.planner.cases import HUB, one_place

TASK = Task(shape_of(f"{HUB}Qwen-14B"), clients=1)
ARITHMETIC = ("forward", "again", "gradients")


def simulate(visits, load, blocks, resident, slots):
    """A training pass with the store's own rule for what to load next (engine/base/order.py), once it repeats itself.

    A load begins when it is decided on, or when the one before it has ended; it is decided on when a block comes into use or goes out of it.
    """
    from fedspeed.planner.layers.order import next_load

    order = [*range(blocks), *range(blocks - 2, -1, -1)]
    costs = [visits.forward + visits.shelf] * (blocks - 1) + [visits.forward + visits.head + visits.gradients]
    costs += [visits.again + visits.gradients + visits.shelf] * (blocks - 1)
    held, busy, ready, clock, channel, waited = set(), set(), {}, 0.0, 0.0, 0.0

    def load_ahead(upcoming):
        nonlocal channel
        wanted = [block for block in upcoming if block >= resident]
        while choice := next_load(wanted, held, busy, slots):
            block, victim = choice
            held.discard(victim)
            held.add(block)
            channel = max(channel, clock) + load
            ready[block] = channel

    for _ in range(3):
        start, waited = clock, 0.0
        for i, (block, cost) in enumerate(zip(order, costs)):
            upcoming = order[i:] + order[:blocks]
            load_ahead(upcoming)
            if block >= resident:
                busy.add(block)
            load_ahead(upcoming[1:])
            waited += max(0.0, ready.get(block, 0.0) - clock)
            clock = max(clock, ready.get(block, 0.0)) + cost
            busy.discard(block)
            load_ahead(upcoming[1:])
    return clock - start, waited


@settings(deadline=None, max_examples=200)
@given(blocks=st.integers(2, 12), resident=st.integers(0, 11), slots=st.integers(1, 5), load=st.floats(0.01, 9.0),
       forward=st.floats(0.1, 3.0), again=st.floats(0.1, 3.0), gradients=st.floats(0.1, 3.0))
def test_a_pass_waits_as_long_as_the_store_would(blocks, resident, slots, load, forward, again, gradients):
    resident = min(resident, blocks - 1)
    slots = min(slots, blocks - resident)
    visits = Visits(forward, again, gradients, head=0.5, shelf=0.05)
    assert walk(visits, load, 0.0, blocks, resident, slots) == pytest.approx(simulate(visits, load, blocks, resident, slots))


@settings(deadline=None)
@given(blocks=st.integers(2, 30), slots=st.integers(1, 4), load=st.floats(0.01, 9.0), ahead=st.floats(0.0, 4.0), forward=st.floats(0.1, 3.0))
def test_more_resident_blocks_never_cost_time(blocks, slots, load, ahead, forward):
    visits = Visits(forward, forward, 1.2 * forward, 0.5, 0.0)
    times = [walk(visits, load, ahead, blocks, resident, min(slots, blocks - resident))[0] for resident in range(blocks - min(slots, blocks) + 1)]
    assert all(later <= earlier + 1e-9 for earlier, later in zip(times, times[1:]))


def test_without_loads_a_pass_is_its_arithmetic():
    visits = Visits(1.0, 2.0, 3.0, 0.5, 0.25)
    assert walk(visits, 9.0, 0.0, 4, 4, 0) == walk(visits, 9.0, 0.0, 4, 0, 4) == (4 * (1 + 3) + 3 * 2 + 0.5 + 6 * 0.25, 0.0)
    assert walk(visits, 9.0, 0.0, 4, 0, 1)[1] == 2 * 3 * 9.0  # one slot: nothing is loaded ahead


def test_four_operations_a_parameter_and_token_or_six_where_blocks_are_computed_again():
    place = one_place()
    unit = TASK.shape.block * TASK.shape.layers * TASK.rows * TASK.tokens / place.node.device.flops["bf16"]
    for setting, c in ((Setting("stock", 4, 1), 4), (Setting("stock", 4, 1, checkpointing=True), 6), (Setting("resident", 4, 1), 6)):
        causes = seconds_of(TASK, setting, place).causes
        assert sum(causes[cause] for cause in ARITHMETIC) / unit == pytest.approx(c, rel=0.12)


@pytest.mark.parametrize(("facts", "pcie", "dtype", "tokens"), [("gpu=rtx3090", 4, "bf16", 890), ("gpu=rtx2080ti", 3, "fp16", 1330)])
def test_loads_hide_from_about_as_many_tokens_as_the_rule_of_thumb_says(facts, pcie, dtype, tokens):
    """T >= 2 beta F / (c B); one rank, so that the bus is its own."""
    place = one_place(f"{facts} ram_gib=64", slots=1)
    assert place.node.device.host_rate == PCIE[pcie]

    def waits(rows):
        task = replace(TASK, tokens=64, rows=rows, dtype=dtype)
        seconds = seconds_of(task, Setting("ram", rows, 1, block_inputs="device"), place)
        return seconds.waited / seconds.loads

    # Forward has a third of the arithmetic and half of the loads: there loads hide only from half as many tokens again.
    assert waits(round(0.6 * tokens / 64)) > 0.25
    assert waits(round(1.7 * tokens / 64)) < 0.02


def test_hidden_and_waited_make_up_the_loads():
    seconds = seconds_of(replace(TASK, rows=1, tokens=256), Setting("nvme", 1, 1), one_place())
    assert 0 < seconds.hidden < seconds.loads == pytest.approx(seconds.hidden + seconds.waited)
    assert seconds.total == pytest.approx(sum(seconds.causes.values()))


def test_what_a_step_loads():
    """Blocks twice, but for those that are held; head and embedding in turn where the embedding cannot be read row by row."""
    place, n = replace(one_place(), cluster_nodes=7, cluster_ranks=14), TASK.shape.layers
    unit = sizes(TASK.shape, 2)
    for tier, ends in (("ram", 0), ("nvme", 0), ("client", 2), ("cluster", 2)):
        setting = Setting(tier, 4, 1, resident_blocks=5, slots=3)
        expected = 2 * (n - 8) * load_s(unit.block, setting, place) + ends * load_s(unit.head, setting, place)
        assert seconds_of(TASK, setting, place).loads == pytest.approx(expected)
    tied = replace(TASK, shape=shape_of("gpt3-13b"))
    setting = Setting("cluster", 4, 1)
    assert seconds_of(tied, setting, place).loads == pytest.approx(2 * 38 * load_s(sizes(tied.shape, 2).block, setting, place))


def test_the_head_takes_its_turn_among_the_blocks():
    visits = Visits(1.0, 1.0, 1.0, 0.0, 0.0)
    assert walk(visits, 2.0, 0.0, 6, 0, 2)[1] + 2 * 5.0 > walk(visits, 2.0, 5.0, 6, 0, 2)[1] > walk(visits, 2.0, 0.0, 6, 0, 2)[1]


def test_slower_ways_to_load_take_longer():
    place = one_place()
    times = {tier: load_s(10**9, Setting(tier, 4, 1), replace(place, cluster_nodes=7, cluster_ranks=14)) for tier in ("ram", "nvme", "cluster")}
    assert times["ram"] < times["nvme"] < times["cluster"]
    assert load_s(10**9, Setting("nvme", 4, 1), replace(place, ranks_here=4)) > 1.8 * times["nvme"]  # a disk is shared


def test_a_gather_brings_what_a_node_lacks_over_its_link():
    place = one_place()
    assert gather_s(14 * 10**9, 14, 7, place) == pytest.approx(12 * 10**9 / place.node.link_rate, rel=1e-3)
    assert gather_s(14 * 10**9, 2, 1, place) == pytest.approx(7 * 10**9 / place.node.local_rate, rel=1e-3)


def test_clients_that_share_a_pass_share_its_loads():
    place = one_place(slots=1, clients=4)
    one, two, four = (seconds_of(replace(TASK, tokens=128), Setting("ram", 4, 1, seats=seats), place) for seats in (1, 2, 4))
    assert one.loads == pytest.approx(4 * four.loads) and two.loads == pytest.approx(2 * four.loads)
    assert one.causes["forward"] == pytest.approx(four.causes["forward"])
    assert four.total < two.total < one.total
    three = seconds_of(replace(TASK, tokens=128), Setting("ram", 4, 1, seats=3), place)  # three together, then one
    assert three.loads == pytest.approx(2 * four.loads)


def test_small_micro_batches_read_the_weights_more_often():
    times = [seconds_of(TASK, Setting("resident", micro, 4 // micro, block_inputs="device"), one_place()).total for micro in (4, 2, 1)]
    assert times == sorted(times) and times[0] < times[2]


def test_nobody_to_exchange_with():
    place = one_place()
    assert exchange_s(TASK, place) == 0.0
    assert exchange_s(TASK, replace(place, participants=10)) == pytest.approx(2 * 0.9 * TASK.trainable * 4 / place.node.link_rate)
