"""The search: no faster setting fits, more memory is never slower, and the numbers in reasons are right."""

import re
from dataclasses import replace

import pytest

from fedspeed.cluster.hostfile import parse
from fedspeed.errors import PlanError
from fedspeed.models.catalogue import shape_of
from fedspeed.planner.changes import with_memory
from fedspeed.planner.explain import explain
from fedspeed.planner.fitting import candidates, fits
from fedspeed.planner.hardware import GIB
from fedspeed.planner.memory import kept_bytes, memory_of
from fedspeed.planner.plan import SLOTTED, Setting, Task, overrides
from fedspeed.planner.profiles import profiles_of
from fedspeed.planner.search import fastest, plan
from fedspeed.planner.timing import seconds_of
from fedspeed.schedule.limits import QUANTISED
from tests.planner.cases import FIVE, HUB, laid, one_host, one_profile, shipped

CARD = {"rtx3090": 24 * GIB, "rtx2080ti": 11 * GIB}
TASK = Task(shape_of(f"{HUB}Qwen-7B"), clients=1)


def slowest_step(plan):
    """Return the seconds that a step of a plan's slowest cluster takes."""
    return max(cluster.forecast.seconds.total for cluster in plan.clusters)


def apply(change, task, nodes):
    """Return the same task and nodes after a change."""
    nodes = dict(nodes)
    for part in change.value if change.key == "both" else [change]:
        if part.key == "train.micro_batch":
            task = replace(task, micro_batch=int(part.value))
        elif part.key == "data.max_tokens":
            task = replace(task, tokens=int(part.value))
        elif part.key == "quantised":
            task = replace(task, quantised=True)
        elif part.key == "model.dtype":
            task = replace(task, dtype=str(part.value))
        else:
            nodes = {name: with_memory(node, part) for name, node in nodes.items()}
    return task, nodes


@pytest.mark.parametrize("model", FIVE)
@pytest.mark.parametrize(("hostfile", "clients"), [("hetero10", 10), ("hetero10", 3), ("scale16", 16)])
def test_the_models_fit_the_cards(hostfile, clients, model):
    found = shipped(hostfile, clients, model)
    for cluster in found.clusters:
        for forecast, setting in (
            (cluster.forecast, found.setting),
            (cluster.preferred_forecast, cluster.preferred),
        ):
            for profile in cluster.profiles:
                assert memory_of(found.task, setting, profile).gpu_bytes < CARD[cluster.name]
            assert 0 < forecast.seconds.total < 60
        assert cluster.preferred_forecast.seconds.total <= cluster.forecast.seconds.total
    assert found.task.dtype == ("bf16" if clients == 3 else "fp16")


@pytest.mark.parametrize(
    ("rows", "tokens", "cards", "quantised"),  # loads that hide, loads that do not, and a base in fewer bits
    [(2, 512, (3, 2.2, 4), False), (1, 64, (1.5, 1.35, 1.6), False), (2, 64, (1.5, 1.35, 1.6), True)],
)
def test_nothing_faster_fits(rows, tokens, cards, quantised):
    """Compare the result of the search with all settings of a small model, with every number of slots and
    activations.
    """
    task = Task(
        replace(shape_of("gpt3-350m"), layers=8),
        clients=2,
        rows=rows,
        tokens=tokens,
        dtype="fp16",
        quantised=quantised,
    )
    for card, facts in zip(
        cards, ("gpu=rtx2080ti ram_gib=16", "gpu=rtx2080ti ram_gib=12 nvme=/n", "gpu=rtx3090 ram_gib=12")
    ):
        profile = one_profile(f"{facts} gpu_mem_gib={card}", slots=1, clients=2)
        weighed = [
            chosen for candidate in candidates(task, [profile]) for chosen in every_way(task, candidate)
        ]
        fitting = [setting for setting in weighed if fits(task, setting, profile)]
        assert 0 < len(fitting) < len(weighed)
        best = min(seconds_of(task, setting, profile).total for setting in fitting)
        found = fastest(task, [profile])
        assert fits(task, found, profile)
        assert seconds_of(task, found, profile).total == pytest.approx(best, abs=2e-6)


def every_way(task, candidate):
    """Return the settings of a candidate: all numbers of slots if the base is streamed, of resident blocks if
    it is quantised, and every second number of kept activations.
    """
    if candidate.tier == "stock":
        return [candidate]
    layers = task.shape.layers
    kept = kept_bytes(task, candidate)
    spent = [candidate]
    if candidate.tier in SLOTTED:
        spent = (
            [replace(candidate, resident_blocks=n) for n in range(layers)]
            if candidate.tier in QUANTISED
            else [replace(candidate, block_slots=n) for n in range(1, layers + 1)]
        )
    most = candidate.client_slots * candidate.accumulation * (layers - 1)
    return [
        replace(setting, activation_bytes=n * kept) for setting in spent for n in {*range(0, most, 2), most}
    ]


def test_among_equals_the_one_that_takes_least():
    """If loads are hidden, the search uses no memory for more slots or all activations."""
    profile = one_profile("gpu=rtx3090 ram_gib=64", slots=1)
    task = replace(TASK, shape=shape_of(f"{HUB}Qwen-14B"), rows=16)
    found = fastest(task, [profile])
    assert found.tier == "ram" and found.resident_blocks == 0
    time = seconds_of(task, found, profile).total
    one = kept_bytes(task, found)
    for fewer in (
        replace(found, block_slots=found.block_slots - 1),
        replace(found, activation_bytes=found.activation_bytes - one),
    ):
        assert seconds_of(task, fewer, profile).total > time + 5e-7


def test_spare_memory_goes_where_it_saves_more():
    """Memory goes to slots if loads are not hidden, and to activations if they are."""
    profile = one_profile("gpu=rtx3090 ram_gib=64", slots=1)
    short, long = (fastest(replace(TASK, rows=1, tokens=tokens), [profile]) for tokens in (64, 2048))
    assert short.tier == long.tier == "ram" and short.block_slots > 10 > long.block_slots
    assert long.activation_bytes > 10 * kept_bytes(replace(TASK, tokens=2048), long)


def test_blocks_are_resident_only_where_the_host_has_no_room_for_their_copy():
    for facts, room in (("gpu=rtx3090 ram_gib=64", True), ("gpu=rtx3090 ram_gib=18", False)):
        profile = one_profile(facts, slots=1)
        found = fastest(TASK, [profile])
        fewer = replace(found, resident_blocks=found.resident_blocks - 1)
        assert found.tier == "ram" and (found.resident_blocks == 0) is room
        assert (
            room
            or memory_of(TASK, fewer, profile).ram_bytes
            > profile.node.ram
            >= memory_of(TASK, found, profile).ram_bytes
        )
    device = explain(plan(TASK, *laid(one_host(facts, 1), 1)))
    assert re.search(r"blocks 0, .*device\n", device) and "the other blocks" in device


@pytest.mark.parametrize("grow", ["gpu", "ram"])
@pytest.mark.parametrize("rows", [1, 4])
def test_more_memory_is_never_slower(grow, rows):
    times = []
    for gib in (2, 3, 4, 5, 6, 8, 10, 12, 14, 18, 22, 30):
        facts = (
            f"gpu=rtx2080ti gpu_mem_gib={gib} ram_gib=40"
            if grow == "gpu"
            else f"gpu=rtx2080ti ram_gib={3 * gib} nvme=/n"
        )
        profile = one_profile(facts)
        task = replace(TASK, dtype="fp16", rows=rows)
        setting = fastest(task, [profile])
        times.append(seconds_of(task, setting, profile).total if setting else float("inf"))
    assert all(later <= earlier + 2e-6 for earlier, later in zip(times, times[1:]))
    assert times[0] == float("inf") and times[-1] < float("inf")
    assert len({round(time, 3) for time in times}) > 2  # memory does matter here


def test_every_reason_has_a_number_and_names_what_it_is_about():
    found = shipped("hetero10", 10, f"{HUB}Qwen-14B")
    reasons = {alternative.label: alternative.reason for alternative in found.alternatives}
    assert all(re.search(r"\d", reason) for reason in reasons.values())
    assert {"stock", "resident", "client", "nvme", "cluster"} <= set(
        reasons
    ) and found.setting.tier not in reasons
    assert "GiB of GPU memory needed" in reasons["stock"] and "nvme=" in reasons["nvme"]
    for alternative in found.alternatives:
        assert (alternative.seconds is None) == alternative.reason.startswith("does not fit")
        if alternative.seconds is not None:
            assert alternative.seconds >= slowest_step(found) - 1e-6


@pytest.mark.parametrize(
    "wishes", [{"rows": 1, "tokens": 64}, {"rows": 16, "tokens": 1024}, {"quantised": True}]
)
@pytest.mark.parametrize("model", [f"{HUB}Qwen-1.5B", f"{HUB}Qwen-14B"])
def test_no_alternative_is_faster_than_the_plan(model, wishes):
    found = shipped("hetero10", 10, model, **wishes)
    times = [alternative.seconds for alternative in found.alternatives if alternative.seconds is not None]
    assert len(times) > 2 and min(times) >= slowest_step(found) - 1e-6
    everywhere = [profile for cluster in found.clusters for profile in cluster.profiles]
    for alternative in found.alternatives:
        if alternative.seconds is not None:
            assert all(fits(found.task, alternative.setting, profile) for profile in everywhere)


def test_clusters_may_wish_otherwise():
    found = shipped("hetero10", 10, f"{HUB}Llama-8B")
    wishes = {cluster.name: cluster.preferred for cluster in found.clusters}
    assert wishes["rtx3090"] != found.setting  # it could hold more
    assert "rtx3090 by itself" in explain(found)


REFUSED = {
    "a card too small": ("gpu=rtx2080ti gpu_mem_gib=2 ram_gib=64", 2, {}),
    "a host too small": ("gpu=rtx2080ti ram_gib=9", 1, {}),
    "both": ("gpu=rtx2080ti gpu_mem_gib=2 ram_gib=6", 1, {}),
    "a micro-batch too large": ("gpu=rtx2080ti gpu_mem_gib=6 ram_gib=64", 2, {"micro_batch": 32, "rows": 32}),
    "sequences too long": ("gpu=rtx2080ti gpu_mem_gib=6 ram_gib=64", 2, {"tokens": 16384, "rows": 1}),
    "numbers too wide": ("gpu=rtx3090 gpu_mem_gib=5.0 ram_gib=64", 2, {"dtype": "fp32"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_changes_that_do(case):
    facts, slots, wishes = REFUSED[case]
    topology, nodes = laid(one_host(facts, slots), 1)
    task = replace(TASK, **{"dtype": "fp16", **wishes})
    with pytest.raises(PlanError, match="does not fit in any tier: .*GiB.*Each of these would do") as refused:
        plan(task, topology, nodes)
    assert refused.value.exit_code == 2 and refused.value.changes
    for change in refused.value.changes:
        assert re.search(r"\d", change.text) and change.text in str(refused.value)
        changed_task, changed_nodes = apply(change, task, nodes)
        assert slowest_step(plan(changed_task, topology, changed_nodes)) > 0
        for word in re.findall(r"(?:gpu_mem_gib|ram_gib)=[0-9.]+", change.text):  # as the user would write it
            facts = re.sub(rf"{word.partition('=')[0]}=\S+ ?", "", facts) + f" {word}"
            if change.key != "both" or "ram_gib" in word:
                assert slowest_step(plan(task, *laid(one_host(facts, slots), 1))) > 0
        facts = REFUSED[case][0]
    keys = {change.key for change in refused.value.changes}
    expected = {
        "a card too small": "gpu_gib",
        "a host too small": "ram_gib",
        "both": "both",
        "a micro-batch too large": "train.micro_batch",
        "sequences too long": "data.max_tokens",
        "numbers too wide": "model.dtype",
    }
    assert expected[case] in keys


@pytest.mark.parametrize("case", ["a card too small", "a host too small", "sequences too long"])
def test_a_change_is_the_smallest_of_its_kind(case):
    facts, slots, wishes = REFUSED[case]
    topology, nodes = laid(one_host(facts, slots), 1)
    task = replace(TASK, **{"dtype": "fp16", **wishes})
    with pytest.raises(PlanError) as refused:
        plan(task, topology, nodes)
    smaller = {"gpu_gib": -0.1, "ram_gib": -1, "data.max_tokens": 8}
    tried = [
        replace(change, value=change.value + smaller[change.key])
        for change in refused.value.changes
        if change.key in smaller
    ]
    assert tried
    for change in tried:
        with pytest.raises(PlanError):
            changed_task, changed_nodes = apply(change, task, nodes)
            plan(changed_task, topology, changed_nodes)


def test_the_weakest_rank_of_a_cluster_decides():
    text = (
        "a slots=2\nb slots=2\n# fed-host a gpu=rtx3090 ram_gib=64\n# fed-host b gpu=rtx2080ti ram_gib=64\n"
    )
    topology, nodes = laid(parse(text, "test").hosts, 2)
    (profiles,) = profiles_of(topology, nodes).values()
    assert len(profiles) == 2
    found = plan(replace(TASK, clients=2, dtype="fp16"), topology, nodes)
    assert all(fits(found.task, found.setting, profile) for profile in profiles)
    assert found.clusters[0].forecast.seconds.total == max(
        seconds_of(found.task, found.setting, profile).total for profile in profiles
    )


def test_ranks_that_are_alike_are_weighed_once():
    found = shipped("hetero10", 10, "gpt3-125m")
    assert [len(cluster.profiles) for cluster in found.clusters] == [1, 1]


def test_clients_sit_together_where_loads_do_not_hide():
    task = replace(TASK, clients=4, tokens=64, rows=1)
    assert (
        fastest(task, [one_profile("gpu=rtx3090 ram_gib=64 gpu_mem_gib=8", slots=1, clients=4)]).client_slots
        == 4
    )


def test_fewer_bits_are_proposed_only_where_they_were_asked_for():
    """The 7B model does not fit into this host; quantised, it fits into the GPU with 4 bits, not with 8."""
    topology, nodes = laid(one_host("gpu=rtx2080ti gpu_mem_gib=10 ram_gib=9", 1), 1)
    task = replace(TASK, dtype="fp16")
    with pytest.raises(PlanError, match="fedspeed plan --quantised"):
        plan(task, topology, nodes)
    found = plan(replace(task, quantised=True), topology, nodes)
    assert found.setting.tier == "nf4" and "nf4, through" in explain(found)
    assert any(a.label == "int8" and "does not fit" in a.reason for a in found.alternatives)


def test_a_full_fine_tune_is_stock():
    found = shipped("hetero10", 3, "gpt3-350m", method="full")
    assert found.setting.tier == "stock" and found.task.trainable == found.task.shape.total


def test_stock_leaves_stage_3():
    for tier, left in (("stock", True), ("resident", False)):
        assert (
            "deepspeed.zero_optimization.stage=0" in overrides(replace(TASK, stage=3), Setting(tier, 4, 1))
        ) is left


def test_settings_as_overrides():
    words = Setting(
        "ram",
        2,
        4,
        resident_blocks=5,
        block_slots=3,
        client_slots=2,
        block_inputs="host",
        activation_bytes=GIB // 3,
    ).overrides
    assert words == (
        "engine.tier=ram",
        "engine.client_slots=2",
        "engine.block_inputs=host",
        "engine.activation_gib=0.33334",
        "engine.resident_blocks=5",
        "engine.block_slots=3",
        "train.micro_batch=2",
        "train.accumulation=4",
    )
    # Always written, so that a run does what the plan says.
    assert "engine.activation_gib=0.00000" in Setting("resident", 2, 4).overrides
    assert not any("activation_gib" in word for word in Setting("stock", 2, 4).overrides)
