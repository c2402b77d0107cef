"""The dimensions of `model.base`: from its `config.json`, or from the table of models that FedSpeed was built
for. No torch, no weights.

Counts are exact: the tests compare them with the models that transformers builds from the same configuration.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedspeed.errors import ModelError
from fedspeed.files import json_value
from fedspeed.models.families.registry import family_of
from fedspeed.models.families.shape import ModelShape
from fedspeed.models.families.values import ConfigValues
from fedspeed.models.quantisation import refuse_quantised


def from_config(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Return the dimensions that a Hugging Face configuration states.

    Keys that it leaves out have transformers' defaults, but for the sizes that no two models have in common.

    Args:
        where: the file, for messages.

    Raises:
        ModelError: another family than those of FAMILIES, quantised weights, a missing or impossible number,
            or something of the family that FedSpeed cannot train exactly.
    """
    family = family_of(config.get("model_type"), where)
    refuse_quantised(config, name, where)
    values = ConfigValues(config, where)
    if not values.flag("is_causal", True):
        values.refuse(
            "is_causal",
            "tokens of such a model attend to later ones, and FedSpeed trains causal models",
            "take a causal LM, or set it to true if the model was trained as one",
        )
    return family.shape(values, name)


def _qwen(hidden: int, layers: int, heads: int, *, kv_heads: int, inner: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
    }


def _gpt3(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": 50257,
        "n_positions": 2048,
    }


_KNOWN = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen(1536, 28, 12, kv_heads=2, inner=8960, vocab=151936),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _qwen(3584, 28, 28, kv_heads=4, inner=18944, vocab=152064),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _qwen(5120, 48, 40, kv_heads=8, inner=13824, vocab=152064),
    # Brown et al., 2020, table 2.1, as GPT-2's architecture can hold them, whose heads divide the hidden
    # size: the table gives 1.3B 24 heads of 128 on 2048 (here 16) and 13B a hidden size of 5140 for 40
    # heads of 128 (here 5120).
    "gpt3-125m": _gpt3(768, 12, 12),
    "gpt3-350m": _gpt3(1024, 24, 16),
    "gpt3-760m": _gpt3(1536, 24, 16),
    "gpt3-1.3b": _gpt3(2048, 24, 16),
    "gpt3-2.7b": _gpt3(2560, 32, 32),
    "gpt3-6.7b": _gpt3(4096, 32, 32),
    "gpt3-13b": _gpt3(5120, 40, 40),
}
KNOWN = {name: from_config(config, name, name) for name, config in _KNOWN.items()}


def shape_of(base: str) -> ModelShape:
    """Return the dimensions of `model.base`: a known name, a folder with config.json, or a config.json.

    Raises:
        ModelError: none of these, or a configuration of another architecture.
    """
    path = Path(base)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        return from_config(_read(path), str(path.parent), str(path))
    by_name = {name.lower(): shape for name, shape in KNOWN.items()}
    if base.lower() in by_name:
        return by_name[base.lower()]
    if path.name == "config.json" and path.parent.is_dir():
        raise ModelError(
            f"{path}: no such file; name a folder with the config.json of a Hugging Face causal LM"
        )
    short = {name.rpartition("/")[2]: name for name in by_name}
    near = difflib.get_close_matches(base.lower().rpartition("/")[2], short, n=1)
    hint = f"did you mean {by_name[short[near[0]]].name}? " if near else ""
    raise ModelError(
        f"model {base!r} is neither a folder with config.json nor in the catalogue; {hint}Known are "
        f"{', '.join(KNOWN)}; of any other, "
        "give the folder or its config.json"
    )


def _read(path: Path) -> dict:
    try:
        config = json_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read as a model configuration ({error}); copy the file again"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"{path}: not a model configuration but {type(config).__name__}; copy the file again"
        )
    return config
