"""Whole runs of a method in which every client has a model of its own: evaluated, resumed and exported for
each client.
"""

from functools import cache

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.run.launched import LLAMA, SETTINGS, assert_same_run, records

CLIENTS = range(SETTINGS["data"]["clients"])
ROUNDS = 3
BEFORE = 2
METHOD = {"TEST_METHOD": "tests.federation.methods.spoiled_a"}


@pytest.fixture(scope="module")
def runs(shared_workshop):
    """Return the configuration, the folder of a run that was stopped and resumed, and that of an
    uninterrupted one.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    base = shared_workshop.folder / "drawn"
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(base)
    settings = {**SETTINGS, "model": {"base": str(base), "tokenizer": "bytes"}}
    settings["train"] = {**SETTINGS["train"], "lr": 0.01}
    settings["federation"] = {**SETTINGS["federation"], "server_optimizer": "none", "server_lr": 1}
    config = shared_workshop.write_config("own models.yaml", settings)
    for name, rounds in (("apart", BEFORE), ("apart", ROUNDS), ("at-once", ROUNDS)):
        arguments = (f"run.name={name}", f"federation.rounds={rounds}", "monitor.plot=false")
        shared_workshop.finish_run(*arguments, config=config, env=METHOD)
    return config, shared_workshop.runs / "apart", shared_workshop.runs / "at-once"


def best_of(run):
    best = min(records(run), key=lambda record: record["val_loss"])["round"]
    assert 0 < best < BEFORE, "kept over the resume"
    return best


@cache
def loss(config, folder, client):
    """Return the mean held-out loss of a client, computed with an exported adapter in PEFT."""
    import torch
    from peft import PeftModel
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    from fedspeed.config.load import load
    from fedspeed.data.clients import client_rows, encode_client
    from fedspeed.models.tokenizer import load_tokenizer

    found = load(config, []).config
    data = encode_client(
        client_rows(found.data, found.run.seed)[client], load_tokenizer(found.model), found.data
    )
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(found.model.base, dtype=torch.float32), str(folder)
    ).eval()
    total = 0.0
    tokens = 0
    for row in data.val:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        total += functional.cross_entropy(
            logits[row.labels_start - 1 : -1], ids[row.labels_start :], reduction="sum"
        ).item()
        tokens += len(ids) - row.labels_start
    return total / tokens


def test_whoever_uses_the_common_model_is_told_of_the_others(runs, tmp_path):
    from fedspeed.session.eval_target import resolve_target
    from fedspeed.session.export_run import export_run

    _, run, _ = runs
    said = "clients have models of their own"
    named = ", ".join(f"adapter-client-{client}" for client in CLIENTS)
    lines = export_run(str(run), merged=False, out=tmp_path / "export", dtype="")
    assert any(said in line and f"on this host {named} (" in line for line in lines)
    assert said in resolve_target(str(run), ()).to_json()["note"]
    assert "note" not in resolve_target(str(run / "adapter-client-1"), ()).to_json()


@pytest.mark.parametrize("suffix", ["", "-last"])
def test_each_client_is_exported_as_it_was_evaluated(runs, suffix):
    """It holds in the best round and in the last one; no client gets another one's adapter."""
    config, run, _ = runs
    record = records(run)[ROUNDS if suffix else best_of(run)]
    for client in CLIENTS:
        recorded = record["per_client"][client]["val_loss"]
        assert loss(config, run / f"adapter-client-{client}{suffix}", client) == pytest.approx(
            recorded, abs=2e-5
        )
        assert abs(loss(config, run / f"adapter{suffix}", client) - recorded) > 1e-3


def test_a_resumed_run_goes_on_with_what_each_client_has(runs):
    _, apart, at_once = runs
    assert_same_run(apart, at_once)
    for folder in sorted(at_once.glob("adapter*")):
        ours, theirs = (
            load_file(run / folder.name / "adapter_model.safetensors") for run in (apart, at_once)
        )
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_report_and_cards_name_all_models(runs):
    run = runs[1]
    best = best_of(runs[1])
    names = {"adapter", *(f"adapter-client-{client}" for client in CLIENTS)}
    assert {folder.name for folder in run.glob("adapter*")} == names | {f"{name}-last" for name in names}
    assert "`adapter-client-0/`, `adapter-client-1/`, `adapter-client-2/`" in (run / "report.md").read_text()
    card = (run / "adapter-client-1" / "README.md").read_text()
    assert f"# The adapter `client-1` of run `apart`, round {best}" in card and "client 1's own" in card
    assert "`adapter-NAME`" in (run / "adapter" / "README.md").read_text()


def test_a_clients_model_is_written_by_the_rank_that_speaks_for_it():
    from fedspeed.session.exporting import folder_of, is_ours

    names = ("adapter", "full", "client-1", "client-11")
    written = {
        reporter: [name for name in names if is_ours(name, reporter=reporter, carried=(0, 1))]
        for reporter in (True, False)
    }
    assert written == {True: ["adapter", "full", "client-1"], False: ["client-1"]}
    assert [folder_of("model", name, "-last") for name in names[:2]] == ["model-last", "model-full-last"]


@pytest.mark.parametrize(
    ("mode", "recorded", "folders"),
    [
        ("plain", [0, 1, 0], ("adapter-full", "adapter-client-1", "adapter-client-2")),
        ("mask", [0], ("adapter-full", "adapter-client-N")),
    ],
)
def test_masked_modes_reveal_nothing_about_which_clients_have_their_own(mode, recorded, folders):
    from types import SimpleNamespace

    from fedspeed.session.exporting import _others
    from tests.tiny import run_config

    sent = []

    def summed(vector, weight):
        sent.append(vector.tolist())
        return SimpleNamespace(vector=vector + np.array([0, 0, 1])[-len(vector) :])

    job = SimpleNamespace(config=run_config(routing={"mode": mode}, data={"clients": 3}))
    assert _others(job, SimpleNamespace(sum=summed), {"adapter", "full", "client-1"}) == folders
    assert sent == [recorded]
