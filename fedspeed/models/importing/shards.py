"""Writing of a model's tensors as safetensors files of limited size, one in memory at a time."""

import json
from pathlib import Path

import torch

from fedspeed import activity
from fedspeed.errors import ModelError
from fedspeed.models.base_files import COMPUTED
from fedspeed.models.importing.tensors import Tensors
from fedspeed.models.loading import DTYPES
from fedspeed.models.stored import BASE_FILE, write_safetensors

SHARD_BYTES = 4 << 30


def write_tensors(
    folder: Path, tensors: Tensors, dtype: str, dequantised: str, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write all tensors that are no computed tables.

    Args:
        dtype: of all; `auto`: as they are stored.
        dequantised: with `auto`, dtype of tensors that were quantised.
        shard_bytes: largest size of a file with several tensors.

    Raises:
        ModelError: a tensor has values that are not finite, or cannot be read.
        OSError: a file cannot be written.
    """
    names = [name for name in tensors.names() if not COMPUTED.search(name)]
    shard: dict[str, torch.Tensor] = {}
    files: list[list[str]] = []
    size = 0
    total = 0
    for name in activity.counted(names, "the writing of the weights", "tensor"):
        as_stored = dequantised if tensors.is_dequantised(name) else ""
        wanted = as_stored if dtype == "auto" else dtype
        tensor = _converted(name, tensors.read(name), wanted)
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > shard_bytes:
            files.append(_write_shard(folder, len(files), shard))
            shard = {}
            size = 0
        shard[name] = tensor.contiguous()
        size += nbytes
        total += nbytes
    files.append(_write_shard(folder, len(files), shard))
    _name_shards(folder, files, total)


def _converted(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return a tensor in another type, checked.

    Args:
        dtype: empty: its own.

    Raises:
        ModelError: it has values that are not finite, perhaps because the type has none as large.
    """
    if not tensor.is_floating_point() or tensor.element_size() < 2:  # not a weight, refused if it is used
        return tensor
    if not tensor.isfinite().all():
        raise ModelError(f"{name}: has values that are not finite (NaN or infinity); get the model again")
    converted = tensor.to(DTYPES[dtype]) if dtype else tensor
    if not converted.isfinite().all():
        raise ModelError(
            f"{name}: has values up to {tensor.abs().max().item():.3g}, and fp16 ends at 65504; take "
            "--dtype bf16"
        )
    return converted


def _draft_name(number: int) -> str:
    return f"shard-{number}.safetensors"


def _write_shard(folder: Path, number: int, shard: dict[str, torch.Tensor]) -> list[str]:
    write_safetensors(folder / _draft_name(number), shard)
    return list(shard)


def _name_shards(folder: Path, files: list[list[str]], total: int) -> None:
    """Give the files the names by which libraries find them, and write the index of several."""
    if len(files) == 1:
        (folder / _draft_name(0)).rename(folder / BASE_FILE)
        return
    weight_map: dict[str, str] = {}
    stem = BASE_FILE.removesuffix(".safetensors")
    for number, names in enumerate(files):
        file = f"{stem}-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / _draft_name(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{BASE_FILE}.index.json").write_text(json.dumps(index, indent=2))
