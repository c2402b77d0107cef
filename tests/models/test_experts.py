"""A mixture of experts: how large it is, how its experts are found in files, and what has no adapter."""

import json

import pytest

from fedspeed.errors import ModelError
from fedspeed.models.base_files import check_base
from fedspeed.models.catalogue import from_config, shape_of
from fedspeed.models.config import AdapterConfig, ModelConfig
from tests.models.test_catalogue import hold, meta
from tests.models.test_published import CONFIGS
from tests.models.tiny_families import TINY

EXPERT = "model.layers.1.mlp.experts.3."


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Give the folder of a random model as transformers writes it, and the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY["qwen3_moe"]))
    folder = tmp_path_factory.mktemp("experts")
    model.save_pretrained(folder)
    return folder, model


def variant(written, folder, change):
    """Write the same model with other tensors; `change` is given those of the file and returns them."""
    from safetensors.torch import load_file, save_file

    tensors = change(load_file(written[0] / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((written[0] / "config.json").read_text())
    return folder


def loaded(folder):
    from fedspeed.models.loading import check_weights, materialise, meta_model

    config = ModelConfig(base=str(folder), dtype="fp32")
    adapter = AdapterConfig()
    model = meta_model(config, adapter)
    check_weights(model, config, adapter)
    materialise(model, config, adapter, 0, lambda name, parameter: parameter)
    return model


def test_stored_and_active_parameters_of_a_published_model():
    shape = shape_of(str(CONFIGS / "Qwen3-30B-A3B"))
    hold(shape, meta(json.loads((CONFIGS / "Qwen3-30B-A3B" / "config.json").read_text())))
    assert (shape.total, shape.active) == (30_532_122_624, 3_353_032_704)
    text = "30.53 B parameters, 3.35 B of them active in a token (8 of 128 experts a block)"
    assert shape.size_text == text


def test_experts_are_read_one_by_one_or_stacked(written, tmp_path):
    import torch

    folder, model = written
    stacked = variant(written, tmp_path, lambda tensors: dict(model.state_dict()))
    expected = dict(model.named_parameters())
    for place in (folder, stacked):
        assert check_base(place)[2] == []
        found = {name.partition("base_model.model.")[2]: p for name, p in loaded(place).named_parameters()}
        for name in expected:
            if "q_proj" not in name and "v_proj" not in name:
                assert torch.equal(found[name], expected[name]), name


def test_matrices_of_one_parameter_may_have_several_types(written, tmp_path):
    import torch

    half = {f"{EXPERT}gate_proj.weight", f"{EXPERT}down_proj.weight"}

    def change(tensors):
        return {name: t.bfloat16() if name in half else t for name, t in tensors.items()}

    experts = loaded(variant(written, tmp_path, change)).base_model.model.model.layers[1].mlp.experts
    gate, up = experts.gate_up_proj[3].chunk(2)
    expected, same = written[1].model.layers[1].mlp.experts.gate_up_proj[3].chunk(2)
    assert torch.equal(gate, expected.bfloat16().float()) and torch.equal(up, same)


@pytest.mark.parametrize(
    ("without", "more", "said"),
    [
        ("up_proj.weight", {}, f"no weight named {EXPERT}up_proj.weight; the files belong to another"),
        ("", {"up_proj.weight": (4, 64)}, rf"{EXPERT}up_proj.weight has shape \(4, 64\), .* \(48, 64\)"),
    ],
)
def test_a_matrix_that_is_missing_or_wrong_is_named(written, tmp_path, without, more, said):
    import torch

    def change(tensors):
        left = {name: tensor for name, tensor in tensors.items() if name != EXPERT + without}
        return left | {EXPERT + name: torch.zeros(shape) for name, shape in more.items()}

    folder = variant(written, tmp_path, change)
    for read in (check_base, loaded):
        with pytest.raises(ModelError, match=said):
            read(folder)


def test_what_belongs_to_no_expert_is_left_over(written, tmp_path):
    import torch

    extra = {"model.layers.0.mlp.experts.6.up_proj.weight": torch.zeros(48, 64)}
    folder = variant(written, tmp_path, lambda tensors: tensors | extra)
    [note] = check_base(folder)[2]
    assert "1 tensor has no place" in note and next(iter(extra)) in note


@pytest.mark.parametrize("target", ["gate_proj", "experts", "gate", "down_proj"])
def test_experts_and_routers_take_no_adapter(target):
    from fedspeed.models.adapters import add_adapter

    said = "no linear modules, and take no LoRA"
    with pytest.raises(ModelError, match=said):
        add_adapter(meta(TINY["qwen3_moe"]), AdapterConfig(targets=("q_proj", target)))
    with pytest.raises(ModelError, match=said):
        from_config(TINY["qwen3_moe"], "moe", "config.json").lora((target,), 4)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "eager"), ((9, 0), "grouped_mm")])
def test_cards_without_grouped_products_compute_expert_by_expert(written, monkeypatch, capability, expected):
    import torch

    from fedspeed.models.loading import meta_model

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    model = meta_model(ModelConfig(base=str(written[0]), dtype="fp32"), AdapterConfig())
    assert model.config._experts_implementation == expected


@pytest.mark.parametrize("method", ["full", "blocks"])
def test_only_adapters_of_a_mixture_of_experts_train(method):
    from fedspeed.models.adapters import add_adapter

    with pytest.raises(ModelError, match=f"adapter.method={method}: .* set adapter.method=lora"):
        add_adapter(meta(TINY["qwen3_moe"]), AdapterConfig(method=method))
