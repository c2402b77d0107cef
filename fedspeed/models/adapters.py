"""The trainable part of a model: PEFT LoRA, or everything."""

import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fedspeed.config.spelling import flow
from fedspeed.errors import ModelError
from fedspeed.models.blocks import decoder_blocks
from fedspeed.models.config import AdapterConfig, chosen_blocks
from fedspeed.models.factors import is_factor_a, is_factor_b
from fedspeed.models.families.experts import NOT_LINEAR
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.saved_adapter import CONFIG_FILE, adapted_modules, has_patterns, read_config

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


def lora_config(config: AdapterConfig, model: "PreTrainedModel") -> "LoraConfig":
    """Return the PEFT configuration of a new adapter for a model, or that of the folder that the run starts
    from.
    """
    from peft import LoraConfig

    if config.start_from:
        loaded = saved_lora_config(Path(config.start_from))
        loaded.inference_mode = False
        loaded.lora_dropout = config.dropout
        loaded.init_lora_weights = True  # A and B are read from the file, and the base is not changed
        loaded.task_type = "CAUSAL_LM"
        # PEFT would warn of a base with another name, which `saved_adapter.notes` reports.
        loaded.base_model_name_or_path = None
        return loaded
    family = FAMILIES[model.config.model_type]
    targets: str | list[str] = "all-linear"
    if config.targets == "attention":
        targets = list(family.attention_targets)
    elif config.targets == "all-linear" and family.stacked:  # PEFT would adapt experts and router, too
        targets = _linear_names(model)
    elif not isinstance(config.targets, str):
        targets = list(config.targets)
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=family.transposed,
    )


def saved_lora_config(folder: Path) -> "LoraConfig":
    """Return the PEFT configuration of the adapter in a folder. Where it has regular expressions, it names
    the modules of the adapter's file instead.

    Raises:
        ModelError: it is damaged, or none that FedSpeed can train.
    """
    from peft import LoraConfig, PeftConfig

    saved = read_config(folder)
    try:
        loaded = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelError(
            f"{folder / CONFIG_FILE}: PEFT refuses it ({type(error).__name__}: {error}); copy the "
            "folder again"
        ) from error
    assert isinstance(loaded, LoraConfig), "read_config has seen to it"
    if has_patterns(saved):
        loaded.target_modules = set(adapted_modules(folder))
        loaded.exclude_modules = None
        loaded.layers_to_transform = None
        loaded.layers_pattern = None
    return loaded


def add_adapter(model: "PreTrainedModel", config: AdapterConfig) -> "PreTrainedModel":
    """Make trainable what `config` says, and nothing else: a LoRA adapter that is added, some blocks, or the
    whole model.

    Args:
        model: on the meta device.

    Returns:
        the model, with LoRA wrapped in PEFT's, which passes its attributes through.

    Raises:
        ModelError: the model has no such modules or blocks.
    """
    FAMILIES[model.config.model_type].check_trained(config.method)
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

    wanted = lora_config(config, model)
    if not config.start_from and not isinstance(wanted.target_modules, str):
        _check_targets(model, wanted.target_modules, flow(config.targets))
    try:
        wrapped = get_peft_model(model, wanted, autocast_adapter_dtype=False)
    except (ValueError, TypeError) as error:
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
    return cast("PreTrainedModel", wrapped)  # whose attributes PEFT passes through


def _check_targets(model: "PreTrainedModel", targets: Iterable[str], asked: str) -> None:
    """Raise ModelError where a target matches no module by its whole name or the end of it. PEFT itself asks
    for one match among all targets only, and also adapts stacked experts and their router.
    """
    experts = FAMILIES[model.config.model_type].stacked
    adaptable = (nn.Linear, nn.Embedding) if experts else nn.Module
    names = [name for name, module in model.named_modules() if isinstance(module, adaptable)]
    if absent := [
        target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)
    ]:
        raise ModelError(
            f"adapter.targets={asked} does not fit {model.config.model_type}: it has no "
            f"{', '.join(sorted(absent))}, but "
            f"{', '.join(_adaptable(model))}{f'; {NOT_LINEAR}' if experts else ''}"
        )


def _linear_names(model: "PreTrainedModel") -> list[str]:
    """Return the names of the linear modules of a model's blocks."""
    modules = decoder_blocks(model)[0].named_modules()
    return [name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)]


def _adaptable(model: nn.Module) -> list[str]:
    """Return the last parts of the names of all modules that LoRA can adapt, in the order of the model."""
    from transformers.pytorch_utils import Conv1D

    return list(
        dict.fromkeys(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        )
    )


def is_adapter(name: str) -> bool:
    """Tell whether a parameter belongs to a LoRA adapter."""
    return ".lora_" in name


def lora_scale(model: Any) -> float:
    """Return the scale s of a model's LoRA adapter, by which its products B A are multiplied.

    Args:
        model: wrapped in PEFT's.
    """
    config = model.peft_config["default"]
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def base_name(name: str) -> str:
    """Return the name that a wrapped parameter has in the files of the base."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def portable_name(name: str) -> str:
    """Return the name that a trainable parameter has in an exported folder: PEFT's without the name of the
    adapter, or that of the base.
    """
    return name.replace(".default", "") if is_adapter(name) else name


def initial_adapter(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return the initial value of a LoRA factor (Hu et al., 2021): A is drawn and B is zero, so that B A = 0.

    A is uniform as the weight of torch's Linear, and normal for an embedding, as the weight of torch's
    Embedding. (For embeddings PEFT draws B and leaves A zero; but methods that freeze a factor begin with A,
    and B has no gradient while A is zero.) The draw depends on the name and the seed alone and is made in
    fp32, so that all ranks of all clients get the same value without communication.
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
