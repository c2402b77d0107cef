"""Simulated training: steps of pipelines compared with results calculated by hand, and the command
`fedspeed simulate`.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from fedspeed.models.catalogue import shape_of
from fedspeed.planner.many_clients import CELL_WORDS, PHASES, RELAYS, sum_bytes
from fedspeed.planner.pipeline.division import client_traffic
from fedspeed.planner.pipeline.forecast import LATENCY_S, client_pipeline, cluster_pipeline, times_of
from fedspeed.planner.plan import Task
from fedspeed.planner.simulate import SCALES, TASKS, Strategy, outcome, scale, strategies
from fedspeed.routing.anonymous.lockstep import play
from fedspeed.routing.anonymous.parameters import PublicParameters
from fedspeed.routing.anonymous.paths import draw_paths
from fedspeed.routing.anonymous.traffic import traffic
from fedspeed.schedule.layout import stages
from tests.planner.cases import HUB, laid, one_host, one_profile
from tests.planner.test_plan_command import run_fedspeed
from tests.routing.anonymous.parties import Parties

SMALL = f"{HUB}Qwen-1.5B"
LARGE = f"{HUB}Qwen-14B"


def task(model=SMALL, **changed):
    return Task(shape_of(model), 1, dtype="fp16", **changed)


def test_a_clients_step_is_what_its_schedule_takes():
    """Two equal stages and M micro-batches take (M + 1) turns of the slower stage, less the work that the
    other stage does not have; only one transfer is waited for.
    """
    profile = one_profile()
    found = client_pipeline(task(), [profile] * 2, 1, 1, 8)
    assert not found.loads and not found.recompute and sum(found.chunks) == 28
    a, b = found.chunks
    times = times_of(task(), client_traffic(2, 1, 8, False), [profile] * 2, stages((0, a, 28)))
    first = times.forward[0] + times.backward[0]
    second = times.forward[1] + times.backward[1] + times.heads[1]
    across = 2 * (LATENCY_S + times.nbytes / times.local_rate)
    least = 8 * max(first, second) + min(first, second)
    most = 9 * max(first, second) + 8 * across + max(times.steps)
    assert least <= found.seconds <= most
    assert found.bubble == pytest.approx(1 - 8 * (first + second) / (2 * found.seconds), abs=0.02)


def test_longer_steps_are_multiples():
    profile = one_profile()
    short, long = (client_pipeline(task(), [profile] * 2, 1, 1, micros).seconds for micros in (64, 256))
    assert long == pytest.approx(4 * short)


def test_loads_do_not_grow_with_the_step():
    """14B on two GPUs of 11 GB is loaded block by block. Four times the rows take less than four times as
    long, because the number of loads is the same.
    """
    profile = one_profile("gpu=rtx2080ti ram_gib=64")
    short, long = (client_pipeline(task(LARGE), [profile] * 2, 1, 1, micros) for micros in (1, 4))
    assert short.loads and long.loads and short.seconds < long.seconds < 2 * short.seconds
    assert (
        client_pipeline(task(LARGE), [one_profile("gpu=rtx2080ti ram_gib=24")] * 2, 1, 1, 1) is None
    )  # nor does RAM hold it


def test_slow_links_cost_a_cluster_time():
    fast, slow = (
        cluster_pipeline(
            task(), [one_profile(f"gpu=rtx3090 ram_gib=64 link_gbps={rate}", slots=1)] * 4, [0, 1, 2, 3], 1, 2
        )
        for rate in (10, 0.1)
    )
    assert slow.seconds > 1.5 * fast.seconds and slow.device == fast.device > 0


def test_ways_do_the_same_work():
    topology, nodes = laid(one_host("gpu=rtx3090 ram_gib=64", slots=4), 2)
    planned, client, cluster = strategies(replace(task(), clients=2, rows=4), topology, nodes)
    assert planned.rows == client.rows == cluster.rows == 4 * 4
    assert all(
        strategy.step > 0 and 0 < strategy.device_bytes < 24e9 for strategy in (planned, client, cluster)
    )
    alone, nodes = laid(one_host("gpu=rtx3090 ram_gib=64", slots=1), 1)
    assert [strategy.step is None for strategy in strategies(task(), alone, nodes)] == [False, True, True]


def test_a_whole_training():
    strategy = Strategy("w", "", step=2.0, rows=8, exchange=5.0)
    one = outcome(strategy, task(local_steps=10, tokens=100), 1_000)
    assert (one.rounds, one.round, one.whole, one.rate) == (13, 25.0, 325.0, 8 * 100 * 10 / 25.0)
    hidden = outcome(strategy, task(local_steps=10, staleness=1), 1_000)
    assert (hidden.round, hidden.whole) == (20.0, 13 * 20.0 + 5.0)  # the last exchange hides behind nothing


def test_masks_grow_with_clients_and_the_clear_does_not():
    found = [
        scale(task(local_steps=10), Strategy("w", "", step=1.0, rows=4), 1e9, clients) for clients in SCALES
    ]
    assert found[2].masked_cpu > 9 * found[1].masked_cpu > 80 * found[0].masked_cpu
    nbytes = 4 * task().trainable / 1e9
    assert all(one.plain - 2 * one.clients * 5e-5 == pytest.approx(2 * nbytes, rel=0.02) for one in found)
    assert all(one.hidden == max(10.0, one.masked) and one.round == 10.0 + one.masked for one in found)


def test_the_command():
    done = run_fedspeed(
        "simulate", "--hostfile", "hostfiles/hetero10", "--model", SMALL, "--model", LARGE, "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["model"] for one in found] == [SMALL, LARGE]
    for one in found:
        assert [t["task"] for t in one["tasks"]] == [job.name for job in TASKS] and [
            s["clients"] for s in one["scales"]
        ] == list(SCALES)
        for t in one["tasks"]:
            assert [strategy["name"] for strategy in t["ways"]] == [
                "planned",
                "engine.pipeline=client",
                "engine.pipeline=cluster",
            ]
            for strategy in t["ways"]:
                assert (
                    strategy["step"] is None
                    or strategy["whole"] == pytest.approx(strategy["rounds"] * strategy["round"])
                    and strategy["device_bytes"] < 0.93 * 24 * 2**30
                )


@pytest.mark.slow
def test_at_scale_the_slowest_host_counts_whatever_the_configuration_lays_out():
    """The three clients of the configuration would be on 3090s only."""
    arguments = ("simulate", "--hostfile", "hostfiles/hetero10", "--model", SMALL, "--scale", "100", "--json")
    plain, configured = (
        json.loads(run_fedspeed(*arguments, *more).stdout)[0]
        for more in (
            ["train.micro_batch=4", "train.accumulation=1", "data.max_tokens=1000"],
            ["--config", "ds_configs/gsm8k.yaml", "cluster.ranks_per_client=4", "train.local_steps=10"],
        )
    )
    assert configured["scales"] == plain["scales"] and "fp16" not in plain["alone"]["note"]


def test_more_ranks_than_blocks_are_told():
    done = run_fedspeed("simulate", "--hostfile", "hostfiles/scale16", "--model", "gpt3-125m", "--json")
    assert done.returncode == 0, done.stderr
    notes = [strategy["note"] for one in json.loads(done.stdout)[0]["tasks"] for strategy in one["ways"]]
    assert any(note.endswith("ranks for 12 blocks") for note in notes)


def test_the_text_and_one_model():
    done = run_fedspeed(
        "simulate", "--hostfile", "hostfiles/hetero10", "--model", LARGE, "--scale", "50", "--epochs", "3"
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "14.77 B",
        "3 epochs",
        "mathematical reasoning (3, bf16)",
        "blocks loaded by turns",
        "does not fit",
        "staleness 1",
        "\n  50 ",
    ):
        assert text in done.stdout


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--scale", "0"], "at least 1"),
        (["--model", "gpt5"], "neither a folder"),
        (["--rows", "0"], "--rows=0"),
    ],
)
def test_bad_input(arguments, message):
    done = run_fedspeed("simulate", "--hostfile", "hostfiles/hetero10", *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_the_phases_of_a_sum_are_those_of_the_protocol():
    seen = set()
    play(Parties(RELAYS + 1, relays=RELAYS).attempt(), lambda phase, messages: seen.add(phase))
    assert len(seen) == PHASES


@pytest.mark.parametrize("members, words", [(3, 100), (16, 20_016), (64, 20_016), (5, 6_000_000)])
def test_the_bytes_of_a_sum_are_those_of_the_protocol(members, words):
    keys = tuple(bytes([i]) * 32 for i in range(members))
    parameters = PublicParameters(members=keys, length=words, settings=b"", chunk_length=CELL_WORDS)
    plan = draw_paths(b"beacon", members, words, RELAYS, CELL_WORDS)
    sent = sum(int(b.sum() - np.trace(b)) for b in traffic(parameters, plan).values())
    assert sent == members * sum_bytes(words, members)
