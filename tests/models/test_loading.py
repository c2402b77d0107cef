"""Models read block by block from real safetensors, against transformers' own loading."""

import gc
import json
import shutil
from dataclasses import replace

import pytest
import torch

from fedspeed.errors import ModelError
from fedspeed.models import loading
from fedspeed.models.blocks import decoder_blocks, units
from fedspeed.models.catalogue import shape_of
from fedspeed.models.config import AdapterConfig, LastBlocks, ModelConfig, chosen_blocks
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.loading import check_weights, materialise, meta_model
from tests.tiny import write_llama


def configs():
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {
        "llama": LlamaConfig(**small),
        "qwen2": Qwen2Config(**small, tie_word_embeddings=True),
        "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=300, bos_token_id=1, eos_token_id=2),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each family, in several shards."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("models")
    for kind, config in configs().items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / kind, max_shard_size="200KB")
        assert len(list((root / kind).glob("*.safetensors"))) > 1
    return root


def build(config, adapter, seed=0, place=lambda name, parameter: parameter):
    model = meta_model(config, adapter)
    materialise(model, config, adapter, seed, place)
    return model.eval()


IDS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_logits_are_those_of_from_pretrained(folders, kind, method):
    from transformers import AutoModelForCausalLM

    model = build(
        ModelConfig(base=str(folders / kind), dtype="fp32"),
        AdapterConfig(method=method, targets="all-linear"),
    )
    expected = AutoModelForCausalLM.from_pretrained(folders / kind).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def alive_bytes() -> int:
    """Memory behind all tensors of this process, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_no_more_than_a_block_is_whole_at_a_time(folders):
    """`place` throws every value away, as partitioning does; whatever tensor is alive at any moment is
    counted, whoever holds it.
    """
    config = ModelConfig(base=str(folders / "llama"), dtype="fp32")
    model = meta_model(config, AdapterConfig())
    largest = max(
        sum(p.numel() for p in unit.parameters(recurse=recurse)) for _, unit, recurse in units(model)
    )
    before = alive_bytes()
    most = 0

    def place(name, parameter):
        nonlocal most
        most = max(most, alive_bytes() - before)
        parameter.data = torch.empty(0)
        return parameter

    materialise(model, config, AdapterConfig(), 0, place)
    assert (
        len(decoder_blocks(model)) == 3
        and 0
        < most
        <= 4 * largest
        < 4 * sum(p.numel() for p in meta_model(config, AdapterConfig()).parameters()) / 2
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_random_weights_depend_on_the_seed_alone(folders, kind):
    config = ModelConfig(base=str(folders / kind), dtype="fp32", init="random")
    one, same, other = (build(config, AdapterConfig(method="full"), seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() < 2 or not torch.equal(a, c), name
    with torch.no_grad():
        assert 0.01 < one(input_ids=IDS).logits.std() < 2.0


def test_an_older_gpt2_without_its_prefix_loads(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    whole = {}
    for shard in (folders / "gpt2").glob("*.safetensors"):
        whole.update(load_file(shard))
    save_file({n.removeprefix("transformer."): t for n, t in whole.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders / "gpt2" / "config.json").read_text())
    model = build(ModelConfig(base=str(tmp_path), dtype="fp32"), AdapterConfig(method="full"))
    assert torch.equal(model.transformer.wte.weight, whole["transformer.wte.weight"])


def test_starting_from_an_adapter(folders, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folders / "llama"),
        LoraConfig(r=5, target_modules=["q_proj", "down_proj"]),
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    peft.save_pretrained(tmp_path)
    model = build(
        ModelConfig(base=str(folders / "llama"), dtype="fp32"), AdapterConfig(start_from=str(tmp_path))
    )
    expected = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folders / "llama"), tmp_path
    ).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def breakages(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    index = folder / "model.safetensors.index.json"
    yield "truncated or no safetensors file", lambda: shard.write_bytes(shard.read_bytes()[:1000])
    yield "named in the index, but missing", lambda: shard.unlink()
    yield (
        "has no model.norm.bias, which .* says it holds",
        lambda: index.write_text(
            json.dumps({
                "weight_map": {**json.loads(index.read_text())["weight_map"], "model.norm.bias": shard.name}
            })
        ),
    )
    yield "not an index", lambda: index.write_text("{")
    yield (
        "has shape",
        lambda: (folder / "config.json").write_text(
            json.dumps({
                **json.loads((folder / "config.json").read_text()),
                "hidden_size": 32,
                "head_dim": 16,
            })
        ),
    )
    yield "FedSpeed does not train", lambda: (folder / "config.json").write_text('{"model_type": "bert"}')
    yield "no config.json", lambda: (folder / "config.json").unlink()


@pytest.mark.parametrize("case", range(7))
def test_a_broken_folder_is_named(folders, tmp_path, case):
    import shutil

    shutil.copytree(folders / "llama", tmp_path / "m")
    message, spoil = list(breakages(tmp_path / "m"))[case]
    spoil()
    with pytest.raises(ModelError, match=message) as caught:
        build(ModelConfig(base=str(tmp_path / "m"), dtype="fp32"), AdapterConfig())
    assert str(tmp_path / "m") in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_names_of_all_linear_are_those_that_peft_finds(folders, family):
    """`models.adapter_checks` holds a saved adapter's names against them without importing torch."""
    model = meta_model(
        ModelConfig(base=str(folders / family), dtype="fp32"), AdapterConfig(targets="all-linear")
    )
    targets = {name.rpartition(".")[2] for name in model.peft_config["default"].target_modules}
    assert targets == set(shape_of(str(folders / family)).linear_names)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_weights_are_held_against_the_config_without_reading_them(folders, family, tmp_path):
    folder = shutil.copytree(folders / family, tmp_path / family)
    config = ModelConfig(base=str(folder), dtype="fp32")
    adapter = AdapterConfig()
    check_weights(meta_model(config, adapter), config, adapter)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": 301}))
    with pytest.raises(ModelError, match=r"has shape \(300, 64\), config.json asks for \(301, 64\)"):
        check_weights(meta_model(config, adapter), config, adapter)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(LastBlocks(2), {3, 4}), (LastBlocks(5), {0, 1, 2, 3, 4}), ((0,), {0}), ((3, 1, 4), {1, 3, 4})],
)
def test_blocks_are_chosen_by_number(blocks, expected):
    assert chosen_blocks(blocks, 5) == expected


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        (LastBlocks(6), "last=6, but the model has 5 blocks; choose at most 5"),
        ((), "names no block"),
        ((0, 5), "names 5, but the model has blocks 0 to 4; write some of those, or {last: N}"),
    ],
)
def test_blocks_that_a_model_does_not_have_are_refused(blocks, said):
    with pytest.raises(ValueError, match=said):
        chosen_blocks(blocks, 5)


def test_weights_may_be_drawn_elsewhere(folders, monkeypatch):
    """Here on the device that draws nothing. Each comes to `place` where it was drawn, and the adapter from
    the CPU, as its draws are everywhere.
    """
    config = ModelConfig(base=str(folders / "qwen2"), init="random", dtype="fp32")
    adapter = AdapterConfig()
    seen = {}

    def place(name, parameter):
        seen.setdefault("adapter" if ".lora_" in name else "base", set()).add(parameter.device.type)
        return torch.nn.Parameter(torch.zeros(parameter.shape), requires_grad=parameter.requires_grad)

    monkeypatch.setattr(loading, "draw_device", "meta")
    materialise(meta_model(config, adapter), config, adapter, 0, place)
    assert seen == {"base": {"meta"}, "adapter": {"cpu"}}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_card_draws_the_same_distribution(folders, monkeypatch):
    config = ModelConfig(base=str(folders / "qwen2"), init="random", dtype="fp32")
    adapter = AdapterConfig()
    monkeypatch.setattr(loading, "draw_device", "cuda")
    drawn = [p for n, p in build(config, adapter).named_parameters() if n.endswith("mlp.down_proj.weight")]
    assert drawn and all(
        p.is_cuda and abs(p.std().item() / 0.02 - 1) < 0.1 and abs(p.mean().item()) < 1e-3 for p in drawn
    )


def test_a_family_that_describes_other_parameters_is_refused(tmp_path, monkeypatch):
    """As the module of a new family may, which a dry run cannot compare with the model."""
    write_llama(tmp_path, 16, 1, 32, 24)
    family = FAMILIES["llama"]
    wrong = replace(family, shape=lambda values, name: replace(family.shape(values, name), norms=()))
    monkeypatch.setitem(FAMILIES, "llama", wrong)
    with pytest.raises(ModelError, match="families/llama.py describes other .*input_layernorm.*correct the"):
        meta_model(ModelConfig(base=str(tmp_path), dtype="fp32"), AdapterConfig())
