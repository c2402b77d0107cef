"""The result of a run as an ordinary folder: a PEFT adapter, or a Hugging Face model."""

import copy
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedspeed import activity
from fedspeed.checkpoint.card import CARD_FILE
from fedspeed.checkpoint.journal import write_tensors
from fedspeed.files import follow_umask
from fedspeed.models.folded import as_one_adapter, rank_of
from fedspeed.models.hub import model_folder
from fedspeed.models.json_object import read_object
from fedspeed.models.local_config import local_folder
from fedspeed.models.stored import BASE_FILE, key_of, stored_tensors

GENERATION_FILE = "generation_config.json"
FORMAT = {"format": "pt"}  # transformers refuses files without it


def export(
    folder: Path, model, tokenizer, tensors: Mapping[str, np.ndarray], base: str, *, card: str = ""
) -> None:
    """Write `tensors` (a global state, fp32, by parameter name) so that PEFT or transformers loads it. What
    is folded in it becomes a part of the adapter, whose rank is larger for it.

    Args:
        folder: replaced as a whole; a reader finds a whole folder or, for the moment between two renames,
            none.
        model: the wrapped model, read for its configuration only (its weights may be partitioned away).
        base: model.base, which an adapter names as its base model, so that it is found from anywhere.
        card: the model card, README.md.
    """
    from fedspeed.models.adapters import portable_name

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    named = {portable_name(n): t for n, t in as_one_adapter(tensors).items()}
    if hasattr(model, "peft_config"):
        write_tensors(part / "adapter_model.safetensors", named)
        config = _of_rank(model.peft_config["default"].to_dict(), rank_of(named))
        config |= {"base_model_name_or_path": lasting_name(base), "inference_mode": True}
        (part / "adapter_config.json").write_text(
            json.dumps(config, indent=2, default=_plain, sort_keys=True)
        )
    else:
        whole = {n for n, _ in model.named_parameters()} <= named.keys()
        if whole:
            write_tensors(part / "model.safetensors", named, metadata=FORMAT)
        else:
            _write_around(part, named, base, f"{model.base_model_prefix}.")
        config = copy.deepcopy(model.config)
        config.use_cache = True  # off while training; off in the file it would make generation quadratic
        config.save_pretrained(part)
        (part / GENERATION_FILE).write_text(
            json.dumps(_generation(model, tokenizer, base), indent=2, sort_keys=True)
        )
    _without_chat_template(tokenizer).save_pretrained(part)
    if card:
        (part / CARD_FILE).write_text(card, encoding="utf-8")
    follow_umask(part)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _of_rank(config: dict, lora_rank: int) -> dict:
    """Return PEFT's configuration for factors of another rank at the same scale, alpha / r (or alpha /
    sqrt(r) of rsLoRA).
    """
    if lora_rank == config["r"]:
        return config
    grown = lora_rank / config["r"]
    alpha = config["lora_alpha"] * (math.sqrt(grown) if config.get("use_rslora") else grown)
    return config | {"r": lora_rank, "lora_alpha": alpha}


def _without_chat_template(tokenizer):
    """The tokenizer without the base's chat template: nothing was trained with it, and who asked by it would
    get worse answers.
    """
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


def lasting_name(base: str) -> str:
    """`base` as it is found from any folder: the absolute path of a folder that is here, or the hub name."""
    path = Path(base)
    folder = path.parent if path.is_file() else path
    return os.path.abspath(folder) if folder.is_dir() else base


def _write_around(part: Path, named: Mapping[str, np.ndarray], base: str, prefix: str) -> None:
    """The base's own weight files with some tensors replaced, one file in memory at a time.

    What was trained is written in fp32, as it is: in the base's own type most of a small change would be
        rounded away. Beside it the frozen
    tensors stay as they are stored; transformers loads all of them in the type that config.json names, which
    is the run's.
    """
    import torch
    from safetensors.torch import load_file, save_file

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
        save_file(tensors, part / file.name, metadata=FORMAT)
    index = folder / f"{BASE_FILE}.index.json"
    if not (folder / BASE_FILE).is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        (part / index.name).write_text(
            json.dumps(values | {"metadata": {**values.get("metadata", {}), "total_size": total}}, indent=2)
        )


def _generation(model, tokenizer, base: str) -> dict:
    """What generation_config.json says: as the base's does, or as transformers makes it from config.json; but
    an answer ends, and rows are filled up, with the tokens that the run's tokenizer has for it.
    """
    folder = local_folder(base, weights=False)
    path = folder / GENERATION_FILE if folder else None
    values = (
        read_object(path, "a generation configuration")
        if path and path.is_file()
        else model.generation_config.to_diff_dict()
    )
    ends = values.get("eos_token_id")
    if tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        values["eos_token_id"] = tokenizer.eos_token_id
    for key in ("bos_token_id", "pad_token_id"):
        if (token := getattr(tokenizer, key)) is not None:
            values[key] = token
    return values


def _plain(value):
    """PEFT's configuration holds sets and enums."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))
