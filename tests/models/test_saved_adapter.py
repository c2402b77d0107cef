"""Adapters to start from: those accepted have the logits that PEFT gives them, and the others are refused
with the reason and a remedy.
"""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft.tuners import tuners_utils
from peft.utils import other
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedspeed.config.load import load
from fedspeed.errors import ModelError
from fedspeed.models.adapter_checks import check_adapter
from fedspeed.models.adapters import saved_lora_config
from fedspeed.models.config import AdapterConfig, ModelConfig
from fedspeed.models.loading import check_weights, materialise, meta_model
from fedspeed.models.saved_adapter import WEIGHTS_FILE, notes, outside_blocks, read_config
from tests.tiny import write_llama

IDS = torch.arange(24).view(2, 12)


def label(value) -> str:
    """Return the text of a test parameter without addresses of functions, so that all workers agree."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def adapter(folder: Path, base: str, *, change=lambda model: None, seed=0, save=None, **config) -> Path:
    """Save a LoRA of `base` with PEFT, with a B that is not zero; return its folder."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    change(model)
    with warnings.catch_warnings(action="ignore"):
        wrapped = get_peft_model(
            model,
            LoraConfig(
                **{
                    "r": 3,
                    "lora_alpha": 5,
                    "target_modules": ["q_proj", "down_proj"],
                    "task_type": "CAUSAL_LM",
                }
                | config
            ),
        )
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        wrapped.save_pretrained(folder, **(save or {}))
    return folder


def ours(base: str, folder: Path) -> torch.Tensor:
    """Return the logits of the base with the adapter, loaded as in a run, after the checks of the dry run."""
    config = ModelConfig(base=base, dtype="fp32")
    start = AdapterConfig(start_from=str(folder))
    model = meta_model(config, start)
    check_weights(model, config, start)
    materialise(model, config, start, 0, lambda name, parameter: parameter)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def theirs(base: str, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        return (
            PeftModel
            .from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
            .eval()(input_ids=IDS)
            .logits
        )


def edit(folder: Path, **values) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def dry_run(base: str, folder: Path, *overrides: str) -> str:
    """Return what the dry run reports of the adapter before it builds the model."""
    return "\n".join(
        check_adapter(load(None, [f"model.base={base}", f"adapter.start_from={folder}", *overrides]))
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"lora_bias": True},
        {"layers_to_transform": [1]},
        {"target_modules": r".*\.1\..*_proj"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"target_modules": ["v_proj", "embed_tokens"]},
        {"target_modules": ["v_proj", "lm_head"]},
        {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
        {"task_type": None},
        {"save": {"save_embedding_layers": True}},
    ],
    ids=label,
)
def test_an_adapter_means_what_it_means_to_peft(base, tmp_path, config):
    folder = adapter(tmp_path / "adapter", base, **config)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=IDS).logits
    expected = theirs(base, folder)
    assert (expected - plain).abs().max() > 0.01, "the adapter must do something, or equality shows nothing"
    torch.testing.assert_close(ours(base, folder), expected, rtol=0, atol=1e-6)
    is_pattern = ".*" in str(config)
    assert ("note     " in dry_run(base, folder)) == is_pattern
    assert (f"on the modules that {WEIGHTS_FILE} holds" in dry_run(base, folder)) == is_pattern


# Python would try 2^30 ways to match the name of a module.
EVIL = r"(\w+\.?)+!"


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": EVIL},
        {"exclude_modules": EVIL},
        {"layers_to_transform": [0, 1], "layers_pattern": [EVIL]},
        {"layers_to_transform": [0, 1], "layers_pattern": EVIL},
        {"target_modules": "all-linear", "exclude_modules": EVIL},
    ],
    ids=label,
)
def test_no_regular_expression_of_an_adapter_is_evaluated(base, tmp_path, monkeypatch, values):
    folder = adapter(tmp_path / "adapter", base)
    expected = ours(base, folder)
    edit(folder, **values)

    class Refusing:
        """Stands for the module `re` in PEFT."""

        def __getattr__(self, name):
            def call(pattern, *arguments, **options):
                assert EVIL not in str(pattern), "it would be evaluated"
                return getattr(re, name)(pattern, *arguments, **options)

            return call if name in ("match", "fullmatch", "search", "compile") else getattr(re, name)

    for module in (tuners_utils, other):
        monkeypatch.setattr(module, "re", Refusing())
    assert "chooses modules by a regular expression, which is not evaluated" in dry_run(base, folder)
    assert torch.equal(ours(base, folder), expected)
    config = saved_lora_config(folder)
    assert config.target_modules == {
        f"model.layers.{block}.{name}" for block in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }


def test_a_pattern_hides_no_embedding_and_needs_factors(base, tmp_path):
    folder = adapter(tmp_path / "adapter", base, target_modules=["v_proj", "embed_tokens"])
    edit(folder, target_modules=r".*(v_proj|embed_tokens)")
    assert outside_blocks(AdapterConfig(start_from=str(folder))) == "embed_tokens"
    file = folder / WEIGHTS_FILE
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=f"{file}: holds no factor of a LoRA"):
        saved_lora_config(folder)


def test_another_dropout_than_in_training_is_noted_unless_it_was_chosen(base, tmp_path):
    folder = edit(adapter(tmp_path / "adapter", base), lora_dropout=0.05)
    report = dry_run(base, folder)
    assert (
        f"note     adapter.start_from={folder}: was trained with lora_dropout=0.05, and goes on with "
        in report
    )
    assert "adapter.dropout=0, the default; name adapter.dropout to have another" in report
    for chosen in ("0", "0.05", "0.1"):
        assert "note" not in dry_run(base, folder, f"adapter.dropout={chosen}")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            {"init_lora_weights": "pissa"},
            ("init_lora_weights=pissa", "path_initial_model_for_weight_conversion", "merge_and_unload"),
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            ("init_lora_weights=pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ),
        (
            {"init_lora_weights": "olora"},
            ("init_lora_weights=olora", "path_initial_model_for_weight_conversion"),
        ),
        ({"init_lora_weights": "mica"}, ("init_lora_weights=mica", "init_lora_weights=true")),
        ({"use_dora": True}, ("use_dora=true", "DoRA", "merge_and_unload")),
        ({"trainable_token_indices": [3, 4]}, ("trainable_token_indices=[3, 4]", "rows of the embedding")),
        ({"modules_to_save": ["lm_head"]}, ('modules_to_save=["lm_head"]', "whole modules")),
        ({"bias": "lora_only"}, ('bias="lora_only"', "biases of the base")),
        ({"rank_pattern": {"q_proj": 2}}, ("rank_pattern=", "rank of their own")),
        ({"layer_replication": [[0, 2], [1, 2]]}, ("layer_replication=", "repeats blocks")),
    ],
    ids=label,
)
def test_an_adapter_with_more_than_lora_factors_is_refused(base, tmp_path, config, named):
    folder = adapter(tmp_path / "adapter", base, **config)
    for check in (lambda: dry_run(base, folder), lambda: ours(base, folder)):
        with pytest.raises(ModelError) as caught:
            check()
        assert all(text in str(caught.value) for text in (str(folder / "adapter_config.json"), *named)), str(
            caught.value
        )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"peft_type": "LOHA"}, ("peft_type=LOHA", "no LoRA", "merge_and_unload")),
        ({"peft_type": None}, ("peft_type=None",)),
        ({"init_lora_weights": "corda"}, ("init_lora_weights=corda", "conversion")),
        ({"init_lora_weights": "loftq"}, ("init_lora_weights=loftq",)),
        ({"init_lora_weights": 7}, ("init_lora_weights=7", "unknown")),
        ({"task_type": "SEQ_CLS"}, ("task_type=SEQ_CLS", "CAUSAL_LM")),
        ({"target_parameters": ["mlp.experts"]}, ("target_parameters=",)),
        ({"kasa_config": {"a": 1}}, ("kasa_config=", "variant")),
        ({"r": "3"}, ('r is "3"',)),
        ({"lora_alpha": None}, ("lora_alpha is null",)),
        ({"lora_alpha": float("inf")}, ("lora_alpha is Infinity",)),
        ({"lora_alpha": float("nan")}, ("lora_alpha is NaN",)),
        ({"r": 10**400}, ("r is 1000000",)),
        ({"target_modules": [1]}, ("target_modules is [1]",)),
        ({"exclude_modules": [["a"]]}, ('exclude_modules is [["a"]]', "a str or a list")),
        ({"exclude_modules": 5}, ("exclude_modules is 5",)),
        ({"layers_pattern": {"a": 1}}, ('layers_pattern is {"a": 1}',)),
        ({"layers_to_transform": "x"}, ('layers_to_transform is "x"', "an int or a list")),
        ({"layers_to_transform": [True]}, ("layers_to_transform is [true]",)),
    ],
    ids=label,
)
def test_a_configuration_that_is_not_supported_is_refused(base, tmp_path, values, named):
    folder = edit(adapter(tmp_path / "adapter", base), **values)
    with pytest.raises(ModelError) as caught:
        dry_run(base, folder)
    assert all(text in str(caught.value) for text in named), str(caught.value)


def resized(model):
    model.resize_token_embeddings(70)


def embedding_trained(model):
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.5


@pytest.mark.parametrize(
    ("options", "values", "named"),
    [
        (
            {"change": resized},
            {},
            ("lm_head.weight and 1 more", "vocabulary resized", "unload()", "model.base"),
        ),
        (
            {"change": embedding_trained, "save": {"save_embedding_layers": True}},
            {},
            ("embed_tokens.weight", "an embedding trained"),
        ),
        (
            {"change": embedding_trained, "target_modules": ["q_proj", "embed_tokens"]},
            {},
            ("embed_tokens.base_layer.weight", "an embedding trained"),
        ),
        (
            {},
            {"target_modules": ["q_proj"]},
            ("down_proj.lora_A.weight and 3 more", "would be dropped", "target_modules"),
        ),
        ({}, {"layers_to_transform": [0]}, ("layers.1", "would be dropped")),
        (
            {},
            {"target_modules": ["q_proj", "down_proj", "up_proj"]},
            ("lacks", "up_proj", "adapter_config.json"),
        ),
    ],
    ids=label,
)
def test_no_tensor_of_the_file_is_dropped_or_made_up(base, tmp_path, options, values, named):
    folder = edit(adapter(tmp_path / "adapter", base, **options), **values)
    with pytest.raises(ModelError) as caught:
        ours(base, folder)
    assert all(text in str(caught.value) for text in (str(folder / "adapter_model.safetensors"), *named)), (
        str(caught.value)
    )


def test_factors_in_a_type_that_needs_scales_are_refused(base, tmp_path):
    folder = adapter(tmp_path / "adapter", base)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelError, match="type that holds no plain weights.* in I8"):
        dry_run(base, folder)


def test_the_remedy_for_a_resized_vocabulary(base, tmp_path):
    from peft import PeftModel

    folder = adapter(tmp_path / "adapter", base, change=resized)
    model = AutoModelForCausalLM.from_pretrained(base)
    resized(model)
    PeftModel.from_pretrained(model, str(folder)).unload().save_pretrained(tmp_path / "resized")
    torch.testing.assert_close(
        ours(str(tmp_path / "resized"), folder), theirs(str(tmp_path / "resized"), folder), rtol=0, atol=1e-6
    )


def test_a_tensor_of_unknown_meaning_is_named(base, tmp_path):
    folder = adapter(tmp_path / "adapter", base)
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.score.weight": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=r"score\.weight, which .* do not have"):
        ours(base, folder)


# Another base.


def gpt2(folder: Path) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    ).save_pretrained(folder)
    return str(folder)


def test_another_family_is_named_and_not_the_targets(base, tmp_path):
    other = gpt2(tmp_path / "gpt2")
    folder = adapter(tmp_path / "adapter", base)
    with pytest.raises(ModelError, match="was trained on a llama.*is a gpt2; give the base") as caught:
        dry_run(other, folder)
    assert "adapter.targets" not in str(caught.value)
    edit(folder, base_model_name_or_path=None)
    with pytest.raises(
        ModelError, match="is on down_proj, q_proj, but a block of .*gpt2.* has c_attn"
    ) as caught:
        dry_run(other, folder)
    assert "adapter.targets" not in str(caught.value)
    with pytest.raises(ModelError, match="start_from=.*target_modules does not fit gpt2") as caught:
        ours(other, folder)
    assert "adapter.targets" not in str(caught.value)


@pytest.mark.parametrize("named", ["there", "class", "catalogue"])
def test_a_family_with_the_same_names_is_known_by_its_base(base, tmp_path, named):
    folder = adapter(tmp_path / "adapter", base)
    there = tmp_path / "qwen"
    there.mkdir()
    (there / "config.json").write_text('{"model_type": "qwen2"}')
    edit(
        folder,
        **{
            "there": {"base_model_name_or_path": str(there)},
            "class": {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}},
            "catalogue": {"base_model_name_or_path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"},
        }[named],
    )
    with pytest.raises(ModelError, match="was trained on a qwen2.*is a llama"):
        dry_run(base, folder)


def test_another_size_is_named(tmp_path, base):
    wide = write_llama(tmp_path / "wide", hidden=32, layers=2, vocab=64, intermediate=64, heads=2, kv_heads=1)
    deep = write_llama(tmp_path / "deep", hidden=32, layers=3, vocab=64, intermediate=48, heads=2, kv_heads=1)
    folder = adapter(tmp_path / "adapter", base)
    with pytest.raises(ModelError, match="this base asks for .*another base"):
        ours(wide, folder)
    with pytest.raises(ModelError, match=r"lacks .*layers\.2.*another base"):
        ours(deep, folder)


@pytest.mark.parametrize(
    ("named", "is_noted"),
    [
        ("{base}", False),
        ("{base}/", False),
        ("{copy}", False),
        ("{other}", True),
        ("{trained}", True),
        ("org/llama", False),
        ("/elsewhere/org/llama", False),
        ("/cache/models--org--Llama/snapshots/0123", False),
        ("org/llama-instruct", True),
        (None, False),
    ],
)
def test_another_name_of_the_base_is_noted(base, tmp_path, named, is_noted):
    import shutil

    folders = {"base": base, "copy": shutil.copytree(base, tmp_path / "copy"), "other": tmp_path / "llama"}
    write_llama(tmp_path / "llama", hidden=16, layers=2, vocab=64, intermediate=48, heads=2, kv_heads=1)
    path = shutil.copytree(base, tmp_path / "trained" / "llama") / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    folders["trained"] = path.parent  # of equal configuration and sizes, with other values
    folder = edit(
        adapter(tmp_path / "adapter", base), base_model_name_or_path=named and named.format(**folders)
    )
    report = "\n".join(notes(folder, read_config(folder), base))
    assert ("was trained on" in report) == is_noted
    assert ("note" in dry_run(base, folder)) == is_noted


def test_a_key_of_a_newer_peft_is_noted(base, tmp_path):
    folder = edit(adapter(tmp_path / "adapter", base), quantum_lora=3, quantum_off=None)
    assert "quantum_lora: not known" in dry_run(base, folder) and "quantum_off" not in dry_run(base, folder)
