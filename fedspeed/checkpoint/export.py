"""Export of a trained model as an ordinary folder: a PEFT adapter, or a Hugging Face model."""

import copy
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedspeed import activity
from fedspeed.checkpoint.card import CARD_FILE
from fedspeed.checkpoint.journal import write_tensors
from fedspeed.files import follow_umask
from fedspeed.models.folded import as_one_adapter, module_of, rank_of
from fedspeed.models.hub import model_folder
from fedspeed.models.json_object import read_object
from fedspeed.models.local_config import local_folder
from fedspeed.models.provenance import public_name
from fedspeed.models.saved_adapter import PREFIX
from fedspeed.models.stored import BASE_FILE, FORMAT, key_of, stored_tensors, write_safetensors

GENERATION_FILE = "generation_config.json"


def export(
    folder: Path,
    model: Any,
    tokenizer: Any,
    tensors: Mapping[str, np.ndarray],
    base: str,
    *,
    card: str = "",
    chat_template: str = "",
    stop_ids: Collection[int] = (),
) -> None:
    """Write a model so that PEFT or transformers can load it.

    Folded adapters are merged into the LoRA adapter, whose rank grows by theirs.

    Args:
        folder: is replaced as a whole. A reader finds a complete folder, or none between two renames.
        model: of transformers or PEFT; only its configuration is read, since its weights may be partitioned.
        tokenizer: of transformers.
        tensors: the global state, fp32, by parameter name. Of an adapter it may have factors that the model
            does not have, because another role trains them; the adapter then names each of its modules.
        base: model.base; an adapter names it as its base model.
        card: text of the model card, README.md; empty for none.
        chat_template: source of the chat template of the training; empty where it had none, and then none is
            exported.
        stop_ids: tokens that end an answer besides the tokenizer's end-of-sequence.
    """
    from fedspeed.models.adapters import portable_name

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    named = {portable_name(n): t for n, t in as_one_adapter(tensors).items()}
    if hasattr(model, "peft_config"):
        write_tensors(part / "adapter_model.safetensors", named)
        config = _adapter_config(model, named) | {"base_model_name_or_path": lasting_name(base)}
        (part / "adapter_config.json").write_text(
            json.dumps(config, indent=2, default=_plain, sort_keys=True)
        )
    else:
        whole = {n for n, _ in model.named_parameters()} <= named.keys()
        if whole:
            write_tensors(part / "model.safetensors", named, metadata=FORMAT)
        else:
            _write_around(part, named, base, f"{model.base_model_prefix}.")
        model_config: Any = copy.deepcopy(model.config)
        model_config.use_cache = (
            True  # off while training; off in the file it would make generation quadratic
        )
        model_config.save_pretrained(part)
        (part / GENERATION_FILE).write_text(
            json.dumps(_generation(model, tokenizer, base, stop_ids), indent=2, sort_keys=True)
        )
    _with_chat_template(tokenizer, chat_template).save_pretrained(part)
    if card:
        (part / CARD_FILE).write_text(card, encoding="utf-8")
    follow_umask(part)
    put_in_place(part, folder)


def put_in_place(part: Path, folder: Path) -> None:
    """Rename a complete folder to `folder`, which it replaces."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _of_rank(config: dict, lora_rank: int) -> dict:
    """Return PEFT's configuration for another rank with the same scale: alpha / r, for rsLoRA alpha /
    sqrt(r).
    """
    if lora_rank == config["r"]:
        return config
    grown = lora_rank / config["r"]
    alpha = config["lora_alpha"] * (math.sqrt(grown) if config.get("use_rslora") else grown)
    return config | {"r": lora_rank, "lora_alpha": alpha}


def _adapter_config(model: Any, named: Mapping[str, np.ndarray]) -> dict:
    """Return PEFT's configuration of an adapter that is exported.

    Args:
        model: whose adapter it is, of PEFT. named: the factors by their exported names; those of modules that
            the model does not have may be among them.
    """
    from fedspeed.models.adapters import portable_name

    config = _of_rank(model.peft_config["default"].to_dict(), rank_of(named))
    if not named.keys() <= {portable_name(name) for name, _ in model.named_parameters()}:
        config |= _of_modules({module_of(name) for name in named})
    return config | {"inference_mode": True}


def _of_modules(paths: Collection[str]) -> dict:
    """Return the values of PEFT's configuration that choose modules, so that they name exactly these.

    Args:
        paths: of the modules, as they are in the exported names.
    """
    modules = sorted(path.removeprefix(PREFIX) for path in paths)
    return {
        "target_modules": modules,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _with_chat_template(tokenizer: Any, jinja: str) -> Any:
    """Return the tokenizer with the chat template of the training in place of the base's; "": with none."""
    trained = copy.deepcopy(tokenizer)
    trained.chat_template = jinja or None
    return trained


def lasting_name(base: str) -> str:
    """Return a name of the base that is valid in any working folder: the hub name, also that of a base that
    was imported from the hub, or an absolute path.
    """
    if name := public_name(base):
        return name
    path = Path(base)
    folder = path.parent if path.is_file() else path
    return os.path.abspath(folder) if folder.is_dir() else base


def _write_around(part: Path, named: Mapping[str, np.ndarray], base: str, prefix: str) -> None:
    """Write the base's weight files with the trained tensors replaced, one file in memory at a time.

    Trained tensors are written in fp32, because in the base's type most of a small delta would be rounded
    away. Frozen tensors keep their stored type; transformers loads all of them in the type of config.json,
    which is the run's.
    """
    import torch
    from safetensors.torch import load_file

    folder = model_folder(base)
    stored = stored_tensors(folder)
    trained = {key_of(name, stored, prefix): name for name in named}
    assert None not in trained, f"trained, but not in {folder}: {sorted(set(named) - set(trained.values()))}"
    total = 0
    files = sorted({tensor.file for tensor in stored.values()})
    for file in activity.counted(files, "the export of the model", "file"):
        tensors = load_file(file)
        for key in tensors.keys() & trained.keys():
            tensors[key] = torch.from_numpy(np.ascontiguousarray(named[trained[key]]))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        write_safetensors(part / file.name, tensors)
    index = folder / f"{BASE_FILE}.index.json"
    if not (folder / BASE_FILE).is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        (part / index.name).write_text(
            json.dumps(values | {"metadata": {**values.get("metadata", {}), "total_size": total}}, indent=2)
        )


def _generation(model: Any, tokenizer: Any, base: str, stop_ids: Collection[int]) -> dict:
    """Return the content of generation_config.json, with the special tokens of the run's tokenizer and the
    tokens that end an answer.

    The rest is the base's file, or what transformers derives from config.json.
    """
    folder = local_folder(base, weights=False)
    path = folder / GENERATION_FILE if folder else None
    values = (
        read_object(path, "a generation configuration")
        if path and path.is_file()
        else model.generation_config.to_diff_dict()
    )
    return with_special_tokens(values, tokenizer, stop_ids)


def with_special_tokens(generation: Mapping[str, Any], tokenizer: Any, stop_ids: Collection[int]) -> dict:
    """Return the values of a generation_config.json with the special tokens of a tokenizer. Tokens that end
    an answer are kept where all that should are among them, and else replaced: they may be of another
    tokenizer.

    Args:
        stop_ids: tokens that end an answer besides the tokenizer's end-of-sequence.
    """
    values = dict(generation)
    named = values.get("eos_token_id")
    ends = {tokenizer.eos_token_id, *stop_ids}
    if not ends <= set(named if isinstance(named, list) else [named]):
        values["eos_token_id"] = sorted(ends) if len(ends) > 1 else tokenizer.eos_token_id
    for key in ("bos_token_id", "pad_token_id"):
        if (token := getattr(tokenizer, key)) is not None:
            values[key] = token
    return values


def _plain(value: Any) -> Any:
    """Convert the sets and enums of PEFT's configuration for JSON."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))
