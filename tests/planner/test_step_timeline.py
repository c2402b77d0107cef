"""The timeline of a step, compared with the store's order of loads, the predicted shares of improvements, and
sums calculated by hand.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import step_model
from fedspeed.models.catalogue import shape_of
from fedspeed.planner.step_timeline import (
    BEHIND_LOADS,
    DEVICE,
    HOST,
    INLINE,
    BlockTimes,
    StreamedBase,
    step_time,
)
from fedspeed.schedule.kept_activations import equal_kept_counts, kept_counts
from fedspeed.schedule.loads import next_load, spread


def simulate(times, base):
    """A training pass with the store's own rule for what to load next (schedule/loads.py), once it
    repeats itself.

    A load begins when it is decided on, or when the one before it has ended; it is decided on when a block
    comes into use or goes out of it.
    """
    blocks = base.blocks
    order = [*range(blocks), *range(blocks - 2, -1, -1)]
    costs = (
        [times.forward] * (blocks - 1)
        + [times.forward + times.head + times.gradients]
        + [times.recompute + times.gradients] * (blocks - 1)
    )
    held = set()
    busy = set()
    ready = {}
    clock = 0.0
    channel = 0.0
    waited = 0.0

    def load_ahead(upcoming):
        nonlocal channel
        wanted = [block for block in upcoming if block not in base.resident]
        while choice := next_load(wanted, held, busy, base.slots):
            block, victim = choice
            held.discard(victim)
            held.add(block)
            channel = max(channel, clock) + base.load
            ready[block] = channel

    for _ in range(3):
        start = clock
        waited = 0.0
        for i, (block, cost) in enumerate(zip(order, costs)):
            upcoming = order[i:] + order[:blocks]
            load_ahead(upcoming)
            if block not in base.resident:
                busy.add(block)
            load_ahead(upcoming[1:])
            waited += max(0.0, ready.get(block, 0.0) - clock)
            clock = max(clock, ready.get(block, 0.0)) + cost
            busy.discard(block)
            load_ahead(upcoming[1:])
    return clock - start, waited


@settings(deadline=None, max_examples=150)
@given(
    blocks=st.integers(2, 12),
    slots=st.integers(1, 12),
    resident=st.sets(st.integers(0, 11)),
    load=st.floats(0.01, 9.0),
    forward=st.floats(0.1, 3.0),
    again=st.floats(0.1, 3.0),
    gradients=st.floats(0.1, 3.0),
)
def test_a_step_waits_as_long_as_the_store_would(blocks, slots, resident, load, forward, *, again, gradients):
    times = BlockTimes(forward, again, gradients, head=0.5)
    base = StreamedBase(blocks, slots, load, frozenset(block for block in resident if block < blocks))
    found = step_time(times, base, 1)
    assert (found.seconds, found.waited_for_loads) == pytest.approx(simulate(times, base))


@settings(deadline=None, max_examples=150)
@given(
    blocks=st.integers(2, 20),
    slots=st.integers(1, 6),
    resident=st.integers(0, 6),
    load=st.floats(0.01, 9.0),
    forward=st.floats(0.1, 3.0),
    kept=st.integers(0, 30),
)
def test_more_memory_never_costs_time(blocks, slots, resident, load, forward, *, kept):
    """A step is no slower with one more slot, resident block or kept activation, and a slot is worth no less
    than a resident block. Inputs are on the device: on the host, their transfers delay loads, and a different
    order may cost a percent.
    """
    times = BlockTimes(forward, forward, 1.2 * forward, 0.5, 0.0)
    resident = min(resident, blocks - 1)

    def seconds(slots, resident, kept=kept):
        stay = frozenset(spread(blocks, resident)) if resident else frozenset()
        return step_time(times, StreamedBase(blocks, slots, load, stay), 2, inputs=DEVICE, kept=kept).seconds

    now = seconds(slots, resident) + 1e-9
    assert seconds(slots + 1, resident) <= now
    assert seconds(slots, resident + 1) <= now
    assert seconds(slots, resident, kept + 1) <= now
    if resident and slots + resident <= blocks:
        assert seconds(slots + 1, resident - 1) <= now


# The paper budget: inputs behind loads, between loads, hidden; a quarter of the blocks
# spread; fixed cost of 10 instead of 50 ms.
PAPER = {
    ("7B", 8192): (0.64, 0.83, 0.86, 0.91, 0.96),
    ("14B", 8192): (0.65, 0.86, 0.90, 0.95, 0.97),
    ("7B", 32768): (0.83, 0.90, 0.98, 0.98, 0.996),
    ("14B", 32768): (0.83, 0.89, 0.99, 0.99, 0.998),
}


@pytest.mark.parametrize(("model", "tokens"), PAPER)
def test_the_paper_budget(model, tokens):
    shares = step_model.paper_budget(step_model.Work(shape_of(step_model.MODELS[model]), tokens))
    assert shares == pytest.approx(PAPER[model, tokens], abs=0.006)


def test_slots_are_worth_more_than_resident_blocks():
    """Compare memory for 7 blocks more than two slots: as the lowest blocks, as spread blocks and as slots,
    for 7B with 8k tokens, and on a bus of half the speed.
    """
    work = step_model.Work(shape_of(step_model.MODELS["7B"]), 8192, micro_batch=2048)
    shares = [
        work.share(resident=tuple(range(7)), fixed=0.01),
        work.share(resident=tuple(spread(28, 7)), fixed=0.01),
        work.share(slots=9, fixed=0.01),
    ]
    assert shares == pytest.approx([0.918, 0.958, 0.983], abs=0.001)
    assert step_model.paper_budget(replace(work, micro_batch=4096, bus=25e9))[-1] == pytest.approx(
        0.73, abs=0.005
    )


def test_the_improved_step_is_what_was_asked_for():
    """The share of pure arithmetic with recomputation in 11 GiB is 0.93 for 7B with 8k tokens and 0.98 for
    14B with 32k.
    """
    for model, tokens, least in (("7B", 8192, 0.93), ("14B", 32768, 0.98)):
        work = step_model.Work(shape_of(step_model.MODELS[model]), tokens)
        found = step_model.improved(work, 11)
        assert found.share >= least
        # Without kept activations too.
        assert work.share(slots=found.slots, inputs=found.inputs, fixed=step_model.FIXED) >= least
        assert work.share(inputs=BEHIND_LOADS, fixed=step_model.FIXED_NOW) < 0.84


def test_nothing_moves_and_nothing_is_waited_for():
    times = BlockTimes(1.0, 2.0, 3.0, 0.5)
    assert step_time(times, StreamedBase(4, 0, 9.0, frozenset(range(4))), 2, fixed=0.25) == step_time(
        times, StreamedBase(4, 4, 9.0), 2, fixed=0.25
    )
    assert (
        step_time(times, StreamedBase(4, 4, 9.0), 2, fixed=0.25).seconds
        == 2 * (4 * (1 + 3) + 3 * 2 + 0.5) + 0.25
    )
    # With one slot there is no prefetch.
    assert step_time(times, StreamedBase(4, 1, 9.0), 2).waited_for_loads == 2 * 3 * 9.0
    assert step_time(times, StreamedBase(1, 1, 9.0), 2).seconds == 2 * 4.5


def test_what_is_kept_is_not_computed_again():
    assert all(
        equal_kept_counts(count, micro_batches, blocks)
        == kept_counts(3 * count + 2, [3] * micro_batches, blocks)
        for blocks in (1, 2, 5)
        for micro_batches in (1, 3)
        for count in range(20)
    )
    times = BlockTimes(1.0, 2.0, 3.0, 0.5, 0.125)
    # The input is not transferred to the host and back.
    for inputs, saved in ((DEVICE, 2.0), (INLINE, 2.25), (BEHIND_LOADS, 2.25)):
        seconds = [
            step_time(
                times, StreamedBase(4, 0, 9.0, frozenset(range(4))), 3, inputs=inputs, kept=kept
            ).seconds
            for kept in range(12)
        ]
        assert [before - after for before, after in zip(seconds, seconds[1:])] == pytest.approx(
            [saved] * 9 + [0.0] * 2
        )


def test_block_inputs_travel_beside_the_arithmetic():
    """Compare three blocks and one micro-batch with times calculated by hand."""
    times = BlockTimes(1.0, 1.0, 2.0, 0.0, 0.5)
    resident = StreamedBase(3, 0, 0.0, frozenset(range(3)))
    # Forward ends at 2, the last block at 5. The inputs of the middle block reach the host at 1.5 and return
    # from 2 on. All transfers are hidden.
    assert step_time(times, resident, 1, inputs=HOST).seconds == 2 + 3 + 3 + 3
    # On a slow bus they reach the host at 5 and 10 and return at 15 (those of the first block at 20).
    slow = step_time(replace(times, input_transfer=5.0), resident, 1, inputs=HOST)
    assert slow.seconds == 20 + 3 and slow.waited_for_inputs == slow.seconds - 11
    # With several micro-batches, all transfers begin before the first is computed: the last one decides.
    many = step_time(replace(times, input_transfer=5.0), resident, 2, inputs=HOST)
    assert many.seconds == 40 + 3
    # On the compute stream every transfer counts: two blocks in both directions.
    assert step_time(times, resident, 1, inputs=INLINE).seconds == 11 + 4 * 0.5


def test_block_inputs_wait_behind_a_load_that_was_possible_before():
    """With three blocks and two slots there is one load in the forward pass (the last block, into the slot of
    the first) and one in the backward pass (the first, into the slot of the last).
    """
    times = BlockTimes(1.0, 1.0, 2.0, 0.0, 0.5)
    base = StreamedBase(3, 2, 10.0)
    # The load of block 2 begins at 1 and ends at 11; it computes until 14, when the load of block 0 begins.
    # Block 1's inputs came after the first load, from 11 on. Block 1 computes until 17. Block 0's inputs,
    # requested at 14 too, come behind its weights, from 24 to 24.5.
    assert step_time(times, base, 1, inputs=HOST).seconds == 24.5 + 3
    # With a separate copy engine, they come from 14 on.
    assert step_time(times, replace(base, shares_copy_engine=False), 1, inputs=HOST).seconds == 24 + 3
    # On the compute stream they wait behind the weights, or go between: forward to 1.5 and 3, load from 1.5
    # to 11.5, last block to 14.5. Behind the load of block 0, to 24.5: block 1's to 25, computed to 28; block
    # 0's to 28.5.
    assert step_time(times, base, 1, inputs=BEHIND_LOADS).seconds == 31.5
    assert step_time(times, base, 1, inputs=INLINE).seconds == 24.5 + 0.5 + 3
    # Inputs in transfer to the host slow down the load at the same time.
    assert step_time(times, replace(base, slowdown=1.5), 1, inputs=HOST).seconds == 24.5 + 3 + 1.5


def test_the_head_takes_its_turn_among_the_blocks():
    times = BlockTimes(1.0, 1.0, 1.0, 0.0)
    waited = [
        step_time(times, StreamedBase(6, 2, 2.0, head_load=ahead), 1).waited_for_loads for ahead in (0.0, 5.0)
    ]
    assert waited[0] < waited[1] < waited[0] + 2 * 5.0
    # Without other loads the head arrives at 5, after the other blocks have taken 1 each. The embedding
    # arrives at 5 + 2 + 5, and the step ends then.
    assert step_time(times, StreamedBase(3, 3, 2.0, head_load=5.0), 1).seconds == 5 + 2 + 5
