"""`fedspeed export`: adapters are merged as PEFT does it, exports load from anywhere, cards are complete."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fedspeed.checkpoint.card import Card, read_facts
from fedspeed.checkpoint.journal import Entry, Journal
from fedspeed.checkpoint.merge import MergedTensors, write_merged
from fedspeed.checkpoint.training_facts import TrainingFacts
from fedspeed.cli import main
from fedspeed.data.config import DataConfig
from fedspeed.data.prompt_format import format_of
from fedspeed.errors import ModelError
from fedspeed.evaluation.results import add_results
from fedspeed.models.file_digests import weights_digest
from fedspeed.models.provenance import FILE, Provenance
from fedspeed.models.tokenizer import byte_tokenizer
from tests.checkpoint.test_export import write_base
from tests.limits import LIMIT_S
from tests.processes import run_ranks
from tests.smollm2 import smollm2

LINEARS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "up_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
CASES = {  # name: (family, kind of base, targets, use_rslora)
    "llama": ("llama", "", LINEARS["llama"], False),
    "rslora": ("qwen2", "", LINEARS["qwen2"], True),
    "gpt2": ("gpt2", "narrow", LINEARS["gpt2"], False),
    "sharded": ("llama", "sharded", LINEARS["llama"], False),
    "embedding": ("llama", "", ["embed_tokens", "q_proj"], False),
    "tied embedding": ("qwen2", "", ["embed_tokens", "q_proj"], False),
    "tied head": ("gpt2", "", ["lm_head", "c_attn"], False),
}
FACTS = TrainingFacts(
    trained="LoRA r=4 on q_proj",
    method="lora_average",
    privacy="plain",
    rounds=3,
    task="file",
    split="meta",
    clients=2,
    rows=90,
    client_rows=(40, 50),
    held_out_loss=1.25,
)
IDS = torch.tensor([[257, 72, 101, 108, 108, 111]])


def write_adapter(base, folder, targets, *, use_rslora=False):
    """Write a PEFT adapter with random factors, and return the model with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=targets,
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
        fan_in_fan_out="c_attn" in targets,
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def write_run(folder, base, targets, *, facts=FACTS, tokenizer=None, dtype="float32", template="plain"):
    """Write a finished run's folder with an adapter of random factors; return the model with it."""
    tokenizer = tokenizer or byte_tokenizer()
    adapter = folder / "adapter"
    model = write_adapter(base, adapter, targets)
    values = json.loads((adapter / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(base)
    tokenizer.save_pretrained(adapter)
    format = format_of(tokenizer, DataConfig(template=template, max_tokens=64))
    card = Card(folder.name, "adapter", 2, base=str(base), dtype=dtype, format=format, facts=facts)
    (adapter / "README.md").write_text(card.text())
    section = {"task": "file", "template": template, "max_tokens": 64, "split": "meta", "clients": 2}
    config = {"model": {"base": str(base), "init": "pretrained"}, "data": section}
    Journal(folder, 1).commit(Entry(3, "", 0, config), {"global/w": np.zeros(1, np.float32)})
    summary = {"best_round": 2, "first_val_loss": 2.5, "rounds": 3}
    (folder / "summary.json").write_text(json.dumps(summary))
    return model


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_merged_as_peft_computes_it(case, tmp_path):
    from transformers import AutoModelForCausalLM

    family, kind, targets, use_rslora = CASES[case]
    base = write_base(family, tmp_path / "base", kind)
    model = write_adapter(base, tmp_path / "adapter", targets, use_rslora=use_rslora)
    tensors = MergedTensors(Path(base), tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    values = write_merged(tmp_path / "out", tensors, config, "fp32")
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits
        ours = merged(input_ids=IDS).logits
    assert (theirs - ours).abs().max() < 2e-5 * theirs.abs().max()
    assert tensors.unties == case.startswith("tied") and merged.dtype == torch.float32
    assert values["use_cache"] is True


def test_what_cannot_be_merged_is_refused(tmp_path):
    base = write_base("llama", tmp_path / "base")
    write_adapter(base, tmp_path / "adapter", ["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"lora_bias": True}))
    with pytest.raises(ModelError, match="lora_bias=true.*merge_and_unload"):
        MergedTensors(Path(base), tmp_path / "adapter")
    write_adapter(write_base("gpt2", tmp_path / "tied"), tmp_path / "head", ["lm_head"])
    head_only = write_base("gpt2", tmp_path / "head-only", "head")
    with pytest.raises(ModelError, match="by the name of the head only.*merge_and_unload"):
        MergedTensors(Path(head_only), tmp_path / "head")


IN_A_FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, count = sys.argv[1], [int(n) for n in sys.argv[2].split(",")], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, repetition_penalty=1.0)
answer = output[0, len(ids):].tolist()
print(answer, model.dtype, model.generation_config.eos_token_id, bool(tokenizer.chat_template))
"""


def fresh(code, *arguments, cwd):
    """Run code in a process that knows nothing of FedSpeed; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(cwd)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_engine(rank, base, adapter, ids, count):
    """Return the greedy tokens of our engine with an adapter, in fp32."""
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.session.single_engine import single_engine

    model = ModelConfig(base=str(base), dtype="fp32")
    with single_engine(model, AdapterConfig(start_from=str(adapter))) as engine:
        [[answer]] = engine.generate([np.array(ids)], max_new=count)
    return answer.tolist()


def engine_and_export(run, base, ids, count):
    """Return the greedy tokens of our engine, and those of the merged export in plain transformers."""
    [ours] = run_ranks(1, by_engine, base, run / "adapter", ids=ids, count=count)
    printed = fresh(IN_A_FRESH_PROCESS, run / "merged", ",".join(map(str, ids)), count, cwd=run.parent)
    answer, _, rest = printed.partition("] ")
    return ours, json.loads(answer + "]"), rest.strip()


def test_the_merged_export_answers_as_the_engine_does(tmp_path, capsys):
    base = write_base("llama", tmp_path / "base")
    run = tmp_path / "run"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    write_run(run, base, LINEARS["llama"], tokenizer=tokenizer)
    assert main(["export", str(run), "--merged", "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out == f"model    {run / 'merged'}\n"
    ours, theirs, rest = engine_and_export(run, base, IDS[0].tolist(), 16)
    ours = ours[: ours.index(258) + 1] if 258 in ours else ours
    assert theirs == ours and len(ours) > 1
    assert rest == "torch.float32 258 True", "the chat template that the run has exported, and its end"


@pytest.mark.slow
def test_smollm2_with_an_adapter_is_exported_as_the_engine_answers(tmp_path):
    from transformers import AutoTokenizer

    base = smollm2()
    run = tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(base)
    write_run(run, base, ["q_proj", "v_proj"], tokenizer=tokenizer)
    assert main(["export", str(run), "--merged", "--dtype", "fp32"]) == 0
    ids = tokenizer("The capital of France is").input_ids
    ours, theirs, _ = engine_and_export(run, base, ids, 12)
    ours = ours[: ours.index(2) + 1] if 2 in ours else ours
    assert theirs == ours


def test_bf16_is_the_default_and_halves_the_size(tmp_path):
    base = write_base("gpt2", tmp_path / "base")
    run = tmp_path / "run"
    write_run(run, base, ["c_attn"])
    assert main(["export", str(run), "--merged"]) == 0
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (run / "merged", tmp_path / "base")]
    assert 0.4 < sizes[0] / sizes[1] < 0.6
    assert json.loads((run / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def snippet_of(folder):
    return (folder / "README.md").read_text().partition("```python\n")[2].partition("\n```")[0]


def test_an_adapter_names_the_public_base_and_loads_from_another_folder(tmp_path):
    """The base was imported from the hub, and is named as there; here a folder of that name stands for it."""
    base = write_base("llama", tmp_path / "imported")
    origin = Provenance(
        "org/model", "safetensors", "auto", {"m": "00"}, hub_name="org/model", revision="c0ffee"
    )
    (tmp_path / "imported" / FILE).write_text(origin.text())
    run = tmp_path / "run"
    model = write_run(run, base, ["q_proj"])
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(base, elsewhere / "org" / "model")
    assert main(["export", str(run), "--out", str(tmp_path / "given")]) == 0
    values = json.loads((tmp_path / "given" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "org/model"
    text = (tmp_path / "given" / "README.md").read_text()
    texts = {path.name: path.read_bytes() for path in (tmp_path / "given").iterdir()}
    assert [name for name in texts if str(tmp_path).encode() in texts[name]] == [], "no path of this machine"
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "org/model"
    code = snippet_of(tmp_path / "given").replace("'.'", repr(str(tmp_path / "given")))
    code += "\nprint(output[0].tolist())"
    printed = fresh(code, cwd=elsewhere).splitlines()
    prompt = json.loads(printed[-1])
    ids = torch.tensor([prompt])
    with torch.no_grad():
        choices = model(input_ids=ids[:, :-1]).logits[0].argmax(-1).tolist()
    begin = len(byte_tokenizer()("Name three colours. ").input_ids)
    assert prompt[begin:] == choices[begin - 1 :], "greedy tokens of the model that was trained"


def test_an_adapter_of_a_base_without_a_public_name_says_how_to_get_it(tmp_path, capsys):
    base = write_base("llama", tmp_path / "mine")
    run = tmp_path / "run"
    write_run(run, base, ["q_proj"])
    assert main(["export", str(run)]) == 0
    assert "note     its base" in capsys.readouterr().out
    text = (run / "export" / "README.md").read_text()
    assert "it was the folder `mine` of whoever trained" in text and str(tmp_path) not in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    origin = Provenance("tiny.Q4_1.gguf", "gguf", "fp16", {"tiny.Q4_1.gguf": "ab12"}, origin="a shop")
    (tmp_path / "mine" / FILE).write_text(origin.text())
    assert main(["export", str(run)]) == 0, "an export is replaced"
    text = (run / "export" / "README.md").read_text()
    assert "tiny.Q4_1.gguf (a shop), gguf, sha256 of tiny.Q4_1.gguf: ab12" in text
    assert "fedspeed import-base tiny.Q4_1.gguf --out mine --dtype fp16" in text
    values = json.loads((run / "export" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "mine"


def test_the_card_says_how_it_was_trained_and_how_good_it_is(tmp_path):
    base = write_base("llama", tmp_path / "base")
    run = tmp_path / "run"
    write_run(run, base, ["q_proj"])
    values = {"score": 0.25, "interval_95": [0.125, 0.375], "items": 200}
    metrics = {"accuracy": values, "loss": {"score": 2.5, "interval_95": None, "items": 200}}
    result = {"task": "gsm8k", "metric": "accuracy", "metrics": metrics, "settings": {"note": "unofficial"}}
    add_results(run / "evaluation.json", {"weights": weights_digest(run / "adapter")}, [result])
    assert main(["export", str(run), "--merged"]) == 0
    text = (run / "merged" / "README.md").read_text()
    for part in (
        "LoRA r=4 on q_proj, in 3 rounds of 2 clients",
        "90 rows with the held-out ones (by client: 40, 50)",
        "`plain`; updates were summed in the clear",
        "1.2500, from 2.5000 before training",
        "| gsm8k | accuracy | 25.00 % | 12.50 to 37.50 % | 200 |\n| - | loss | 2.5000 | - | 200 |",
        "gsm8k: unofficial.",
        "## Limits",
        "is merged into the base's weights",
    ):
        assert part in text, part
    assert read_facts(run / "merged") == FACTS
    # The run has trained further since: the scores are of other weights.
    write_adapter(base, run / "adapter", ["v_proj"])
    assert main(["export", str(run), "--merged"]) == 0
    assert "## Scores" not in (run / "merged" / "README.md").read_text()


@pytest.mark.parametrize(
    "folder, round, said",
    [
        ("adapter", 0, "the start, which no round beat"),
        ("adapter-last", 3, "round 3"),
        ("adapter-client-1", 2, "This is client 1's own"),
    ],
)
def test_the_card_says_which_weights_of_the_run_they_are(folder, round, said, tmp_path):
    run = tmp_path / "run"
    write_run(run, write_base("llama", tmp_path / "base"), ["q_proj"])
    (run / "adapter").rename(run / folder)
    name = "client-1" if "client" in folder else ""
    format = format_of(byte_tokenizer(), DataConfig(template="plain"))
    card = Card("run", "adapter", round, base="base", dtype="float32", format=format, name=name)
    (run / folder / "README.md").write_text(card.text())
    assert main(["export", str(run / folder), "--merged", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert said in text and "is merged into the base's weights" in text


def test_masked_runs_have_sums_only_on_their_card():
    facts = TrainingFacts(
        trained="t", method="m", privacy="mix+mask", rounds=1, task="dolly", split="meta", clients=8, rows=70
    )
    text = facts.to_markdown()
    assert (
        "70 rows with the held-out ones of all clients together" in text
        and "nobody saw more than sums" in text
    )


def test_exports_do_not_replace_other_folders_and_leave_nothing_half_written(tmp_path, capsys, monkeypatch):
    base = write_base("llama", tmp_path / "base")
    run = tmp_path / "run"
    write_run(run, base, ["q_proj"])
    assert main(["export", str(run), "--out", str(tmp_path / "base")]) == 2
    assert "was not written by `fedspeed export`" in capsys.readouterr().err
    assert main(["export", str(run), "--merged"]) == 0
    before = (run / "merged" / "README.md").read_text()
    factors = run / "adapter" / "adapter_model.safetensors"
    factors.write_bytes(factors.read_bytes()[:100])
    assert main(["export", str(run), "--merged"]) == 2
    assert (run / "merged" / "README.md").read_text() == before, "the earlier export is whole"
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "journal", "merged", "summary.json"]
