"""Counts are exact: held against the models that transformers and PEFT build on the meta device."""

import json

import pytest

from fedspeed.errors import ModelError
from fedspeed.models.catalogue import KNOWN, from_config, shape_of

SMALL = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 176,
        "vocab_size": 97,
        "tie_word_embeddings": False,
    },
    "llama-odd": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "intermediate_size": 100,
        "vocab_size": 50,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 130,
        "tie_word_embeddings": False,
    },
    "qwen2-short": {
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
        "intermediate_size": 96,
        "vocab_size": 130,
        "tie_word_embeddings": False,
    },
    "qwen2-tied": {
        "model_type": "qwen2",
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "intermediate_size": 256,
        "vocab_size": 130,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": 70,
        "n_positions": 33,
        "tie_word_embeddings": True,
    },
    "gpt2-inner": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 100,
        "vocab_size": 70,
        "n_positions": 33,
        "tie_word_embeddings": True,
    },
}


def meta(config):
    """Transformers' own model of a configuration, without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def config_of(shape):
    """The Hugging Face configuration of a shape of the catalogue."""
    if shape.family == "gpt2":
        return {
            "model_type": "gpt2",
            "n_embd": shape.hidden,
            "n_layer": shape.layers,
            "n_head": shape.heads,
            "vocab_size": shape.vocab,
            "n_positions": shape.positions,
            "tie_word_embeddings": shape.tied,
        }
    return {
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
    }


def hold(shape, model):
    from fedspeed.models.blocks import anatomy

    parts = anatomy(model)
    assert shape.total == sum(p.numel() for p in model.parameters())
    assert shape.block == sum(p.numel() for p in parts.blocks[0].parameters())
    assert shape.layers == len(parts.blocks)
    assert shape.embedding == parts.embedding.weight.numel()
    assert shape.head == (0 if parts.head.weight is parts.embedding.weight else parts.head.weight.numel())


@pytest.mark.parametrize("name", SMALL)
def test_counts_are_those_of_transformers(name):
    hold(from_config(SMALL[name], name, name), meta(SMALL[name]))


@pytest.mark.parametrize("name", KNOWN)
def test_the_models_of_the_catalogue_are_built_alike(name):
    config = config_of(KNOWN[name])
    hold(KNOWN[name], meta(config))
    assert from_config(config, name, name) == KNOWN[name]


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8_030_261_248),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", 14_770_033_664),
        ("gpt3-125m", 125_226_240),
    ],
)  # a tied 50257 x 768 and 2048 positions: published GPT-2 has 1024 of them and 124.4 M
def test_published_sizes(name, total):
    assert KNOWN[name].total == total


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("name", SMALL)
def test_adapters_are_those_of_peft(name, targets):
    from fedspeed.models.adapters import add_adapter
    from fedspeed.models.config import AdapterConfig

    wrapped = add_adapter(meta(SMALL[name]), AdapterConfig(lora_rank=5, targets=targets))
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert from_config(SMALL[name], name, name).lora(targets, 5) == trainable


def test_targets_by_name():
    shape = from_config(SMALL["gpt2"], "g", "g")
    assert [linear.rows_in for linear in shape.adapted(("c_proj",))] == [
        48,
        192,
    ]  # both matrices of that name
    with pytest.raises(ModelError, match="no q_proj; it has c_attn, c_proj, c_fc"):
        shape.adapted(("q_proj", "c_fc"))


def test_a_folder_its_file_and_a_name_in_any_case(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL["llama"]))
    assert shape_of(str(tmp_path)) == shape_of(str(tmp_path / "config.json"))
    assert shape_of(str(tmp_path)).hidden == 64
    assert shape_of("deepseek-ai/deepseek-r1-distill-qwen-7b").layers == 28


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type is 'mamba', which FedSpeed does not.*; it trains llama, qwen2, gpt2.*extending.md",
        ),
        ({**SMALL["llama"], "hidden_size": None}, "hidden_size is None"),
        ({**SMALL["llama"], "vocab_size": "many"}, "vocab_size is 'many'"),
        ({**SMALL["gpt2"], "n_head": 5}, "5 heads do not divide a hidden size of 48"),
    ],
)
def test_what_cannot_be_a_model(config, message):
    with pytest.raises(ModelError, match=message):
        from_config(config, "m", "m/config.json")


def test_unknown_names_get_a_hint():
    with pytest.raises(ModelError, match="did you mean deepseek-ai/DeepSeek-R1-Distill-Qwen-7B.*Known are"):
        shape_of("DeepSeek-R1-Distil-Qwen-7B")
