"""What `--dry-run` says that a run will need: memory by cause, and the traffic of a round."""

import numpy as np
import pytest

from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.topology import topology_of
from fedspeed.config.deepspeed import merge
from fedspeed.config.load import load
from fedspeed.federation.methods.base import make_method, method_class
from fedspeed.models.planned_shape import planned_shape
from fedspeed.session.forecast import Rows, execution_of, task_for
from fedspeed.session.needs import memory_lines, traffic_lines
from tests.conftest import ROOT

BASE = "model.base=small-llama"
ROWS = Rows(longest=64, answer_share=0.5)
SHAPES = {"q.lora_A.weight": (8, 100), "q.lora_B.weight": (50, 8)}  # 1 200 values, and a sketch of 16


def inputs(*overrides, hosts=2):
    model = (BASE, "model.init=random", "model.dtype=bf16", "data.clients=2", "routing.mode=plain")
    config = load(None, [*model, *overrides]).config
    named = tuple(Host(f"host-{number}", 1) for number in range(hosts))
    named += (Host("apart", 1, role="server"),) if config.has_server else ()
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
        ("deepspeed.base=zero3_offload.json", "base 1.61 MiB off the device"),
        ("deepspeed.base=zero3_offload.json", "and activations, which are not predicted"),
    ],
)
def test_other_executions(override, text):
    tier = "engine.tier=stock" if "zero3" in override else override
    [line] = memory_lines(*inputs(override, tier), rows=ROWS)
    assert text in line


@pytest.mark.parametrize(
    ("method", "client", "server"),
    [
        # Of 4 blocks a client of FedBiOT has all, as none is dropped, and trains 2; one of m2fedsa has one,
        # and its server 3, without embedding and head.
        ("fedbiot", {"layers": 4, "adapted_blocks": 2, "differentiated_blocks": 2}, {"adapted_blocks": 4}),
        ("m2fedsa", {"layers": 1}, {"layers": 3, "vocab": 0}),
        ("spry", {"differentiated_blocks": 0, "tangents": True}, None),
        ("fedkseed", {"differentiated_blocks": 0, "tangents": False}, None),
    ],
)
def test_roles_have_tasks_of_their_own(method, client, server):
    options = ["federation.method.dropped=0"] if method == "fedbiot" else []
    rows = ["federation.public_rows=p.jsonl"] if method == "fedbiot" else []
    given = inputs(f"federation.method.name={method}", *options, *rows)
    config = given[0].federation.method
    task = task_for(given[0], given[1], [], ROWS)
    planned = {role: method_class(method).planned(config, task, role=role) for role in ("client", "server")}
    for role, expected in (("client", client), ("server", server)):
        if expected is None:
            assert planned[role] is None
            continue
        for name, value in expected.items():
            of = planned[role].shape if hasattr(planned[role].shape, name) else planned[role]
            assert getattr(of, name) == value
    lines = memory_lines(*given, rows=ROWS)
    assert len(lines) == (1 if server is None else 2) and lines[0].startswith("memory   about ")
    assert server is None or "on the server's" in lines[1]


def traffic(hosts, *overrides):
    given = inputs(*overrides, f"data.clients={hosts}", hosts=hosts)
    [line] = traffic_lines(*given, rows=ROWS, shapes=SHAPES)
    return line


@pytest.mark.parametrize(
    ("rule", "hosts", "text"),
    [
        ("avg_factors", 1, "1.22k values, 4.75 KiB"),
        ("avg_factors", 2, "a participant with one client sends 4.75 KiB and receives 4.75 KiB"),
        ("avg_factors", 4, "a participant with one client sends 7.12 KiB and receives 7.12 KiB"),
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
        ("native", "4.69 KiB; a participant with one client sends 18.8 KiB and receives 9.38 KiB"),
        ("compact", "a participant with one client sends 4.69 KiB and receives 4.69 KiB"),
        ("none", "a participant with one client sends 6.25 KiB and receives 6.25 KiB"),
    ],
)
def test_a_pairwise_masked_sum_has_widths_of_its_own(secure_sum, text):
    assert text in traffic(3, f"federation.method={{name: fate_llm, secure_sum: {secure_sum}}}")


@pytest.mark.parametrize("name", ["fs_llm", "fs_llm_offload"])
def test_the_size_of_the_original_messages_is_told_beside_ours(name):
    """4 characters for each 3 bytes begun: 4 268 for A (3 200 bytes), and 2 136 for B (1 600 bytes)."""
    line = traffic(2, f"federation.method={name}")
    assert "4.75 KiB (an update of the original takes 6.25 KiB in its own messages (base64))" in line
    assert line.endswith("; a participant with one client sends 4.75 KiB and receives 4.75 KiB")
    assert "original" not in traffic(2)


@pytest.mark.parametrize(("drawn", "text"), [(0, "7.04 KiB"), (1, "4.40 KiB"), (2, "5.28 KiB")])
def test_spry_predicts_the_traffic_of_the_clients_that_are_drawn(drawn, text):
    """1 201 values: a participant adds up a quarter of them, and sends 3/4 of what its clients have trained
    (all, a quarter or half of it, by the number of clients that train the one module), and of the sums.
    """
    line = traffic(4, "federation.method={name: spry}", f"federation.clients_per_round={drawn}")
    assert f"a participant with one client sends {text} and receives {text}" in line


def test_split_learning_sends_vectors_of_tokens_and_receives_the_state():
    """Of each token two vectors go to the server and two come back; the sum has a weight of each client."""
    config, section, _, hosts = inputs(
        "federation.method.name=m2fedsa", "train.micro_batch=4", "train.accumulation=2", "train.local_steps=3"
    )
    task = task_for(config, section, [], ROWS)
    state = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    method = make_method(config.federation.method, state, clients=2, seed=0)
    sent, received = method.traffic(task, len(hosts))
    plain = 2 * 2 / 3 * (1200 + 16 + 2) * 4
    assert sent == pytest.approx(plain + 2 * 3 * 8 * 64 * task.shape.hidden * 2)
    assert received - sent == 1200 * 4
