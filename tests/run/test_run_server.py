"""Whole runs of a method with a server: two ranks of clients and one of the server."""

import json
import os
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.processes import run_ranks
from tests.run.launched import LLAMA, SETTINGS, assert_same_run, journal_rounds, last_round, records, refusal

QUIET = ("monitor.plot=false", "monitor.tensorboard=false")
ROUNDS = 2
LR = 0.1


@pytest.fixture(scope="module")
def server(shared_workshop):
    """Yield the arguments of a run on three hosts, of which the middle one is the server, and its
    configuration.
    """
    hosts = shared_workshop.folder / "with-server"
    rows = shared_workshop.folder / "public.jsonl"
    hosts.write_text("alpha slots=1\nbeta slots=1\ngamma slots=1\n# fed-host beta role=server\n")
    rows.write_text(
        "".join(json.dumps({"instruction": f"double {n}", "output": f"{2 * n}"}) + "\n" for n in range(6))
    )
    config = shared_workshop.write_config(
        "served.yaml",
        {
            **SETTINGS,
            "model": {"init": "random", "tokenizer": "bytes", "dtype": "fp32"},
            "adapter": {"lora_rank": 4, "dropout": 0.0},
            "data": {**SETTINGS["data"], "clients": 2, "split": "iid"},
            "train": {"local_steps": 2, "micro_batch": 4, "optimizer": "sgd", "lr": LR},
            "federation": {"rounds": ROUNDS, "method": "served", "public_rows": str(rows)},
            "cluster": {"max_restarts": 0},
        },
    )
    yield ("--hostfile", str(hosts), *QUIET), config
    shared_workshop.close()


@pytest.fixture(scope="module")
def served(shared_workshop, server):
    """The folder of an uninterrupted run."""
    arguments, config = server
    shared_workshop.finish_run("run.name=served", *arguments, config=config)
    return shared_workshop.runs / "served"


def by_hand(rank, path, public):
    """Return the state after all rounds, computed by one engine that plays clients and server in turn."""
    import torch

    from fedspeed.config.load import load
    from fedspeed.data.batches import client_step
    from fedspeed.data.clients import client_rows, encode_client
    from fedspeed.data.public import public_data
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.world import join_world, leave_world
    from fedspeed.models.tokenizer import load_tokenizer
    from fedspeed.monitor.clock import StageClock
    from fedspeed.session.request import RunRequest
    from tests.federation.methods.served import LR_PART

    loaded = load(path, ["federation.method=lora_average", "federation.public_rows="])
    config = loaded.config
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    join_world(60.0)
    tokenizer = load_tokenizer(config.model)
    data = [encode_client(rows, tokenizer, config.data) for rows in client_rows(config.data, config.run.seed)]
    weights = [sum(row.answer_tokens for row in own.train) for own in data]
    spec = EngineSpec(
        model=config.model,
        adapter=config.adapter,
        train=config.train,
        engine=config.engine,
        deepspeed=RunRequest(loaded).deepspeed,
    )
    engine = build_engine(
        spec, EngineContext(client_sets=[(0,)], clock=StageClock(), nvme=path.parent, seed=config.run.seed)
    )
    torch.set_num_threads(1)

    def stepped(state, steps, lr):
        engine.load({n: torch.from_numpy(a) for n, a in state.items()})
        for batches in steps:
            engine.train_step([batches], lr)
        return {n: t.numpy().copy() for n, t in engine.state().items()}

    def served(before, number):
        """The server's step of a round, on four public rows of its own stream."""
        after = stepped(
            before,
            [client_step(rows, 0, 2, step=number, micro_batch=4, accumulation=1, ranks=1, client_rank=0)],
            LR_PART * LR,
        )
        assert max(np.abs(after[n] - before[n]).max() for n in before) > 1e-4, "the server moves it"
        return after

    rows = public_data(public, config.data, tokenizer)
    state = served({n: t.numpy().copy() for n, t in engine.state().items()}, 0)
    for number in range(ROUNDS):
        start = state
        state = {n: a.astype(np.float64) for n, a in state.items()}
        for client, own in enumerate(data):
            end = stepped(
                start,
                [
                    client_step(
                        own,
                        0,
                        client,
                        step=2 * number + step,
                        micro_batch=4,
                        accumulation=1,
                        ranks=1,
                        client_rank=0,
                    )
                    for step in range(2)
                ],
                LR,
            )
            for n in state:
                state[n] += 2.0 * weights[client] / sum(weights) * (end[n].astype(np.float64) - start[n])
        state = served({n: a.astype(np.float32) for n, a in state.items()}, number + 1)
    engine.close()
    leave_world()
    return state


def test_a_run_with_a_server_is_the_same_arithmetic_by_hand(served, server, shared_workshop):
    [expected] = run_ranks(1, by_hand, server[1], str(shared_workshop.folder / "public.jsonl"))
    found = load_file(last_round(served) / "state.safetensors")
    assert {name.removeprefix("global/") for name in found} == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[f"global/{name}"], array, atol=2e-6, err_msg=name)
    assert [record["received"] for record in records(served)] == [0, 2, 2]
    assert "3 ranks in 1 cluster and a server" in (served / "report.md").read_text()


@pytest.mark.slow
def test_clients_and_a_server_of_two_ranks_each_learn_the_same(served, server, workshop):
    """Half micro-batches on two ranks hold the same rows as whole ones on one rank."""
    hosts = workshop.folder / "of-two-ranks"
    (arguments, config) = server
    hosts.write_text("alpha slots=2\nbeta slots=2\ngamma slots=2\n# fed-host beta role=server\n")
    workshop.finish_run(
        "run.name=twos",
        *arguments,
        "--hostfile",
        str(hosts),
        "cluster.ranks_per_client=2",
        "train.micro_batch=2",
        config=config,
    )
    found, expected = (
        load_file(last_round(run) / "state.safetensors") for run in (workshop.runs / "twos", served)
    )
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_clients_that_share_ranks_which_share_a_base_are_answered_in_the_order_of_their_turns(
    server, workshop
):
    """Each rank has two clients that take turns: a server that answers client 1 before client 2 would wait
    for ever.
    """
    arguments, config = server
    workshop.finish_run(
        "run.name=four",
        *arguments,
        "data.clients=4",
        "engine.tier=stock",
        "deepspeed.base=zero3.json",
        "federation.rounds=1",
        "routing.deadline_s=20",
        config=config,
    )
    assert [record["received"] for record in records(workshop.runs / "four")] == [0, 4]


@pytest.mark.slow
def test_a_killed_server_ends_the_job_and_the_same_command_goes_on(served, server, workshop):
    """The run resumes from round 0, and the server's step of that round is not repeated."""
    run = workshop.runs / "unserved"
    (arguments, config) = server
    started = workshop.start_run("run.name=unserved", *arguments, config=config, env={"TEST_SLOW_S": "0.4"})
    started.until(lambda: (run / "journal" / "round-000000" / "entry.json").exists())
    os.kill(started.local_ranks()[1], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 75 and journal_rounds(run) == [0], ended.text
    assert "the server (rank 1 on beta)" in (run / "report.md").read_text().partition("## Result")[0]
    workshop.finish_run("run.name=unserved", *arguments, config=config)
    assert_same_run(run, served)


def test_a_server_without_its_rows_is_reported_by_all(server, workshop):
    arguments, config = server
    ended = workshop.run(
        "--json", "run.name=rowless", *arguments, "federation.public_rows=nowhere.jsonl", config=config
    )
    assert (
        ended.code == 2
        and "federation.public_rows=nowhere.jsonl: no such file on the server's host" in refusal(ended)
    )


def loaded_adapter(rank, folder):
    """Return the trainable parameters of a base with an exported adapter, as PEFT loads them."""
    import warnings

    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys")  # factors that the file lacks
        model = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**LLAMA)), folder, is_trainable=True)
    return {n: p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad}


def test_a_state_has_the_arrays_of_all_roles(server, workshop):
    """Each role moves its own, and the export has both."""
    arguments, config = server
    options = ("federation.method=unlike", "checkpoint.keep=3")
    workshop.finish_run("run.name=unlike", *arguments, *options, config=config)
    run = workshop.runs / "unlike"
    first, last = (load_file(run / "journal" / f"round-{n:06d}" / "state.safetensors") for n in (0, ROUNDS))
    of = {block: {name for name in first if f".layers.{block}." in name} for block in (0, 1)}
    assert len(of[0]) == len(of[1]) == 4 and first.keys() == last.keys() == of[0] | of[1]
    moved = {
        block: [name for name in of[block] if "lora_B" in name and np.abs(first[name]).max() > 0]
        for block in of
    }
    assert len(moved[0]) == 2 and moved[1] == [], "before round 1 the server has taken a step"
    assert all(np.any(last[name] != first[name]) for name in first)
    losses = [record["val_loss"] for record in records(run)]
    assert losses[-1] < losses[0], "clients evaluate what they have"
    [loaded] = run_ranks(1, loaded_adapter, str(run / "adapter"))
    assert {f"global/{name}" for name in loaded} == last.keys()
    assert all(np.array_equal(array, last[f"global/{name}"]) for name, array in loaded.items())


@pytest.mark.slow
def test_a_run_whose_roles_have_different_arrays_resumes(server, workshop):
    """The journal has all of them."""
    arguments, config = server
    options = (*arguments, "federation.method=unlike")
    workshop.finish_run("run.name=whole", *options, config=config)
    workshop.finish_run("run.name=halves", *options, "federation.rounds=1", config=config)
    workshop.finish_run("run.name=halves", *options, config=config)
    assert_same_run(workshop.runs / "halves", workshop.runs / "whole")


def test_roles_whose_arrays_contradict_each_other_are_reported_before_any_round(server, workshop):
    arguments, config = server
    ended = workshop.run(
        "--json",
        "run.name=contrary",
        *arguments,
        "federation.public_rows=",
        "federation.method=contrary",
        config=config,
    )
    assert ended.code == 2
    message = refusal(ended)
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight [{}, 64]"
    assert (
        "federation.method=contrary: participants have different arrays in their states; in addition to 0 "
        "that all have" in message
    )
    assert f"client 0 (rank 0 on alpha) has {layer.format(4)}" in message
    assert f"the server (rank 1 on beta) has {layer.format(2)}" in message
    assert not (workshop.runs / "contrary" / "rounds.jsonl").exists()


@pytest.mark.slow
def test_a_server_with_more_blocks_than_clients_holds_the_same_arrays(server, workshop):
    arguments, config = server
    workshop.finish_run(
        "run.name=emulated", *arguments, "federation.method=emulated", "federation.rounds=1", config=config
    )
    found = load_file(last_round(workshop.runs / "emulated") / "state.safetensors")
    assert len(found) == 4 and all(
        ".layers.1.self_attn." in name and np.abs(array).max() > 0 for name, array in found.items()
    )
    before = load_file(workshop.runs / "emulated" / "journal" / "round-000000" / "state.safetensors")
    assert {name.split(".")[-4] for name, array in before.items() if "lora_B" in name and array.any()} == {
        "v_proj"
    }, "the server's alone"


def test_a_dry_run_says_who_the_server_is(server, workshop):
    (_, hosts, *quiet), config = server
    dry = workshop.run("--dry-run", "--hostfile", hosts, *quiet, config=config)
    assert (
        dry.code == 0
        and "server   beta: 1 rank," in dry.text
        and "routing  plain, 2 participants" in dry.text
    )
    alone = workshop.folder / "alone"
    alone.write_text("localhost slots=3\n")
    without = workshop.run("--dry-run", "--hostfile", str(alone), *quiet, config=config)
    assert (
        without.code == 2
        and "has a server, and no host is one; write `# fed-host NAME role=server`" in without.err
    )


def test_on_one_machine_without_a_hostfile_one_more_rank_is_the_server(served, server, workshop):
    (_, _, *quiet), config = server
    dry = workshop.run("--dry-run", *quiet, config=config)
    assert dry.code == 0 and "cluster  default: 2 ranks, clients 0 to 1" in dry.text
    assert "server   localhost: 1 rank, no clients" in dry.text and "share" not in dry.text
    workshop.finish_run("run.name=supervised", *quiet, config=config)
    run = workshop.runs / "supervised"
    assert_same_run(run, served)
    report = (run / "report.md").read_text()
    assert "3 ranks in 1 cluster and a server" in report and "| 1 | the server |" in report
