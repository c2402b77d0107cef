"""The trainable part of a model: PEFT LoRA, or everything."""

import math
import zlib
from pathlib import Path

import torch
from torch import nn

from fedspeed.errors import ModelError
from fedspeed.models.blocks import decoder_blocks
from fedspeed.models.catalogue import ATTENTION_TARGETS, DEFAULT_ATTENTION_TARGETS
from fedspeed.models.config import AdapterConfig, chosen_blocks
from fedspeed.models.factors import is_factor_a, is_factor_b


def lora_config(config: AdapterConfig, model_type: str):
    """The PEFT configuration of a fresh adapter, or that of the folder the run starts from."""
    from peft import LoraConfig, PeftConfig

    if config.start_from:
        path = Path(config.start_from) / "adapter_config.json"
        if not path.is_file():
            raise ModelError(f"adapter.start_from: {path} does not exist; give a PEFT folder (adapter_config.json, adapter_model.safetensors)")
        loaded = PeftConfig.from_pretrained(config.start_from)
        if not isinstance(loaded, LoraConfig):
            raise ModelError(f"{path}: peft_type {loaded.peft_type} cannot be trained here; FedSpeed starts from LoRA adapters")
        for key, plain in (("bias", "none"), ("modules_to_save", None)):
            if (value := getattr(loaded, key) or plain) != plain:
                raise ModelError(f"{path}: {key}={value!r}; FedSpeed trains LoRA's A and B only, start from an adapter without {key}")
        if loaded.rank_pattern or loaded.alpha_pattern:
            raise ModelError(f"{path}: rank_pattern and alpha_pattern are not supported; start from an adapter of one rank")
        loaded.inference_mode, loaded.lora_dropout = False, config.dropout
        return loaded
    if config.targets == "attention":
        targets = list(ATTENTION_TARGETS.get(model_type, DEFAULT_ATTENTION_TARGETS))
    elif config.targets == "all-linear":
        targets = "all-linear"
    else:
        targets = [t.strip() for t in config.targets.split(",")]
    return LoraConfig(r=config.lora_rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets,
                      task_type="CAUSAL_LM", fan_in_fan_out=model_type == "gpt2")


def add_adapter(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Make only that of `model` (still on the meta device) trainable which `config` says: an adapter around it, some blocks, or everything."""
    if config.method == "full":
        return model
    if config.method == "blocks":
        try:
            chosen = chosen_blocks(config.blocks, model.config.num_hidden_layers)
        except ValueError as error:
            raise ModelError(str(error)) from error
        model.requires_grad_(False)
        for number in chosen:
            decoder_blocks(model)[number].requires_grad_(True)
        return model
    from peft import get_peft_model

    try:
        wrapped = get_peft_model(model, lora_config(config, model.config.model_type), autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"adapter.targets={config.targets!r} does not fit {model.config.model_type}: {error}") from error
    # In the model's own type: PEFT makes adapters fp32, and DeepSpeed, which keeps masters and a loss scale for 16 bit, then does neither.
    for name, parameter in wrapped.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(model.dtype)
    return wrapped


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def base_name(name: str) -> str:
    """The name a wrapped parameter has in the base model's own files."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def portable_name(name: str) -> str:
    """The name a trainable parameter has in an exported folder: PEFT's without the adapter's name, or the base model's own."""
    return name.replace(".default", "") if is_adapter(name) else name


def initial_adapter(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """LoRA's start (Hu et al., 2021): A drawn, B zero, so that B A = 0.

    A is uniform as torch's Linear draws it; beside an embedding it is normal, as torch's Embedding is. (PEFT draws B there and leaves A zero;
    but the rules that freeze a factor begin by freezing A, and B has no gradient while A is zero.)
    Drawn from the name and the seed alone, in fp32: every rank of every client makes the same one without a word to another.
    """
    if is_factor_a(name):
        generator = torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(name.encode()))
        if ".lora_embedding_A" in name:
            return torch.empty(shape).normal_(generator=generator)
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if is_factor_b(name):
        return torch.zeros(shape)
    raise ModelError(f"{name}: FedSpeed trains LoRA's A and B; this adapter has another kind of weight")
