"""What `--dry-run` says that a run will need: memory by cause, and the traffic of a round."""

import pytest

from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.topology import topology_of
from fedspeed.config.deepspeed import merge
from fedspeed.config.load import load
from fedspeed.models.planned_shape import planned_shape
from fedspeed.session.forecast import Rows, execution_of
from fedspeed.session.needs import memory_lines, traffic_lines
from tests.conftest import ROOT

BASE = "model.base=small-llama"
ROWS = Rows(longest=64, answer_share=0.5)
SHAPES = {"q.lora_A.weight": (8, 100), "q.lora_B.weight": (50, 8)}  # 1 200 values, and a sketch of 16


def inputs(*overrides, hosts=2):
    model = (BASE, "model.init=random", "model.dtype=bf16", "data.clients=2", "routing.mode=plain")
    config = load(None, [*model, *overrides]).config
    named = tuple(Host(f"host-{number}", 1) for number in range(hosts))
    return config, merge(config.deepspeed, config, ROOT / "ds_configs"), topology_of(config, named), named


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


def traffic(hosts, *overrides):
    given = inputs(*overrides, f"data.clients={hosts}", hosts=hosts)
    [line] = traffic_lines(*given, rows=ROWS, shapes=SHAPES)
    return line


@pytest.mark.parametrize(
    ("rule", "hosts", "text"),
    [
        ("avg_factors", 1, "1.22k values, 4.75 KiB"),
        ("avg_factors", 2, "a client sends 4.75 KiB and receives 4.75 KiB"),
        ("avg_factors", 4, "a client sends 7.12 KiB and receives 7.12 KiB"),
        ("freeze_a", 2, "416 values, 1.62 KiB"),
    ],
)
def test_traffic_is_that_of_the_summed_vector(rule, hosts, text):
    assert text in traffic(hosts, f"federation.method.rule={rule}")


def test_masked_modes_have_overheads_that_are_not_counted():
    assert "sends" not in traffic(4, "routing.mode=mask")


@pytest.mark.parametrize(
    ("secure_sum", "text"),
    [
        ("native", "4.69 KiB; a client sends 18.8 KiB and receives 9.38 KiB"),
        ("compact", "a client sends 4.69 KiB and receives 4.69 KiB"),
        ("none", "a client sends 6.25 KiB and receives 6.25 KiB"),
    ],
)
def test_a_pairwise_masked_sum_has_widths_of_its_own(secure_sum, text):
    assert text in traffic(3, f"federation.method={{name: fate_llm, secure_sum: {secure_sum}}}")
