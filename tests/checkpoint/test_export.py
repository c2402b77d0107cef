"""What a run leaves behind loads in PEFT and transformers, offline, and computes what the run's own model
computes.
"""

import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from fedspeed import quickstart
from fedspeed.data.config import DataConfig, TrainConfig
from fedspeed.engine.config import EngineConfig
from fedspeed.federation.methods.base import make_method
from fedspeed.federation.methods.config import variant_of
from fedspeed.models.config import AdapterConfig, LastBlocks, ModelConfig
from tests.limits import LIMIT_S
from tests.processes import Scenarios, run_clusters

CASES = {  # name: (family, method, ZeRO, dtype)
    "llama adapter": ("llama", "lora", "zero0", "fp32"),
    "qwen2 adapter": ("qwen2", "lora", "zero3", "fp32"),
    "gpt2 adapter": ("gpt2", "lora", "zero0", "fp32"),
    "llama model": ("llama", "full", "zero3", "fp32"),
    "qwen2 model": ("qwen2", "full", "zero0", "fp32"),  # tied embeddings: one tensor, two names
    "gpt2 model": ("gpt2", "full", "zero0", "fp32"),
    "bf16 model": ("llama", "full", "zero0", "bf16"),
    "llama blocks": ("llama", "blocks", "zero0", "fp32"),
    "gpt2 blocks": ("gpt2", "blocks", "zero3", "fp32"),
    "bf16 blocks": ("llama", "blocks", "zero0", "bf16"),
    "bf16 adapter": ("llama", "lora", "zero0", "bf16"),
    "narrow blocks": ("llama", "blocks", "zero0", "fp32"),
    "sharded blocks": ("llama", "blocks", "zero0", "fp32"),
    "narrow adapter": ("gpt2", "lora", "zero0", "fp32"),
    "untied adapter": ("llama", "lora", "zero0", "fp32"),
    "untied blocks": ("gpt2", "blocks", "zero0", "fp32"),
    "untied model": ("qwen2", "full", "zero3", "fp32"),
    "head adapter": ("gpt2", "lora", "zero0", "fp32"),
    "folded adapter": ("gpt2", "lora", "zero0", "fp32"),
    "head model": ("qwen2", "full", "zero0", "fp32"),
}
TORCH_TYPE = {"fp32": "float32", "bf16": "bfloat16"}
IDS = np.random.default_rng(0).integers(0, 256, (2, 12))


def write_base(family, folder, kind=""):
    """A random base.

    Args:
        kind: narrow: its weights are stored in bf16. sharded: in several files. untied: with a head that
            differs from the embedding, which config.json ties. head: without the embedding.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "llama": {"num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 64},
        "qwen2": {
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        "gpt2": {"n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    }[family]
    if kind in ("untied", "head"):
        sizes["tie_word_embeddings"] = True
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=260,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=256,
        **sizes,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16 if kind == "narrow" else torch.float32).save_pretrained(
        folder, max_shard_size="20KB" if kind == "sharded" else "1GB"
    )
    if kind in ("untied", "head"):
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = torch.randn(260, 32) / 10
        if kind == "head":
            del tensors["transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


ASKED = ["llama adapter", "gpt2 adapter", "llama model", "bf16 model"]


def logits(model):
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)).logits.float().numpy()


def exported(rank, folder):
    """Return, for each case, the logits of the model in the engine and those of the model loaded from its
    export.
    """
    import torch

    from fedspeed.engine.world import join_world, leave_world, quiet

    torch.set_num_threads(1)
    quiet()
    join_world(LIMIT_S)
    out = Scenarios()
    for name in CASES:
        out.play(name, one, name, *CASES[name], folder=folder)
    out.play("continued", continued, folder)
    leave_world()
    return out


def build(model, adapter, kind, folder):
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from tests.engine.engines import ds_config
    from tests.tiny import NoClock

    spec = EngineSpec(
        model=model,
        adapter=adapter,
        train=TrainConfig(),
        engine=EngineConfig(tier="stock"),
        deepspeed=ds_config(kind, model.dtype),
    )
    return build_engine(
        spec, EngineContext(client_sets=[(0,)], clock=NoClock(), nvme=folder / "nvme", seed=0)
    )


def trained(engine, folded=False):
    """Weights that no base and no fresh adapter has. folded: with what two rounds of `stack` have folded."""
    rng = np.random.default_rng(2)
    state = {
        n: (t.detach().numpy() + 0.1 * rng.standard_normal(t.shape)).astype(np.float32)
        for n, t in sorted(engine.state().items())
    }
    method = make_method(variant_of("stack")(), state, clients=2, seed=0)
    for number in (1, 2) if folded else ():
        drawn = [
            {n: (t + 0.1 * rng.standard_normal(t.shape)).astype(np.float32) for n, t in state.items()}
            for _ in range(2)
        ]
        turns = [method.turn(client, number, state, steps=1, seed=0, memory={}) for client in range(2)]
        total = sum(method.encode(turn, end, 1.0) for turn, end in zip(turns, drawn))
        state = method.aggregate(state, total, 2.0, round=number).state
    return state


def one(name, family, method, kind, dtype, *, folder):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedspeed.checkpoint.card import Card
    from fedspeed.checkpoint.export import export
    from fedspeed.data.prompt_format import format_of
    from fedspeed.models.tokenizer import byte_tokenizer

    base = write_base(family, folder / f"base of {name}", name.partition(" ")[0])
    target = folder / name
    adapter = AdapterConfig(method=method, blocks=LastBlocks(1), targets="all-linear", lora_rank=4)
    engine = build(ModelConfig(base=base, dtype=dtype), adapter, kind, folder)
    state = trained(engine, folded=name.startswith("folded"))
    engine.load({n: torch.from_numpy(t) for n, t in state.items()})
    target.mkdir()
    (target / "left over.bin").write_bytes(b"from an earlier export")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    format = format_of(tokenizer, DataConfig(max_tokens=40))
    card = Card(
        name, "adapter" if method == "lora" else "model", 3, base=base, dtype=TORCH_TYPE[dtype], format=format
    )
    export(target, engine.model, tokenizer, tensors=state, base=base, card=card.text())
    if method == "lora":
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, TORCH_TYPE[dtype]))
        loaded = PeftModel.from_pretrained(plain, target, autocast_adapter_dtype=False)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(target)
    written = {
        n: tensor for file in target.glob("model*.safetensors") for n, tensor in load_file(file).items()
    }
    kept = all(torch.equal(tensor, torch.from_numpy(state[n])) for n, tensor in written.items() if n in state)
    return {
        "kept": kept,
        "ours": logits(engine.ds_engine),
        "theirs": logits(loaded),
        "base": logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)),
        "files": sorted(p.name for p in target.iterdir()),
        "asked": asked(target, loaded) if name in ASKED else None,
        "template": AutoTokenizer.from_pretrained(target).chat_template,
        "words": AutoTokenizer.from_pretrained(target)("a é")["input_ids"],
        "dtype": str(loaded.dtype),
        "beside": sorted(p.name for p in folder.iterdir() if name in p.name),
    }


def asked(target, loaded):
    """Return the answers to the example on an export's card: of the code on the card, of `fedspeed chat` with
    lines on standard input, and of greedy decoding.
    """
    import torch

    from fedspeed.cli import main
    from fedspeed.data.prompt_template import template_for
    from fedspeed.data.rows import Row
    from fedspeed.models.tokenizer import byte_tokenizer

    code = (target / "README.md").read_text().partition("```python\n")[2].partition("\n```")[0]
    here = Path.cwd()
    answers = []
    os.chdir(target)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})  # noqa: S102
    answers.append(out.getvalue())
    os.chdir(here)
    room = ["--max-new-tokens", "26"]
    for words, lines in ((["reverse", "--input", "dabe", *room], ""), (room, "\nreverse dabe\n")):
        sys.stdin = io.StringIO(lines)
        with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings(record=True) as warned:
            assert main(["chat", str(target), *words]) == 0
        assert not warned, warned
        answers.append(out.getvalue())
    tokenizer = byte_tokenizer()
    ids = template_for(DataConfig(), tokenizer).prompt_ids(Row("reverse", "dabe", "", ""))
    begin = len(ids)
    with torch.no_grad():
        while len(ids) < 40 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(loaded(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return [*answers, tokenizer.decode(ids[begin:], skip_special_tokens=True) + "\n"]


def continued(folder):
    """Train on from an exported adapter."""
    name = "llama adapter"
    model = ModelConfig(base=str(folder / f"base of {name}"), dtype="fp32")
    fresh = AdapterConfig(targets="all-linear", lora_rank=4)
    first = build(model, fresh, "zero0", folder)
    again = build(model, AdapterConfig(start_from=str(folder / name)), "zero0", folder)
    return {"exported": trained(first), "started": {n: t.detach().numpy() for n, t in again.state().items()}}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return folder, run_clusters([1], exported, folder)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_export_computes_what_the_run_computed(results, case):
    seen = results[1][case]
    dtype = CASES[case][3]
    assert np.abs(seen["ours"] - seen["theirs"]).max() <= (0 if dtype == "bf16" else 2e-6)
    assert np.abs(seen["ours"] - seen["base"]).max() > 0.1
    assert seen["dtype"] == f"torch.{TORCH_TYPE[dtype]}", (
        "as config.json says, without a word from who loads it"
    )


@pytest.mark.parametrize("case", [case for case in CASES if "blocks" in case])
def test_trained_blocks_are_written_as_they_are(results, case):
    """Trained blocks are not stored in the type of the base's file, which would round small changes away."""
    assert results[1][case]["kept"]


@pytest.mark.parametrize("case", [case for case in CASES if "adapter" not in case])
def test_answers_of_an_exported_model_end_with_the_token_of_its_tokenizer(results, case):
    values = json.loads((results[0] / case / "generation_config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (257, 258, 256)


@pytest.mark.parametrize("case", CASES)
def test_the_folder_is_an_ordinary_one(results, case):
    folder = results[0]
    seen = results[1][case]
    weights = (
        {"adapter_config.json", "adapter_model.safetensors"}
        if "adapter" in case
        else {"config.json", "model.safetensors"}
    )
    if case.startswith("sharded"):
        index = json.loads((folder / case / "model.safetensors.index.json").read_text())
        weights = {"config.json", "model.safetensors.index.json", *index["weight_map"].values()}
        assert len(weights) > 3
    assert (
        weights
        <= set(seen["files"])
        <= weights
        | {
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "README.md",
        }
    )
    assert seen["beside"] == sorted([case, f"base of {case}"]), "no half-written folder beside it"
    assert seen["words"] == [257, 97, 32, 195, 169], "bos, then the bytes"
    if "adapter" in case:
        config = json.loads((folder / case / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["inference_mode"]) == (
            str(folder / f"base of {case}"),
            True,
        )
        grown = (
            32 if case.startswith("folded") else 0
        )  # of matrices with 32 rows, whose products are whole by now
        assert (config["r"], config["lora_alpha"]) == (4 + grown, 16 / 4 * (4 + grown))
        assert config["fan_in_fan_out"] is (CASES[case][0] == "gpt2")
    else:
        assert json.loads((folder / case / "config.json").read_text())["use_cache"] is True, (
            "off only while training"
        )


def test_all_files_are_as_readable_as_new_files_are(results, tmp_path):
    (tmp_path / "new").touch()
    for case in CASES:
        found = {
            path.name: oct(path.stat().st_mode) for path in [tmp_path / "new", *(results[0] / case).iterdir()]
        }
        assert len(set(found.values())) == 1, (case, found)


def test_a_pretrained_base_is_as_readable_as_new_files_are(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "STEPS", 1)
    quickstart.pretrain(tmp_path / "base", 0)
    (tmp_path / "new").touch()
    assert {oct(path.stat().st_mode) for path in [tmp_path / "new", *(tmp_path / "base").iterdir()]} == {
        oct((tmp_path / "new").stat().st_mode)
    }


@pytest.mark.parametrize("case", ASKED)
def test_the_code_in_the_card_and_chat_give_the_answer_that_training_meant(results, case):
    by_card, by_word, by_line, expected = results[1][case]["asked"]
    assert by_card == by_word == by_line == expected and len(expected) > 1


@pytest.mark.parametrize("case", CASES)
def test_no_chat_template_is_exported_and_the_card_says_so(results, case):
    assert results[1][case]["template"] is None and not (results[0] / case / "chat_template.jinja").exists()
    text = (results[0] / case / "README.md").read_text()
    assert (
        "it is not exported, because nothing was trained with it" in text
        and "```text\n{instruction} {input} \n```" in text
    )


def test_an_exported_adapter_starts_another_run(results):
    seen = results[1]["continued"]
    assert seen["started"].keys() == seen["exported"].keys()
    for name, tensor in seen["exported"].items():
        np.testing.assert_array_equal(seen["started"][name], tensor)


def test_the_files_of_an_export_are_counted(tmp_path, monkeypatch):
    """The count shows on a terminal when the export will be done."""
    import safetensors.torch

    from fedspeed import activity
    from fedspeed.checkpoint.export import _write_around

    base = write_base("llama", tmp_path / "base", "sharded")
    at = []
    write = safetensors.torch.save_file
    monkeypatch.setattr(
        safetensors.torch,
        "save_file",
        lambda *given, **named: at.append(activity.describe_current()) or write(*given, **named),
    )
    (tmp_path / "model").mkdir()
    _write_around(tmp_path / "model", {"model.norm.weight": np.ones(32, np.float32)}, base, "model.")
    count = len(list((tmp_path / "model").glob("*.safetensors")))
    assert count > 1 and at == [f"the export of the model, file {i + 1} of {count}" for i in range(count)]
