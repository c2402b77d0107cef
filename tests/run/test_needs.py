"""What `--dry-run` says that a run will need: memory by cause, and the traffic of a round."""

from dataclasses import replace

import pytest

from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.topology import topology_of
from fedspeed.config.deepspeed import merge
from fedspeed.config.load import load
from fedspeed.models.planned_shape import planned_shape
from fedspeed.session.forecast import Rows, execution_of
from fedspeed.session.needs import memory_lines, traffic_lines

BASE = "model.base=small-llama"
ROWS = Rows(longest=64, answer_share=0.5)
HOSTS = (Host("a", 1), Host("b", 1))
SHAPES = {"q.lora_A.weight": (8, 100), "q.lora_B.weight": (50, 8)}  # 1 200 values, and a sketch of 16


def inputs(*overrides):
    config = load(None, [BASE, "model.init=random", "model.dtype=bf16", "data.clients=2", *overrides]).config
    return config, merge(config.deepspeed, config, None), topology_of(config, HOSTS), HOSTS


def test_memory_is_that_of_the_planner_by_cause():
    given = inputs()
    execution = execution_of(*given, rows=ROWS)
    causes = execution.device_bytes(execution.places[0])
    weights = 2 * planned_shape(given[0].model.base).total
    assert weights <= causes["base"] < 1.02 * weights  # units are aligned
    [line] = memory_lines(*given, rows=ROWS)
    assert line.startswith("memory   about ") and "base " in line and "activations " in line


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("engine.tier=ram", "host memory for the rest of the base"),
        ("deepspeed.zero_optimization.stage=3", "no model of this execution"),
    ],
)
def test_other_executions(override, text):
    tier = ["engine.tier=stock"] if "stage=3" in override else []
    [line] = memory_lines(*inputs(override, *tier), rows=ROWS)
    assert text in line


@pytest.mark.parametrize(
    ("rule", "participants", "text"),
    [
        ("avg_factors", 1, "1.22k values, 4.75 KiB"),
        ("avg_factors", 2, "each participant sends 4.75 KiB and receives as much"),
        ("avg_factors", 4, "each participant sends 7.12 KiB and receives as much"),
        ("freeze_a", 2, "416 values, 1.62 KiB"),
    ],
)
def test_traffic_is_that_of_the_summed_vector(rule, participants, text):
    config = inputs(f"federation.method.rule={rule}")[0]
    [line] = traffic_lines(config, SHAPES, clients=participants, participants=participants)
    assert text in line


def test_masked_modes_have_overheads_that_are_not_counted():
    config = inputs()[0]
    masked = replace(config, routing=replace(config.routing, mode="mask"))
    [line] = traffic_lines(masked, SHAPES, clients=4, participants=4)
    assert "sends" not in line
