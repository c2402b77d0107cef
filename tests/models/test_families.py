"""Every family compared with transformers: names, shapes, counts, adapters, what is done to embeddings and
logits, and what cannot be trained.
"""

import ast

import pytest

from fedspeed.errors import ModelError
from fedspeed.models.catalogue import from_config
from fedspeed.models.families.registry import FAMILIES
from tests.conftest import ROOT
from tests.models.test_catalogue import SMALL, hold, meta
from tests.models.tiny_families import TINY

ALL = SMALL | TINY


def shape_of(name, **changes):
    return from_config(ALL[name] | changes, name, "config.json")


@pytest.fixture(scope="module")
def built():
    """Give transformers' models on the meta device, each built once."""
    models = {}

    def build(name):
        if name not in models:
            models[name] = meta(ALL[name])
        return models[name]

    return build


def adapter_for(name):
    """Return an adapter that changes no result, since its B is zero, or none where the family needs none."""
    from fedspeed.models.config import AdapterConfig

    return AdapterConfig(method="lora" if FAMILIES[ALL[name]["model_type"]].stacked else "full")


def test_every_family_has_a_configuration_here():
    assert {config["model_type"] for config in ALL.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ALL)
def test_names_and_shapes_are_those_of_transformers(name, built):
    model = built(name)
    shape = shape_of(name)
    family = FAMILIES[shape.family]
    expected = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert dict(family.parameters(shape)) == expected
    hold(shape, model)
    assert family.architecture == type(model).__name__
    assert family.decoder == f"{model.base_model_prefix}."


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("name", TINY)
def test_adapters_are_those_of_peft(name, targets):
    from fedspeed.models.adapters import add_adapter
    from fedspeed.models.config import AdapterConfig

    wrapped = add_adapter(meta(ALL[name]), AdapterConfig(lora_rank=5, targets=targets))
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert shape_of(name).lora(targets, 5) == trainable


@pytest.mark.parametrize("name", ALL)
def test_sliding_windows_are_those_of_transformers(name):
    from transformers import AutoConfig

    config = AutoConfig.for_model(**ALL[name])
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    shape = shape_of(name)
    masks = FAMILIES[shape.family].masks
    windowed = config.num_hidden_layers if masks == "window" and window else 0
    if masks == "layers":
        windowed = kinds.count("sliding_attention")
    assert (shape.windowed, shape.window) == (windowed, window if windowed else 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Give folders with random models of transformers, each written once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("families")

    def folder(name):
        if not (root / name).exists():
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY[name]))
            for parameter in model.parameters():  # nothing is as it was initialised: no norm is 1, no bias 0
                parameter.data += 0.02 * torch.randn_like(parameter)
            model.save_pretrained(root / name)
        return root / name

    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TINY)
def test_weights_and_steps_outside_the_blocks_are_those_of_transformers(name, dtype, saved):
    """Compare the logits of transformers with those of the model as FedSpeed builds it, as a whole and put
    together from embedding, decoder and head.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from fedspeed.models.blocks import anatomy
    from fedspeed.models.config import ModelConfig
    from fedspeed.models.loading import DTYPES, check_weights, materialise, meta_model

    folder = saved(name)
    config = ModelConfig(base=str(folder), dtype=dtype)
    adapter = adapter_for(name)
    model = meta_model(config, adapter)
    check_weights(model, config, adapter)
    materialise(model, config, adapter, 0, lambda name, parameter: parameter)
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()(ids).logits
        assert torch.equal(model.eval()(ids).logits, expected)
        parts = anatomy(model)
        rows = torch.nn.functional.embedding(ids, parts.embedding.weight)
        hidden = parts.decoder(inputs_embeds=parts.family.embed(rows, model.config)).last_hidden_state
        assert torch.equal(parts.family.logits(parts.head(hidden), model.config), expected)


@pytest.mark.parametrize("name", TINY)
def test_random_weights_are_drawn_like_those_of_transformers(name, saved):
    import torch

    from fedspeed.models.adapters import is_adapter
    from fedspeed.models.config import ModelConfig
    from fedspeed.models.loading import materialise, meta_model

    config = ModelConfig(base=str(saved(name)), dtype="fp32", init="random")
    adapter = adapter_for(name)
    model = meta_model(config, adapter)
    materialise(model, config, adapter, 7, lambda name, parameter: parameter)
    whole = meta(TINY[name]).to_empty(device="cpu")
    whole.init_weights()
    base = [named for named in model.named_parameters() if not is_adapter(named[0])]
    for (parameter, drawn), theirs in zip(base, whole.parameters(), strict=True):
        assert drawn.mean().item() == pytest.approx(theirs.mean().item(), abs=0.02), parameter
        assert drawn.std().item() == pytest.approx(theirs.std().item(), rel=0.2, abs=1e-6), parameter
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


REFUSED = [
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True: .*causal"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0: .*set it to null"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types=.*ministral"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types is .*for each of the 3 blocks"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types is .*for each of the 3 blocks"),
    (
        "qwen3-tied",
        {"layer_types": ["sliding_attention"] * 3},
        "layer_types=.*use_sliding_window is not true",
    ),
    ("smollm3", {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "layer_types=.*not set"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]: .*same modules; take a model with"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2: .*take a model with experts in every"),
    ("qwen3_moe", {"output_router_logits": True}, "output_router_logits=True: .*set it to false"),
    (
        "qwen3_moe",
        {"num_experts_per_tok": 7},
        r"num_experts_per_tok=7: a block has 6 experts \(num_experts\)",
    ),
    ("olmo2", {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    ("gpt_neox", {"num_attention_heads": 5}, "5 heads do not divide a hidden size of 64"),
    ("qwen2", {"is_causal": False}, "is_causal=False: .*causal models"),
    ("llama", {"num_attention_heads": 3, "head_dim": 24}, "3 heads do not divide a hidden size of 64"),
    ("llama", {"hidden_act": 3}, "hidden_act is 3, but must name an activation function"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=.*a value for each of the"),
    ("gemma3_text", {"sliding_window": None}, "sliding_window=None: .*no length of their window"),
    ("granite", {"quantization_config": {"bits": 4}}, ".*the weights are quantised.*unquantised original"),
    ("gemma3_text", {"model_type": "gemma3"}, ".*multimodal model: take its text decoder.*docs/extending.md"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_cannot_be_trained_exactly_is_refused(name, changes, message):
    with pytest.raises(ModelError, match=f"^config.json: {message}"):
        shape_of(name, **changes)


def test_nothing_but_the_families_compares_model_types():
    """Whatever differs by family is said in its module; elsewhere no name of one stands in the code."""
    package = ROOT / "fedspeed"
    found = []
    for path in sorted(package.rglob("*.py")):
        if path.is_relative_to(package / "models" / "families"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            values = []
            if isinstance(node, ast.Compare):
                values = [node.left, *node.comparators]
            elif isinstance(node, ast.Dict):
                values = node.keys
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                values = node.args if node.func.attr == "startswith" else []
            names = [
                v.value for value in values if value for v in ast.walk(value) if isinstance(v, ast.Constant)
            ]
            found += [f"{path}:{node.lineno}: {name}" for name in names if name in FAMILIES]
    assert found == []
