"""The time model, compared with counts of operations and bytes."""

from dataclasses import replace

import pytest

from fedspeed.errors import PlanError
from fedspeed.models.catalogue import shape_of
from fedspeed.planner.cards import PCIE
from fedspeed.planner.memory import sizes
from fedspeed.planner.plan import Setting, Task
from fedspeed.planner.timing import (
    arithmetic_of,
    block_times_of,
    exchange_s,
    gather_s,
    load_s,
    matrix_rate,
    seconds_of,
)
from tests.planner.cases import HUB, one_profile

TASK = Task(shape_of(f"{HUB}Qwen-14B"), clients=1)
ARITHMETIC = ("forward", "again", "gradients")


def test_four_operations_a_parameter_and_token_or_six_where_blocks_are_computed_again():
    profile = one_profile()
    unit = TASK.shape.block * TASK.shape.layers * TASK.rows * TASK.tokens / profile.node.device.flops["bf16"]
    for setting, c in (
        (Setting("stock", 4, 1), 4),
        (Setting("stock", 4, 1, checkpointing=True), 6),
        (Setting("resident", 4, 1), 6),
    ):
        causes = seconds_of(TASK, setting, profile).causes
        assert sum(causes[cause] for cause in ARITHMETIC) / unit == pytest.approx(c, rel=0.12)


@pytest.mark.parametrize(
    ("facts", "pcie", "dtype", "tokens"),
    [("gpu=rtx3090", 4, "bf16", 890), ("gpu=rtx2080ti", 3, "fp16", 1330)],
)
def test_loads_hide_from_about_as_many_tokens_as_the_rule_of_thumb_says(facts, pcie, dtype, tokens):
    """The rule is T >= 2 beta F / (c B). There is one rank, which does not share the bus."""
    profile = one_profile(f"{facts} ram_gib=64", slots=1)
    assert profile.node.device.host_rate == PCIE[pcie]

    def waits(rows):
        task = replace(TASK, tokens=64, rows=rows, dtype=dtype)
        seconds = seconds_of(task, Setting("ram", rows, 1, block_inputs="device"), profile)
        return seconds.waited / seconds.loads

    # The forward pass has a third of the arithmetic and half of the loads, and therefore its loads are hidden
    # only with 1.5 times the tokens.
    assert waits(round(0.6 * tokens / 64)) > 0.25
    assert waits(round(1.7 * tokens / 64)) < 0.02


def test_hidden_and_waited_make_up_the_loads():
    seconds = seconds_of(replace(TASK, rows=1, tokens=256), Setting("nvme", 1, 1), one_profile())
    assert 0 < seconds.hidden < seconds.loads == pytest.approx(seconds.hidden + seconds.waited)
    assert seconds.total == pytest.approx(sum(seconds.causes.values()))


def test_what_a_step_loads():
    """A step loads every block twice, except resident ones and those in slots, and head and embedding in turn
    if the embedding cannot be read row by row.
    """
    profile = replace(one_profile(), cluster_nodes=7, cluster_ranks=14)
    n = TASK.shape.layers
    unit = sizes(TASK.shape, 2)
    for tier, ends in (("ram", 0), ("nvme", 0), ("client", 2), ("cluster", 2)):
        setting = Setting(tier, 4, 1, resident_blocks=5, block_slots=3)
        expected = 2 * (n - 8) * load_s(unit.block, setting, profile) + ends * load_s(
            unit.head, setting, profile
        )
        assert seconds_of(TASK, setting, profile).loads == pytest.approx(expected)
    tied = replace(TASK, shape=shape_of("gpt3-13b"))
    setting = Setting("cluster", 4, 1)
    assert seconds_of(tied, setting, profile).loads == pytest.approx(
        2 * 38 * load_s(sizes(tied.shape, 2).block, setting, profile)
    )


def test_slower_ways_to_load_take_longer():
    profile = one_profile()
    times = {
        tier: load_s(10**9, Setting(tier, 4, 1), replace(profile, cluster_nodes=7, cluster_ranks=14))
        for tier in ("ram", "nvme", "cluster")
    }
    assert times["ram"] < times["nvme"] < times["cluster"]
    assert (
        load_s(10**9, Setting("nvme", 4, 1), replace(profile, ranks_here=4)) > 1.8 * times["nvme"]
    )  # a disk is shared
    # One of two buffers is filled while the other is copied: the slower of both counts.
    fast = replace(profile, node=replace(profile.node, disk_rate=1e15))
    assert load_s(10**9, Setting("nvme", 4, 1), fast) == pytest.approx(times["ram"])


def test_a_gather_brings_what_a_node_lacks_over_its_link():
    profile = one_profile()
    assert gather_s(14 * 10**9, 14, 7, profile) == pytest.approx(
        12 * 10**9 / profile.node.link_rate, rel=1e-3
    )
    assert gather_s(14 * 10**9, 2, 1, profile) == pytest.approx(7 * 10**9 / profile.node.local_rate, rel=1e-3)


def test_clients_that_share_a_pass_share_its_loads():
    profile = one_profile(slots=1, clients=4)
    one, two, four = (
        seconds_of(replace(TASK, tokens=128), Setting("ram", 4, 1, client_slots=client_slots), profile)
        for client_slots in (1, 2, 4)
    )
    assert one.loads == pytest.approx(4 * four.loads) and two.loads == pytest.approx(2 * four.loads)
    assert one.causes["forward"] == pytest.approx(four.causes["forward"])
    assert four.total < two.total < one.total
    three = seconds_of(
        replace(TASK, tokens=128), Setting("ram", 4, 1, client_slots=3), profile
    )  # three together, then one
    assert three.loads == pytest.approx(2 * four.loads)


def test_small_micro_batches_read_the_weights_more_often():
    times = [
        seconds_of(TASK, Setting("resident", micro, 4 // micro, block_inputs="device"), one_profile()).total
        for micro in (4, 2, 1)
    ]
    assert times == sorted(times) and times[0] < times[2]


def test_nobody_to_exchange_with():
    profile = one_profile()
    assert exchange_s(TASK, profile) == 0.0
    assert exchange_s(TASK, replace(profile, participants=10)) == pytest.approx(
        2 * 0.9 * TASK.trainable * 4 / profile.node.link_rate
    )


def shaped(profile, **facts):
    return replace(profile, node=replace(profile.node, device=replace(profile.node.device, **facts)))


def places():
    """Compare a GPU, the GPU of a slow host, and a CPU that four ranks share."""
    card = one_profile()
    cpu = replace(
        card,
        node=replace(
            card.node,
            ram_rate=10e9,
            device=replace(card.node.device, kind="cpu", memory=0, flops={"fp16": 1e11, "fp32": 1e11}),
        ),
    )
    return card, one_profile("gpu=rtx2080ti ram_gib=64"), replace(cpu, ranks_here=4)


@pytest.mark.parametrize("model", [f"{HUB}Qwen-14B", f"{HUB}Qwen-1.5B", "gpt3-125m"])
@pytest.mark.parametrize(("micro", "tokens"), [(1, 8), (2, 512), (8, 2048)])
def test_resident_blocks_with_their_activations_are_no_slower_than_stock(model, micro, tokens):
    """The block-by-block execution that engine.tier=auto chooses is no slower than DeepSpeed's order with the
    same rows and memory. The same holds with block inputs on the host, because inputs of blocks that are not
    recomputed are not transferred.
    """
    task = Task(shape_of(model), clients=1, tokens=tokens, rows=8, dtype="fp16")
    for profile in places():
        stock = seconds_of(task, Setting("stock", micro, 8 // micro), profile).total
        for inputs in ("device", "host"):
            resident = Setting("resident", micro, 8 // micro, block_inputs=inputs, activation_bytes=2**60)
            assert seconds_of(task, resident, profile).total <= stock
            assert seconds_of(task, resident, profile).causes["again"] == 0.0
        # Recomputing all blocks takes no longer than stock with checkpointing.
        again = Setting("resident", micro, 8 // micro, block_inputs="device")
        recomputing = Setting("stock", micro, 8 // micro, checkpointing=True)
        assert seconds_of(task, again, profile).total <= seconds_of(task, recomputing, profile).total


def test_arithmetic_is_a_step_without_waiting():
    profile = one_profile(slots=1, clients=3)
    for setting in (
        Setting("resident", 2, 2, client_slots=2, block_inputs="device", activation_bytes=2**31),
        Setting("ram", 4, 1, block_slots=48, client_slots=3, block_inputs="device"),
        Setting("stock", 1, 4),
    ):
        assert arithmetic_of(TASK, setting, profile) == pytest.approx(
            seconds_of(TASK, setting, profile).total
        )
    waiting = Setting("ram", 1, 4, block_slots=1, client_slots=1)
    assert arithmetic_of(TASK, waiting, profile) < seconds_of(TASK, waiting, profile).total


def test_what_a_probe_says_of_a_card_is_what_the_step_takes():
    profile = one_profile(slots=1)
    setting = Setting("ram", 1, 4, block_inputs="host")
    times = block_times_of(TASK, setting, profile)
    carried = TASK.tokens * TASK.shape.hidden * 2
    assert times.input_transfer == pytest.approx(carried / profile.node.device.host_rate)
    # The slower direction counts.
    assert block_times_of(TASK, setting, shaped(profile, down_rate=1e9)).input_transfer == pytest.approx(
        carried / 1e9
    )
    assert block_times_of(TASK, replace(setting, block_inputs="device"), profile).input_transfer == 0.0
    floor = block_times_of(replace(TASK, tokens=8), setting, shaped(profile, launch_s=(0.5, 0.75)))
    assert (floor.forward, floor.recompute, floor.gradients) == (0.5, 0.5, 0.75)
    few = replace(TASK, tokens=64)
    alone, beside = (
        seconds_of(few, setting, shaped(profile, both_rate=rate)).total
        for rate in (profile.node.device.host_rate, 1e9)
    )
    assert beside > alone  # loads and inputs on their way down share the bus


def test_matrix_products_as_engine_matmul_says():
    device = one_profile().node.device
    halves = replace(TASK, dtype="fp16", matmul="fp16_accumulation")
    singles = replace(TASK, dtype="fp32", matmul="tf32")
    assert matrix_rate(halves, device) == pytest.approx(2 * device.flops["fp16"], rel=1e-3)
    assert matrix_rate(replace(halves, dtype="bf16"), device) == device.flops["bf16"]  # sums of fp16 only
    assert matrix_rate(singles, replace(device, tf32=3e13)) == 3e13
    with pytest.raises(PlanError, match="engine.matmul=tf32: .*rtx2080ti.* set engine.matmul=default"):
        matrix_rate(singles, one_profile("gpu=rtx2080ti").node.device)
    assert matrix_rate(singles, places()[2].node.device) == 1e11  # a switch of NVIDIA's cards
    # Fused attention has a separate rate.
    fast, slow = (
        block_times_of(replace(halves, tokens=4096, matmul=how), Setting("resident", 1, 4), one_profile())
        for how in ("fp16_accumulation", "default")
    )
    scores = 4 * TASK.shape.heads * TASK.shape.head_dim * 4096**2 / device.flops["fp16"]
    reading = TASK.shape.block * 2 / device.memory_rate
    assert slow.forward - scores - reading == pytest.approx(2 * (fast.forward - scores - reading), rel=1e-3)
