"""The emulated comparison: its sleeps are the simulator's seconds, and its runs are the simulated ones."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.compare.emulated import report
from benchmarks.compare.emulated.cluster import arguments_of, config_of, hostfile_lines, measured
from benchmarks.compare.emulated.plans import WAYS, plan_of
from benchmarks.compare.emulated.seconds import Seconds, of_step
from benchmarks.compare.emulated.values import key_of, run_values
from benchmarks.compare.simulated.cases import Case, shape_of
from fedspeed.cluster.hostfile import read
from fedspeed.cluster.topology import topology_of
from fedspeed.config.load import load
from fedspeed.errors import ConfigError
from fedspeed.models.catalogue import from_config
from fedspeed.planner.simulate import MODELS
from tests.conftest import ROOT

HOSTS = tuple(read(ROOT / "hostfiles" / "hetero10").hosts)
CASE = Case(shape_of(MODELS[1]), 9, epoch=7_954, tokens=512, rows=4, hosts=HOSTS)


def sleeps_of(seconds: Seconds, steps: int, micro_batches: int = 1) -> float:
    parts = seconds.gradients + seconds.forward + seconds.head
    return steps * (micro_batches * parts + seconds.optimizer)


def test_clients_sleep_for_their_simulated_steps():
    for way in ("fedspeed", "fs_llm", "spry", "zero3_offload"):
        plan = plan_of(way, CASE, 2)
        causes = plan.simulated.steps
        assert len(plan.hosts) == 9
        assert sleeps_of(plan.sleeps["node1"], 1) == pytest.approx(sum(causes["rtx3090"].values()))
        assert sleeps_of(plan.sleeps["node9"], 1) == pytest.approx(sum(causes["rtx2080ti"].values()))
        assert plan.simulated.train == pytest.approx(sleeps_of(plan.sleeps["node9"], 2))
    assert of_step({"forward": 1.0, "optimizer": 2.0, "client's ranks": 3.0}) == Seconds(1.0, 5.0)


def test_split_learning_sleeps_on_both_sides():
    plan = plan_of("m2fedsa", CASE, 3)
    assert plan.hosts[0] == "node1" and len(plan.hosts) == 10
    server = plan.sleeps["node1"]
    slept = [sleeps_of(plan.sleeps[host], 3, plan.accumulation) for host in plan.hosts[1:]]
    served = 9 * sleeps_of(server, 3, plan.accumulation)
    messages = sum(
        plan.simulated.steps[kind]["messages"] * count for kind, count in (("rtx3090", 6), ("rtx2080ti", 3))
    )
    assert sum(slept) + served + 3 * messages == pytest.approx(plan.simulated.train)


def test_a_server_sleeps_for_its_alignment():
    plan = plan_of("fedbiot", CASE, 2)
    assert 10 * sleeps_of(plan.sleeps["node1"], 1) == pytest.approx(plan.simulated.server)


def test_a_client_of_two_cards_is_one_rank_with_the_rows_of_both():
    plan = plan_of("fs_llm", CASE, 2)
    division = plan.simulated.division
    assert plan.micro_batch == 2 * division.micro_batch
    assert plan.micro_batch * plan.accumulation == plan.simulated.rows


def test_runs_are_placed_as_they_are_simulated(tmp_path):
    for way in WAYS:
        plan = plan_of(way, CASE, 2)
        path = tmp_path / "hosts"
        path.write_text("\n".join(hostfile_lines(plan, HOSTS)))
        (tmp_path / "public.jsonl").touch()
        arguments = [one for one in arguments_of(plan, tmp_path, path, 4)[2:] if not one.startswith("--")]
        config = load(ROOT / "ds_configs" / "quickstart.yaml", arguments).config
        assert (config.train.local_steps, config.adapter.lora_rank) == (2, 8), way
        assert config.routing.mode == (
            "mix+mask" if way in ("fedspeed", "fedspeed, staleness 1") else "plain"
        )
        topology = topology_of(config, read(path).hosts)
        names = [topology.ranks[rank].host for rank in topology.workers]
        assert sorted(names) == sorted(plan.hosts), way
        assert bool(topology.server) == (way in ("m2fedsa", "fedbiot"))


def test_the_emulated_model_has_the_real_dimensions():
    for model in MODELS[:4]:
        shape = shape_of(model)
        assert from_config(config_of(shape), shape.name, "here") == shape
    with pytest.raises(ConfigError, match="gpt2"):
        config_of(shape_of(MODELS[4]))


def record(number: int, seconds: float) -> dict[str, Any]:
    parts = {"exchange_s": seconds / 10, "idle_s": 0.5, "compute_s": seconds / 2, "bytes_sent": 100 * number}
    return {"round": number, "seconds": seconds} | parts


def test_the_first_round_does_not_count():
    records = [record(number, seconds) for number, seconds in enumerate((0.0, 9.0, 2.0, 4.0, 3.0))]
    marks = {
        name: [{"wall": t, "cpu": 2 * t, "tx": 10 * t, "rx": 0.0} for t in (0.0, 50.0, 51.0, 53.0)]
        for name in ("node1-0", "node2-1")
    }
    found = measured(records, marks, loads=4)
    assert (found.round, found.rounds) == (3.0, 3)
    assert found.sent == {"node1-0": 15.0, "node2-1": 15.0}
    assert found.cpu == 2 * 3.0


def test_a_run_is_known_by_all_that_makes_it_another_one():
    def key(way="spry", case=CASE, steps=2, *, scale=1.0, rounds=4, hostfile="hetero10"):
        return key_of(plan_of(way, case, steps), scale, rounds=rounds, hostfile=hostfile)

    two = replace(CASE, settings=("federation.method.perturbations=2",))
    keys = [key(), key("fs_llm"), key(case=replace(CASE, rows=8)), key(case=two), key(steps=3)]
    keys += [key(scale=2.0), key(rounds=5), key(hostfile="other")]
    assert len(set(keys)) == len(keys) and key() == key()
    slower, once = (plan_of("spry", case, 2).sleeps["node1"].gradients for case in (two, CASE))
    assert slower == pytest.approx(2 * once)


def test_columns_of_the_page_are_never_mixed():
    plan = plan_of("fs_llm", CASE, 2)
    records = [record(number, 20.0) for number in range(4)]
    found = measured(records, {"node1-0": [{"wall": 0.0, "cpu": 0.0, "tx": 0.0, "rx": 0.0}] * 3}, loads=3)
    values = {
        "date": "2026-01-01",
        "machine": {"cores": 2, "processor": "any"},
        "runs": [{"key": "any"} | run_values(plan, found, 1.0)],
    }
    row = next(line for line in report.page(values).splitlines() if line.startswith("| fs_llm"))
    cells = [cell.strip() for cell in row.split("|")][1:-1]
    by_name = list(zip(report.COLUMNS, cells, strict=True))
    assert by_name[1] == ("emulated: round s", "20.00")
    assert by_name[8] == ("simulated: round s", f"{plan.simulated.round:.2f}")
    assert cells[-1].startswith("does not fit: rtx2080ti needs")
