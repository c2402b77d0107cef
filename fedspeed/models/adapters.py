"""The trainable part of a model: PEFT LoRA, or everything."""

import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from fedspeed.config.spelling import flow
from fedspeed.errors import ModelError
from fedspeed.models.blocks import decoder_blocks
from fedspeed.models.config import AdapterConfig, chosen_blocks
from fedspeed.models.factors import is_factor_a, is_factor_b
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.saved_adapter import read_config


def lora_config(config: AdapterConfig, model_type: str):
    """The PEFT configuration of a fresh adapter, or that of the folder the run starts from."""
    from peft import LoraConfig, PeftConfig

    if config.start_from:
        read_config(Path(config.start_from))
        loaded = PeftConfig.from_pretrained(config.start_from)
        assert isinstance(loaded, LoraConfig), "read_config has seen to it"
        loaded.inference_mode = False
        loaded.lora_dropout = config.dropout
        loaded.init_lora_weights, loaded.task_type = (
            True,
            "CAUSAL_LM",
        )  # A and B are read, so nothing is drawn; and nothing of the base is touched
        loaded.base_model_name_or_path = (
            None  # PEFT would warn that the base is called otherwise; `saved_adapter.notes` has told
        )
        return loaded
    if config.targets == "attention":
        targets = list(FAMILIES[model_type].attention_targets)
    elif config.targets == "all-linear":
        targets = "all-linear"
    else:
        targets = list(config.targets)
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=FAMILIES[model_type].transposed,
    )


def add_adapter(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Make only that of `model` (still on the meta device) trainable which `config` says: an adapter around
    it, some blocks, or everything.
    """
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

    wanted = lora_config(config, model.config.model_type)
    if not config.start_from and not isinstance(wanted.target_modules, str):
        _check_targets(model, wanted.target_modules, flow(config.targets))
    try:
        wrapped = get_peft_model(model, wanted, autocast_adapter_dtype=False)
    except ValueError as error:
        asked = (
            f"adapter.start_from={config.start_from}: its target_modules"
            if config.start_from
            else f"adapter.targets={flow(config.targets)}"
        )
        raise ModelError(
            f"{asked} does not fit {model.config.model_type}: {error}; it has {', '.join(_adaptable(model))}"
        ) from error
    # In the model's own type: PEFT makes adapters fp32, and DeepSpeed, which keeps masters and a loss scale
    # for 16 bit, then does neither.
    for name, parameter in wrapped.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(model.dtype)
    return wrapped


def _check_targets(model: nn.Module, targets: Iterable[str], asked: str) -> None:
    """That every name stands for some module, as PEFT finds them: by a whole name or its end. PEFT itself is
    content if one of them does.
    """
    names = [name for name, _ in model.named_modules()]
    if absent := [
        target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)
    ]:
        raise ModelError(
            f"adapter.targets={asked} does not fit {model.config.model_type}: it has no "
            f"{', '.join(sorted(absent))}, but "
            f"{', '.join(_adaptable(model))}"
        )


def _adaptable(model: nn.Module) -> list[str]:
    """The last parts of the names of all modules that LoRA can stand beside, in the order of the model."""
    from transformers.pytorch_utils import Conv1D

    return list(
        dict.fromkeys(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        )
    )


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def base_name(name: str) -> str:
    """The name a wrapped parameter has in the base model's own files."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def portable_name(name: str) -> str:
    """The name a trainable parameter has in an exported folder: PEFT's without the adapter's name, or the
    base model's own.
    """
    return name.replace(".default", "") if is_adapter(name) else name


def initial_adapter(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """LoRA's start (Hu et al., 2021): A drawn, B zero, so that B A = 0.

    A is uniform as torch's Linear draws it; beside an embedding it is normal, as torch's Embedding is. (PEFT
    draws B there and leaves A zero; but the rules that freeze a factor begin by freezing A, and B has no
    gradient while A is zero.)
    Drawn from the name and the seed alone, in fp32: every rank of every client makes the same one without a
        word to another.
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
