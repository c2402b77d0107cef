"""Whole runs of split learning: clients with both ends of a model, and a server with the blocks between."""

import json
import os
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from fedspeed.federation.methods.base import make_method
from fedspeed.federation.methods.config import variant_of
from tests.processes import run_ranks
from tests.run.launched import LLAMA, SETTINGS, assert_same_run, journal_rounds, last_round, records, refusal

ROUNDS = 2
STEPS = 2
LR = 0.2
HIDDEN = LLAMA["hidden_size"]
QUIET = ("monitor.plot=false", "monitor.tensorboard=false", "cluster.max_restarts=0")


@pytest.fixture(scope="module")
def config(shared_workshop):
    model = shared_workshop.folder / "three-blocks"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 3}))
    yield shared_workshop.write_config(
        "split.yaml",
        {
            **SETTINGS,
            "model": {"base": str(model), "init": "random", "tokenizer": "bytes", "dtype": "fp32"},
            "adapter": {"lora_rank": 4, "dropout": 0.0},
            "data": {**SETTINGS["data"], "clients": 3, "split": "iid"},
            "train": {
                "local_steps": STEPS,
                "accumulation": 2,
                "micro_batch": 2,
                "optimizer": "sgd",
                "momentum": 0.5,
                "lr": LR,
                "schedule": "linear",
                "clip": 0.0,
                "weight_decay": 0.0,
            },
            "engine": {"tier": "resident"},
            "federation": {"rounds": ROUNDS, "method": {"name": "m2fedsa", "last": 1}},
        },
    )
    shared_workshop.close()


@pytest.fixture(scope="module", params=["shared", "per_client"])
def run(request, shared_workshop, config):
    """(how the server trains, the folder of a run on one machine without a hostfile); the first of two ranks
    has two of three clients.
    """
    body = request.param
    shared_workshop.finish_run(f"run.name={body}", f"federation.method.body={body}", *QUIET, config=config)
    return body, shared_workshop.runs / body


def by_hand(rank, path, body):
    """Return (state, held-out losses and accuracies) of all rounds, computed by one engine with the whole
    model.
    """
    import torch

    from fedspeed.config.load import load
    from fedspeed.data.batches import client_step, eval_batches
    from fedspeed.data.clients import client_rows, encode_client
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.client_engine import Sums
    from fedspeed.engine.world import join_world, leave_world
    from fedspeed.federation.schedule import lr_at
    from fedspeed.models.tokenizer import load_tokenizer
    from fedspeed.monitor.clock import StageClock
    from fedspeed.session.request import RunRequest

    loaded = load(path, ["federation.method=lora_average"])
    config = loaded.config
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    join_world(60.0)
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(config.model)
    data = [encode_client(rows, tokenizer, config.data) for rows in client_rows(config.data, config.run.seed)]
    weights = [sum(row.answer_tokens for row in own.train) for own in data]
    spec = EngineSpec.of(config, RunRequest(loaded).deepspeed)
    engine = build_engine(
        spec, EngineContext(client_sets=[(0,)], clock=StageClock(), nvme=path.parent, seed=config.run.seed)
    )

    def trained(client, number, state, optimizer):
        """Return what a client's turn leads to, with the optimizer's state."""
        engine.load({n: torch.from_numpy(a) for n, a in state.items()}, optimizer)
        for step in range(number * STEPS, (number + 1) * STEPS):
            rows = client_step(data[client], 0, client, step, 2, accumulation=2, ranks=1, client_rank=0)
            engine.train_step([rows], lr_at(config.train, step, ROUNDS * STEPS))
        return {n: t.numpy().copy() for n, t in engine.state().items()}, engine.optimizer_state()

    def scores_of(state):
        engine.load({n: torch.from_numpy(a) for n, a in state.items()})
        work = [eval_batches(own.val, 2, own.pad_id, own.limit) for own in data]
        sums = sum(engine.evaluate(work), Sums())
        return sums.mean_loss, sums.exact / sums.rows

    state = {n: t.numpy().copy() for n, t in engine.state().items()}
    inside = {n for n in state if ".layers.1." in n}
    scores = [scores_of(state)]
    for number in range(ROUNDS):
        bodies = {n: state[n] for n in inside}
        moments = None
        ends = []
        for client in (0, 2, 1):  # the order of turns: the first client of each rank, then the second
            begin = state | (bodies if body == "shared" else {})
            end, optimizer = trained(client, number, begin, moments)
            ends.append((client, end))
            if body == "shared":
                bodies = {n: end[n] for n in inside}
                moments = {n: t for n, t in optimizer.items() if n.rpartition("/")[0] in inside}
        mean = {
            n: sum(weights[c] / sum(weights) * end[n].astype(np.float64) for c, end in ends) for n in state
        }
        state = {n: a.astype(np.float32) for n, a in (mean | (bodies if body == "shared" else {})).items()}
        scores.append(scores_of(state))
    engine.close()
    leave_world()
    return state, scores


def test_a_run_is_the_arithmetic_of_the_whole_model(run, config):
    body, folder = run
    [(state, scores)] = run_ranks(1, by_hand, config, body)
    losses = [loss for loss, _ in scores]
    found = load_file(last_round(folder) / "state.safetensors")
    assert {name.removeprefix("global/") for name in found} == state.keys()
    for name, array in state.items():
        np.testing.assert_allclose(found[f"global/{name}"], array, atol=2e-6, err_msg=name)
        assert "lora_A" in name or np.abs(array).max() > 1e-4
    assert [record["val_loss"] for record in records(folder)] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    assert [record["val_exact"] for record in records(folder)] == [accuracy for _, accuracy in scores]
    assert [record["received"] for record in records(folder)] == [0, 3, 3]
    assert "3 ranks in 1 cluster and a server" in (folder / "report.md").read_text()


def loaded_adapter(rank, folder):
    """Return the names of the factors that PEFT loads into the whole model."""
    from peft import PeftConfig
    from safetensors.numpy import load_file as load

    return PeftConfig.from_pretrained(folder).target_modules, sorted(
        load(f"{folder}/adapter_model.safetensors")
    )


def test_the_export_is_an_adapter_of_the_whole_model(run):
    modules, names = run_ranks(1, loaded_adapter, str(run[1] / "adapter"))[0]
    assert {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in names} == set(modules)
    assert {name.split(".layers.")[1][0] for name in names} == {"0", "1", "2"}


def lengths_by_hand(rank, path):
    """Return the lengths of the rows of each message of client 2: (of the micro-batches of round 1, of its
    held-out batches).
    """
    from fedspeed.config.load import load
    from fedspeed.data.batches import client_step, eval_batches
    from fedspeed.data.clients import client_rows, encode_client
    from fedspeed.models.tokenizer import load_tokenizer

    config = load(path).config
    rows = client_rows(config.data, config.run.seed)[2]
    data = encode_client(rows, load_tokenizer(config.model), config.data)
    steps = [client_step(data, 0, 2, s, 2, accumulation=2, ranks=1, client_rank=0) for s in range(STEPS)]
    batches = [batch for step in steps for batch in step.micro]
    return tuple(
        [batch.attention_mask.sum(1) for batch in some]
        for some in (batches, eval_batches(data.val, 2, data.pad_id, data.limit))
    )


def message_bytes(tokens, **others):
    """Return the length of a message with a vector for each token.

    Args:
        others: what else is in it; one of the names has no content, and is that of the vectors.
    """
    (name,) = (name for name, array in others.items() if array is None)
    return len(save({**others, name: np.zeros((tokens, HIDDEN), np.float32)}))


def test_what_a_client_sends_is_counted(run, config):
    """Client 2, alone on its rank, sends two messages for each micro-batch, one for each held-out batch, two
    ends, and its part of the sum.
    """
    [(trained, held_out)] = run_ranks(1, lengths_by_hand, config)
    assert len(trained) == 2 * STEPS
    told = 2 * len(save({"end": np.zeros(0, np.uint8)}))
    for lengths in (*trained, *held_out):
        told += message_bytes(lengths.sum(), hidden=None, lengths=lengths)
    for number, lengths in enumerate(trained):
        last = {"last": np.zeros(0, np.uint8)} if number % 2 else {}
        told += message_bytes(lengths.sum(), output_gradient=None, **last)
    found = load_file(last_round(run[1]) / "state.safetensors")
    state = {name.removeprefix("global/"): array for name, array in found.items()}
    of_server = frozenset(name for name in state if ".layers.1." in name)
    method = make_method(variant_of("m2fedsa")(last=1), state, clients=3, seed=0, server_arrays=of_server)
    summed = 2 * 2 / 3 * method.values(1) * 4
    vectors = 2 * sum(map(np.sum, trained)) + sum(map(np.sum, held_out))
    assert vectors * HIDDEN * 4 < told < 1.03 * vectors * HIDDEN * 4
    sent = records(run[1])[1]["per_client"][2]["bytes_sent"]
    assert sent == pytest.approx(told + summed, rel=0.02)


def test_values_that_are_not_finite_end_the_run_with_the_name_of_their_client(config, workshop):
    """Before they are in the server's blocks, and on all ranks long before a deadline."""
    ended = workshop.run(
        "run.name=poisoned",
        "routing.deadline_s=300",
        *QUIET,
        config=config,
        env={"TEST_ATTACK": "send_gradients_that_are_not_finite"},
    )
    said = "the participant of client 2: a message has values of output_gradient that are not finite"
    assert ended.code == 2 and ended.seconds < 120, ended.text
    assert said in (workshop.runs / "poisoned" / "report.md").read_text().partition("## Result")[0]


@pytest.mark.slow
def test_a_client_that_dies_ends_the_run_with_its_name(config, workshop):
    """Long before the server's wait for its next message would end."""
    arguments = ("run.name=bereft", "routing.deadline_s=300", "federation.rounds=50", *QUIET)
    folder = workshop.runs / "bereft"
    started = workshop.start_run(*arguments, config=config)
    started.until(lambda: (folder / "journal" / "round-000001" / "entry.json").exists())
    os.kill(started.local_ranks()[1], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 75 and ended.seconds < 120, ended.text
    assert "client 2 (rank 1 on localhost)" in (folder / "report.md").read_text().partition("## Result")[0]


@pytest.mark.slow
def test_a_killed_server_ends_the_run_and_the_same_command_goes_on(run, config, workshop):
    body, whole = run
    name = f"{body}-killed"
    folder = workshop.runs / name
    arguments = (f"run.name={name}", f"federation.method.body={body}", *QUIET)
    started = workshop.start_run(*arguments, config=config, env={"TEST_SLOW_S": "0.4"})
    started.until(lambda: (folder / "journal" / "round-000001" / "entry.json").exists())
    os.kill(started.local_ranks()[2], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 75 and journal_rounds(folder)[-1] == 1, ended.text
    assert "the server" in (folder / "report.md").read_text().partition("## Result")[0]
    workshop.finish_run(*arguments, config=config)
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_clients_of_two_ranks_learn_the_same(config, workshop, run):
    """Half micro-batches on two ranks hold the same rows as whole ones on one rank. Both ranks of the server
    compute the same.
    """
    body, whole = run
    hosts = workshop.folder / "of-two"
    hosts.write_text("a slots=2\nb slots=2\ns slots=2\n# fed-host s role=server\n")
    workshop.finish_run(
        f"run.name={body}-twos",
        f"federation.method.body={body}",
        "--hostfile",
        str(hosts),
        "cluster.ranks_per_client=2",
        "train.micro_batch=1",
        *QUIET,
        config=config,
    )
    found, expected = (
        load_file(last_round(folder) / "state.safetensors")
        for folder in (workshop.runs / f"{body}-twos", whole)
    )
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-6, err_msg=name)


def test_what_cannot_be_split_is_refused_with_a_remedy(config, workshop):
    """All of it at once."""
    texts = {
        "engine.tier=auto": "engine.tier=auto does not compute a part of a model; set engine.tier=resident",
        "model.dtype=fp16": "model.dtype=fp16 needs a loss scale that client and server share",
        "data.packing=true": "data.packing=true puts several rows into a sequence",
        "adapter.targets=[layers.1.self_attn.q_proj]": "names a module of one block",
        "federation.staleness=1": "federation.staleness=1 trains during the exchange",
        "federation.local_optimizer=keep": "set it to reset",
        "engine.compile_blocks=true": "set engine.compile_blocks=false",
    }
    ended = workshop.run("--json", "run.name=refused", *QUIET, *texts, config=config)
    assert ended.code == 2 and [text for text in texts.values() if text not in refusal(ended)] == []
    overrides = ("federation.method.first=2", "routing.mode=mask")
    ended = workshop.run("--json", "run.name=refused", *QUIET, *overrides, config=config)
    assert ended.code == 2 and "routing.mode=mask" in refusal(ended)
    ended = workshop.run("--json", "run.name=refused", *QUIET, *overrides[:1], config=config)
    assert ended.code == 2 and "leave none of the 3 blocks of" in refusal(ended)


def test_a_dry_run_says_which_engines_there_are(config, workshop):
    """The preset of the method chooses the tier."""
    for arguments in ({"config": config}, {"config": workshop.config}):
        named = ("federation.method.name=m2fedsa", "federation.method.first=1", "model.dtype=fp32")
        dry = workshop.run("--dry-run", *QUIET, *named, **arguments)
        assert dry.code == 0 and "server   localhost: 1 rank, no clients" in dry.text, dry.text
        assert "engine.tier=resident" in dry.text
    assert " a participant with one client sends " in dry.text
