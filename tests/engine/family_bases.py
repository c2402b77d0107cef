"""Tiny random models of every family as Hugging Face folders, with all special features of the family on."""

from pathlib import Path

VOCABULARY = 260  # of the built-in byte tokenizer
WINDOW = 6  # tokens of sliding attention; rows of tests are longer
# The modules that `adapter.targets=attention` means; other families have Llama's names.
ATTENTION = {"gpt2": ("c_attn",), "gpt_neox": ("query_key_value",), "phi3": ("qkv_proj",)}
LLAMAS_ATTENTION = ("q_proj", "v_proj")
# What `all-linear` means, where PEFT means more by it: stacked experts and their router.
LINEAR = {"qwen3_moe": ("q_proj", "k_proj", "v_proj", "o_proj")}
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BODY = _TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_FULL = "full_attention"
_SLIDING = "sliding_attention"
_MIXED = [_SLIDING, _FULL, _FULL, _SLIDING]  # the two stages of a pipeline have different lists
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 5.0],
}
_SPECIAL = {
    "llama": {
        "head_dim": 24,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "n_inner": 96},
    "mistral": {"head_dim": 24, "sliding_window": WINDOW, "rope_parameters": _YARN},
    "qwen3": {
        "head_dim": 24,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
        "rope_parameters": _YARN,
    },
    "qwen3_moe": {
        "head_dim": 24,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "rope_parameters": _YARN,
    },
    "gemma3_text": {
        "head_dim": 24,
        "attention_bias": True,
        "query_pre_attn_scalar": 20,
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            _FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            _SLIDING: {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "phi3": {"sliding_window": WINDOW, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 32},
    "olmo2": {"attention_bias": True, "rope_parameters": _YARN},
    "gpt_neox": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    },
    "smollm3": {
        "attention_bias": True,
        "mlp_bias": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "no_rope_layers": [1, 0, 0, 1],
        "layer_types": [_SLIDING, _SLIDING, _FULL, _FULL],
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 6.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.5,
    },
}
WRITTEN = tuple(_SPECIAL)  # families by their model_type
# Settings in which a tied base differs from an untied one, so that both values of each are compared.
_TIED = {
    "gpt_neox": {"use_parallel_residual": False},
    "gpt2": {"scale_attn_by_inverse_layer_idx": False},
    "gemma3_text": {"final_logit_softcapping": None},
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"use_sliding_window": False, "norm_topk_prob": False},
    "phi3": {"sliding_window": None},
    "smollm3": {"use_sliding_window": False, "layer_types": [_FULL] * 4},
}


def configuration(family: str, *, tied: bool):
    """Return the transformers configuration of a family's tiny model; the tied one has some of its features
    off.
    """
    from transformers import AutoConfig

    body = dict(_BODY)
    if family == "gpt2":  # has neither, and its intermediate size is called n_inner
        body = {k: v for k, v in body.items() if k not in ("intermediate_size", "num_key_value_heads")}
        body |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    if family == "gpt_neox":
        del body["num_key_value_heads"]
    special = _SPECIAL[family] | (_TIED.get(family, {}) if tied else {})
    return AutoConfig.for_model(family, **body, **special, tie_word_embeddings=tied)


def write_base(family: str, folder: Path, *, tied: bool = False) -> str:
    """Write a random model of a family; returns its folder as text.

    Matrices are drawn so large, and norms and biases so far from one and zero, that any of them counts.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(configuration(family, tied=tied))
    rng = np.random.default_rng(11)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            drawn = torch.from_numpy(rng.standard_normal(tuple(tensor.shape)).astype(np.float32))
            norm = tensor.dim() == 1 and name.endswith("weight")
            centre = float(norm and family != "gemma3_text")  # Gemma's norms multiply by 1 + weight
            tensor.copy_(centre + (0.3 if tensor.dim() == 1 else 0.12) * drawn)
    model.save_pretrained(folder)
    return str(folder)


def write_kept(base: str, blocks: tuple[int, ...], folder: Path) -> str:
    """Write the model that is left of a base when only some blocks stay, as one that always had only these;
    returns its folder as text.
    """
    import re

    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[b] for b in blocks])
    config.num_hidden_layers = len(blocks)
    config.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(Path(base) / "model.safetensors").items():
        number = re.search(r"\.layers\.(\d+)\.", name)
        if number is None:
            tensors[name] = tensor
        elif int(number[1]) in blocks:
            position = blocks.index(int(number[1]))
            tensors[name.replace(number[0], f".layers.{position}.")] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def linear_targets(family: str) -> tuple[str, ...] | str:
    """Return what PEFT is to be given for an adapter of targets `all-linear`."""
    return LINEAR.get(family, "all-linear")


def attention_targets(family: str) -> tuple[str, ...]:
    """Return the modules of a block that an adapter of targets `attention` adapts."""
    return ATTENTION.get(family, LLAMAS_ATTENTION)
