"""Whole runs of FedBiOT on one machine: two ranks of clients and one of the server."""

import json
import os
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.processes import run_ranks
from tests.run.launched import EVAL, SETTINGS, assert_same_run, journal_rounds, last_round, records
from tests.tiny import write_llama

QUIET = ("monitor.plot=false", "monitor.tensorboard=false")
ROUNDS = 2
LR = 0.1
ALIGNMENT = {"initial_alignment_steps": 3, "alignment_steps": 2, "alignment_lr": 0.02, "kl": 0.5}
PROXIMAL = 0.2
BLOCKS = 5
ADAPTER = (3, 4)
EMULATOR = (0, 2)  # of the three blocks before, with half of them dropped: 1.5 are 2


@pytest.fixture(scope="module")
def config(shared_workshop):
    folder = shared_workshop.folder / "fedbiot"
    folder.mkdir()
    rows = folder / "public.jsonl"
    rows.write_text(
        "".join(json.dumps({"instruction": f"double {n}", "output": f"{2 * n}"}) + "\n" for n in range(9))
    )
    method = {"name": "fedbiot", "dropped": 0.5, "proximal": PROXIMAL, **ALIGNMENT}
    yield shared_workshop.write_config(
        "fedbiot.yaml",
        {
            **SETTINGS,
            "model": {
                "base": write_llama(folder / "base", layers=BLOCKS),
                "tokenizer": "bytes",
                "dtype": "fp32",
            },
            "adapter": {"lora_rank": 4, "dropout": 0.0},
            "data": {**SETTINGS["data"], "clients": 2, "split": "iid"},
            "train": {
                "local_steps": 3,
                "micro_batch": 4,
                "optimizer": "sgd",
                "lr": LR,
                "momentum": 0.0,
                "clip": 0.0,
            },
            "federation": {"rounds": ROUNDS, "method": method, "public_rows": str(rows)},
            "cluster": {"max_restarts": 0},
            "checkpoint": {"keep": 3},
            "evaluation": {"tasks": ["held_out"], "every": 1},
        },
    )
    shared_workshop.close()


@pytest.fixture(scope="module")
def run(shared_workshop, config):
    """The folder of an uninterrupted run."""
    shared_workshop.finish_run("run.name=fedbiot", *QUIET, config=config)
    return shared_workshop.runs / "fedbiot"


def state_of(run, number):
    arrays = load_file(run / "journal" / f"round-{number:06d}" / "state.safetensors")
    return {name.removeprefix("global/"): array for name, array in arrays.items()}


def dense_pull(now, start, scale):
    """Return the gradient of the squared distance of the adapted weights, by autograd on dense matrices."""
    from fedspeed.models.factors import pairs

    found = {}
    for a, b in pairs(now):
        factors = [now[name].double().requires_grad_() for name in (a, b)]
        before = start[b].double() @ start[a].double()
        (scale * (factors[1] @ factors[0] - before)).square().sum().backward()
        found |= {name: factor.grad.numpy() for name, factor in zip((a, b), factors)}
    return found


def by_hand(rank, path, run):
    """Return (state after round 1 computed from that before, held-out losses of round 1 of the clients' model
    with and without the emulator's LoRA, losses of the exported adapter in the full model, as an engine and
    as transformers and PEFT compute them).
    """
    import torch

    from fedspeed.config.load import load
    from fedspeed.data.batches import client_step, eval_batches
    from fedspeed.data.clients import client_rows, encode_client
    from fedspeed.data.public import public_data
    from fedspeed.engine.build import EngineContext, build_engine
    from fedspeed.engine.world import join_world, leave_world
    from fedspeed.models.config import AdapterConfig
    from fedspeed.models.tokenizer import load_tokenizer
    from fedspeed.monitor.clock import StageClock
    from fedspeed.session.engine_spec import engine_spec
    from fedspeed.session.request import RunRequest

    loaded = load(path, [])
    config = loaded.config
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
    )
    join_world(60.0)
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(config.model)
    data = [encode_client(rows, tokenizer, config.data) for rows in client_rows(config.data, config.run.seed)]
    weights = [sum(row.answer_tokens for row in own.train) for own in data]

    def as_torch(arrays):
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

    def build(role, **changes):
        from dataclasses import replace

        spec = replace(engine_spec(config, RunRequest(loaded).deepspeed, role), **changes)
        context = EngineContext(
            client_sets=[(0,)], clock=StageClock(), nvme=path.parent, seed=config.run.seed
        )
        return build_engine(spec, context)

    def rows(of, client, step):
        return client_step(of, 0, client, step, 4, accumulation=1, ranks=1, client_rank=0)

    def losses(engine, state=None):
        """The held-out loss per answer token of both clients together."""
        if state is not None:
            engine.load(as_torch(state))
        work = [eval_batches(own.val, 4, own.pad_id, own.limit) for own in data]
        with engine.matched_passes(engine.eval_passes(work), backward=False):
            sums = engine.evaluate(work)
        return sum(s.loss for s in sums) / sum(s.tokens for s in sums)

    first = state_of(run, 0)
    last = state_of(run, 1)
    adapter = [name for name in first if ":" not in name]
    engine = build("client")
    mean = {name: first[name].astype(np.float64) for name in adapter}
    for client, own in enumerate(data):
        engine.load(as_torch(first))
        for step in range(3):
            engine.gradients([rows(own, client, step)])
            engine.add_to_gradients(0, dense_pull(engine.masters(), as_torch(first), 4.0), PROXIMAL)
            engine.step(LR)
        for name, end in engine.state().items():
            mean[name] += weights[client] / sum(weights) * (end.numpy().astype(np.float64) - first[name])
    stale = last | {name: array for name, array in first.items() if name.startswith("folded:")}
    evaluated = [losses(engine, state) for state in (last, {name: last[name] for name in adapter}, stale)]
    engine.close()

    public = public_data(config.federation.public_rows, config.data, tokenizer)
    engine = build("server")
    start = {name: torch.from_numpy(array.astype(np.float32)) for name, array in mean.items()}
    factor_of = {"lora_A": "right", "lora_B": "left"}
    for name in set(engine.names) - start.keys():
        module, _, kind = name.removesuffix(".default.weight").rpartition(".")
        start[name] = torch.from_numpy(first[f"folded:{module}.{factor_of[kind]}"])
    engine.load(start, frozen=frozenset(adapter))
    for step in range(2):
        engine.distil(rows(public, 2, 3 + step), student=EMULATOR, common=ADAPTER[0], kl=ALIGNMENT["kl"])
        engine.step(ALIGNMENT["alignment_lr"])
    end = {}
    for name, tensor in engine.state().items():
        module, _, kind = name.removesuffix(".default.weight").rpartition(".")
        end[name if name in mean else f"folded:{module}.{factor_of[kind]}"] = tensor.numpy()
    engine.close()

    exported = str(run / "adapter")
    engine = build("client", blocks=None, adapter=AdapterConfig(start_from=exported))
    in_engine = losses(engine)
    engine.close()
    leave_world()
    return end, evaluated, (in_engine, in_peft(config.model.base, exported, data))


def in_peft(base, folder, data):
    """Return the held-out loss of a base with an exported adapter, as transformers and PEFT compute it."""
    import warnings

    import torch
    from peft import PeftModel
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    total = 0.0
    tokens = 0
    for row in (row for own in data for row in own.val):
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        answer = ids[row.labels_start :]
        total += functional.cross_entropy(logits[row.labels_start - 1 : -1], answer, reduction="sum").item()
        tokens += len(answer)
    return total / tokens


@pytest.fixture(scope="module")
def hand(run, config):
    [computed] = run_ranks(1, by_hand, config, run)
    return computed


def test_a_round_is_the_same_arithmetic_by_hand(run, hand):
    """Clients compute with the emulator that the server has sent, and the export fits the full model."""
    last = state_of(run, 1)
    end, evaluated, full = hand
    assert end.keys() == last.keys() == state_of(run, 0).keys()
    for name, array in end.items():
        np.testing.assert_allclose(last[name], array, atol=2e-6, err_msg=name)
    recorded = records(run)[1]["val_loss"]
    assert records(run)[1]["eval_held_out"] == pytest.approx(recorded, rel=1e-6), "tasks of the rounds, too"
    assert evaluated[0] == pytest.approx(recorded, rel=1e-6)
    assert abs(evaluated[1] - recorded) > 1e-4, "the emulator's LoRA has a part in clients' losses"
    assert abs(evaluated[2] - recorded) > 1e-5, "an emulator that is never sent again gives another loss"
    assert full[0] == pytest.approx(full[1], rel=1e-5)
    assert abs(full[0] - records(run)[-1]["val_loss"]) > 1e-3, "another model than the evaluated one"


def test_emulators_change_in_every_round(run):
    """What the server makes is in the journal of a client's rank, on the blocks of the emulator."""
    states = [state_of(run, number) for number in range(ROUNDS + 1)]
    blocks = {block: {name for name in states[0] if f".layers.{block}." in name} for block in range(BLOCKS)}
    assert [len(blocks[block]) for block in range(BLOCKS)] == [4, 0, 4, 4, 4]
    folded = {name for name in states[0] if name.startswith("folded:")}
    assert folded == blocks[0] | blocks[2]
    assert all(np.abs(states[0][name]).max() > 0 for name in folded), "aligned before round 1"
    assert not any(states[0][name].any() for name in blocks[3] if "lora_B" in name), "nothing else is"
    for before, after in zip(states, states[1:]):
        assert all(np.any(before[name] != after[name]) for name in before)
    exported = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(exported) == 8 and all(
        np.array_equal(array, states[-1][name.replace(".weight", ".default.weight")])
        for name, array in exported.items()
    )


def test_report_and_card_say_what_was_evaluated(run):
    text = "the adapter behind the emulator, as clients have them, and not of the full model"
    assert f"Losses and scores of the rounds are of {text}" in (run / "report.md").read_text()
    assert f"; of {text}" in (run / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_the_exported_adapter_is_evaluated_in_the_full_model(run, workshop, hand):
    ended = workshop.run("--json", str(run), command=EVAL)
    assert ended.code == 0, ended.text
    (line,) = (json.loads(line) for line in ended.out.splitlines())
    assert line["metrics"]["loss"]["score"] == pytest.approx(hand[2][1], rel=1e-5)


@pytest.mark.slow
def test_with_everything_off_it_is_lora_average_on_the_last_blocks(workshop, config):
    """An emulator of all blocks, no alignment, no proximal term."""
    off = {"dropped": 0, "proximal": 0, "kl": 0, "initial_alignment_steps": 0, "alignment_steps": 0}
    workshop.finish_run(
        "run.name=off",
        *QUIET,
        *(f"federation.method.{key}={value}" for key, value in off.items()),
        config=config,
    )
    targets = ", ".join(f"layers.{block}.self_attn.{name}_proj" for block in ADAPTER for name in "qv")
    workshop.finish_run(
        "run.name=average",
        *QUIET,
        "federation.method=lora_average",
        "federation.public_rows=",
        f"adapter.targets=[{targets}]",
        config=config,
    )
    runs = workshop.runs / "off", workshop.runs / "average"
    found, expected = (state_of(run, ROUNDS) for run in runs)
    assert expected.keys() == {name for name in found if ":" not in name}
    assert all(np.array_equal(found[name], array) for name, array in expected.items())
    assert not any(found[name].any() for name in found if name.endswith(".left"))
    assert [r["val_loss"] for r in records(runs[0])] == [r["val_loss"] for r in records(runs[1])]


@pytest.mark.slow
def test_masked_updates_give_the_same_run(run, workshop, config):
    workshop.finish_run(
        "run.name=masked", *QUIET, "routing.mode=mask", "routing.min_participants=2", config=config
    )
    for name, array in state_of(run, ROUNDS).items():
        np.testing.assert_allclose(
            state_of(workshop.runs / "masked", ROUNDS)[name], array, atol=1e-4, err_msg=name
        )


@pytest.mark.slow
def test_clients_and_a_server_of_two_ranks_each_learn_the_same(run, workshop, config):
    """Half micro-batches on two ranks hold the same rows as whole ones on one rank."""
    hosts = workshop.folder / "of-two-ranks-each"
    hosts.write_text("alpha slots=2\nbeta slots=2\ngamma slots=2\n# fed-host beta role=server\n")
    workshop.finish_run(
        "run.name=pairs",
        *QUIET,
        "--hostfile",
        str(hosts),
        "cluster.ranks_per_client=2",
        "train.micro_batch=2",
        config=config,
    )
    for name, array in state_of(run, ROUNDS).items():
        found = state_of(workshop.runs / "pairs", ROUNDS)[name]
        np.testing.assert_allclose(found, array, atol=5e-6, err_msg=name)


@pytest.mark.slow
def test_a_killed_server_ends_the_job_and_the_same_command_goes_on(run, workshop, config):
    folder = workshop.runs / "killed"
    started = workshop.start_run("run.name=killed", *QUIET, config=config, env={"TEST_SLOW_S": "0.4"})
    started.until(lambda: (folder / "journal" / "round-000001" / "entry.json").exists())
    os.kill(started.local_ranks()[-1], signal.SIGKILL)
    ended = started.wait()
    assert ended.code == 75 and journal_rounds(folder)[-1] == 1, ended.text
    workshop.finish_run("run.name=killed", *QUIET, config=config)
    assert_same_run(folder, run)
    assert load_file(last_round(folder) / "state.safetensors").keys() == {
        f"global/{name}" for name in state_of(run, ROUNDS)
    }


def test_a_dry_run_says_who_the_server_is(workshop, config):
    dry = workshop.run("--dry-run", *QUIET, config=config)
    assert dry.code == 0 and "server   localhost: 1 rank, no clients" in dry.text, dry.text
    few = workshop.run("--dry-run", *QUIET, "federation.method.adapter_blocks=5", config=config)
    assert few.code == 2 and "the base has 5 blocks" in few.err and "choose at most 4" in few.err
