"""The result of a run as an ordinary folder: a PEFT adapter, or a Hugging Face model."""

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedspeed.checkpoint.journal import write_tensors

FORMAT = {"format": "pt"}  # transformers refuses files without it


def export(folder: Path, model, tokenizer, tensors: Mapping[str, np.ndarray], base: str) -> None:
    """Write `tensors` (full trainable state, fp32, by parameter name) so that PEFT or transformers loads it.

    Args:
        folder: replaced as a whole; a reader finds a whole folder or, for the moment between two renames, none.
        model: the wrapped model, read for its configuration only (its weights may be partitioned away).
        base: model.base, which an adapter names as its base model, so that it is found from anywhere.
    """
    from fedspeed.models.adapters import portable_name

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    named = {portable_name(n): t for n, t in tensors.items()}
    if hasattr(model, "peft_config"):
        write_tensors(part / "adapter_model.safetensors", named)
        config = model.peft_config["default"].to_dict() | {"base_model_name_or_path": lasting_name(base), "inference_mode": True}
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2, default=_plain, sort_keys=True))
    else:
        whole = {n for n, _ in model.named_parameters()} <= named.keys()
        if whole:
            write_tensors(part / "model.safetensors", named, metadata=FORMAT)
        else:
            _write_around(part, named, base, model.base_model_prefix)
        config = copy.deepcopy(model.config)
        config.use_cache = True  # off while training; off in the file it would make generation quadratic
        config.save_pretrained(part)
    tokenizer.save_pretrained(part)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def lasting_name(base: str) -> str:
    """`base` as it is found from any folder: the absolute path of a folder that is here, or the hub name."""
    path = Path(base)
    folder = path.parent if path.is_file() else path
    return os.path.abspath(folder) if folder.is_dir() else base


def _write_around(part: Path, named: dict[str, np.ndarray], base: str, prefix: str) -> None:
    """The base's own weight files with some tensors replaced, one file in memory at a time."""
    import torch
    from safetensors.torch import load_file, save_file

    from fedspeed.models.loading import model_folder

    folder = model_folder(base)
    left = set(named)
    for source in sorted(folder.glob("*.safetensors")):
        tensors = load_file(source)
        for key, old in tensors.items():  # older files leave the decoder's prefix out
            name = next((n for n in (key, f"{prefix}.{key}") if n in left), None)
            if name is not None:
                tensors[key] = torch.from_numpy(np.ascontiguousarray(named[name])).to(old.dtype)
                left.discard(name)
        save_file(tensors, part / source.name, metadata=FORMAT)
    assert not left, f"trained, but not in {folder}: {sorted(left)}"
    for index in folder.glob("*.safetensors.index.json"):
        shutil.copy(index, part)


def _plain(value):
    """PEFT's configuration holds sets and enums."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))
