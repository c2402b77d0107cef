"""What a base's files hold decides: tied or not, as in transformers; stored types; tensors without a
place.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedspeed.errors import ModelError
from fedspeed.models.base_files import base_shape, check_base
from fedspeed.models.catalogue import from_config
from fedspeed.models.config import AdapterConfig, LastBlocks, ModelConfig
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.loading import check_weights, materialise, meta_model
from fedspeed.models.stored import stored_tensors
from tests.models.test_catalogue import SMALL, meta

TIED = ("llama", "qwen2", "gpt2")
IDS = torch.arange(20).view(2, 10)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tied model of each family: its folder, and its tensors by name."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

    root = tmp_path_factory.mktemp("tied")
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 60,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    configs = {
        "llama": LlamaConfig(**small),
        "qwen2": Qwen2Config(**small, num_key_value_heads=1),
        "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, bos_token_id=1, eos_token_id=2),
    }
    for family, config in configs.items():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
    return root


def variant(tied, family, folder, **changes):
    """A copy of a tied model whose files hold other tensors: name -> tensor, None takes one out."""
    tensors = load_file(tied / family / "model.safetensors")
    for name, tensor in changes.items():
        tensors[name] = tensor
    folder.mkdir()
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text((tied / family / "config.json").read_text())
    return folder


def reconfigured(folder, **values):
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | values))
    return folder


def built(folder, method="full", dtype="fp32"):
    config = ModelConfig(base=str(folder), dtype=dtype)
    adapter = AdapterConfig(method=method, blocks=LastBlocks(1))
    model = meta_model(config, adapter)
    check_weights(model, config, adapter)
    materialise(model, config, adapter, 0, lambda name, parameter: parameter)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


HEADS = {  # what the files hold of the two ends -> whether they are one tensor
    "equal": True,
    "different": False,
    "head only": True,
    "embedding only": True,
    "without prefix, different": False,
}


def with_ends(tied, family, folder, ends):
    name = FAMILIES[family].embedding
    table = load_file(tied / family / "model.safetensors")[name]
    other = torch.randn(table.shape, generator=torch.Generator().manual_seed(5))
    changes = {
        "equal": {"lm_head.weight": table.clone()},
        "different": {"lm_head.weight": other},
        "head only": {"lm_head.weight": other, name: None},
        "embedding only": {},
        "without prefix, different": {"lm_head.weight": other, name: None, name.partition(".")[2]: table},
    }[ends]
    return variant(tied, family, folder, **changes)


@pytest.mark.parametrize("ends", HEADS)
@pytest.mark.parametrize("family", TIED)
def test_ends_are_tied_as_in_transformers(tied, tmp_path, family, ends):
    from transformers import AutoModelForCausalLM

    folder = with_ends(tied, family, tmp_path / "m", ends)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = built(folder)
    assert torch.equal(logits(model), logits(expected))
    one = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (
        one
        == HEADS[ends]
        == (expected.get_input_embeddings().weight is expected.get_output_embeddings().weight)
    )
    assert base_shape(folder).tied == one == model.config.tie_word_embeddings
    assert base_shape(folder).total == sum(p.numel() for p in model.parameters())
    assert base_shape(folder, pretrained=False).tied
    told = [text for text in check_base(folder)[2] if "ties the head" in text]
    assert len(told) == (not one)


def test_untied_ends_without_a_head_are_refused_with_the_remedy(tied, tmp_path):
    folder = reconfigured(variant(tied, "llama", tmp_path / "m"), tie_word_embeddings=False)
    for look in (check_base, built):
        with pytest.raises(
            ModelError, match=r"no weight named lm_head.weight;.*set tie_word_embeddings to true"
        ):
            look(folder)


@pytest.mark.parametrize("name", SMALL)
def test_names_and_shapes_are_those_of_transformers(name):
    expected = {n: tuple(p.shape) for n, p in meta(SMALL[name]).named_parameters()}
    shape = from_config(SMALL[name], name, name)
    assert dict(FAMILIES[shape.family].parameters(shape)) == expected


OTHER_TYPES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
)


@pytest.mark.parametrize("dtype", OTHER_TYPES, ids=str)
def test_a_stored_type_that_is_no_plain_weight_is_refused(tied, tmp_path, dtype):
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = variant(tied, "llama", tmp_path / "m", **{name: torch.ones(32, 32).to(dtype)})
    for look in (check_base, built):
        with pytest.raises(
            ModelError, match=rf"model.safetensors: 1 tensor of a type .* {name} in .*[Dd]equantise"
        ) as caught:
            look(folder)
        assert stored_tensors(folder)[name].dtype in str(caught.value)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantised_base_is_refused(tied, tmp_path, key):
    folder = reconfigured(
        variant(tied, "llama", tmp_path / "m"), **{key: {"quant_method": "gptq", "bits": 4}}
    )
    for look in (check_base, built):
        with pytest.raises(
            ModelError, match=f"config.json: {key} says that the weights are quantised.*dequantise"
        ):
            look(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_plain_types_are_read(tied, tmp_path, dtype):
    tensors = {
        name: tensor.to(dtype) for name, tensor in load_file(tied / "llama" / "model.safetensors").items()
    }
    folder = variant(tied, "llama", tmp_path / "m", **tensors)
    for name, parameter in built(folder).named_parameters():
        assert torch.equal(parameter, tensors[name].float()), name
    wide = [text for text in check_base(folder)[2] if "fp64" in text]
    assert len(wide) == (dtype == torch.float64), "rounding is told"


def test_values_beyond_fp16_are_refused(tied, tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"
    folder = variant(tied, "llama", tmp_path / "m", **{name: torch.full((32, 48), 1e5, dtype=torch.bfloat16)})
    with pytest.raises(ModelError, match=rf"{name}: has values up to .*fp16 ends at 65504; set model.dtype"):
        built(folder, dtype="fp16")
    built(folder, dtype="bf16")


BUFFERS = {
    "llama": {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8),
    },
    "qwen2": {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 9, 9, dtype=torch.uint8),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
        "transformer.position_ids": torch.arange(9),
    },
}
PLACELESS = {
    "llama": {
        "model.layers.0.self_attn.q_proj.bias": torch.ones(32),
        "model.layers.2.mlp.up_proj.weight": torch.ones(48, 32),
    },
    "qwen2": {"model.layers.0.self_attn.o_proj.bias": torch.ones(32), "score.weight": torch.ones(2, 32)},
    "gpt2": {
        "transformer.h.2.ln_1.weight": torch.ones(32),
        "multiple_choice_head.weight": torch.ones(1, dtype=torch.int8),
    },
}


@pytest.mark.parametrize("family", TIED)
def test_tensors_without_a_place_are_told_and_computed_tables_are_not(tied, tmp_path, family):
    folder = variant(tied, family, tmp_path / "silent", **BUFFERS[family])
    assert check_base(folder)[2] == []
    folder = variant(tied, family, tmp_path / "told", **PLACELESS[family])
    (text,) = check_base(folder)[2]
    assert text.startswith(f"{folder}: 2 tensors have no place") and all(
        name in text for name in PLACELESS[family]
    )
    assert torch.equal(logits(built(folder)), logits(built(tied / family))), (
        "as in transformers they change nothing"
    )


def test_a_whole_file_goes_before_an_index_as_in_transformers(tied, tmp_path):
    """Left over from an earlier way of saving."""
    folder = variant(tied, "llama", tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}})
    )
    check_base(folder)


@pytest.mark.parametrize("shard", ["../m.safetensors", "/m.safetensors", "sub/m.safetensors", ".", ""])
def test_an_index_names_files_of_its_folder_alone(tied, tmp_path, shard):
    """The content that sites compare is that of these files."""
    folder = variant(tied, "llama", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(ModelError, match="which is no file of this folder") as error:
        check_base(folder)
    assert str(index) in str(error.value)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.Q4_K_M.gguf"])
def test_weights_in_another_format_are_to_be_converted_and_not_drawn(tied, tmp_path, file):
    folder = variant(tied, "llama", tmp_path / "m")
    (folder / "model.safetensors").rename(folder / file)
    for look in (check_base, built):
        with pytest.raises(
            ModelError, match=rf"but {file}, which FedSpeed does not read.*(save_pretrained|import-base)"
        ) as caught:
            look(folder)
        assert "random" not in str(caught.value)
