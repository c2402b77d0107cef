"""Safetensors files: what their headers say, read without torch, and how they are written."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from fedspeed.errors import ModelError
from fedspeed.files import json_value
from fedspeed.models.quantisation import import_command

if TYPE_CHECKING:
    import torch

BASE_FILE = "model.safetensors"
FORMAT = {"format": "pt"}  # metadata that transformers requires
# Stored types that hold weights as they are.
FLOATS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
IMPORTED_FORMATS = (".bin", ".gguf")  # what import-base reads besides
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".ckpt")
# Files that trainers write in the same formats, and that hold no weights.
_NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "sampler", "rng_state", "training_args")
COMPARED_BYTES = 1 << 24  # at a time


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `dtype` as safetensors writes it (F32, BF16, ...), `begin` and `end` are byte
    positions in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def write_safetensors(path: Path, tensors: dict[str, "torch.Tensor"]) -> None:
    """Write a file of tensors.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
    """
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=FORMAT)
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def weight_files(folder: Path, single: str) -> list[Path]:
    """Return the safetensors files of a folder where transformers looks for them: the one called `single`, or
    the shards of its index.

    Raises:
        ModelError: there are none, or the index cannot be read.
    """
    if (folder / single).is_file():
        return [folder / single]
    index = folder / f"{single}.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(_weight_map(index).values()))]
    others = other_weights((path.name for path in folder.glob("*")), single)
    if others:
        remedy = (
            "load it in transformers (an adapter in PEFT) and write it with save_pretrained(FOLDER), which "
            "makes safetensors"
        )
        if single == BASE_FILE and others[0].lower().endswith(IMPORTED_FORMATS):
            source = folder / others[0] if others[0].lower().endswith(".gguf") else folder
            remedy = f"`{import_command(source)}`"
        raise ModelError(
            f"{folder}: no {single} and no {index.name}, but {others[0]}, which FedSpeed does not read; "
            f"convert it: {remedy}"
        )
    remedy = "give a folder with safetensors weights"
    if single == BASE_FILE:
        remedy += ", or set model.init=random to train from drawn weights"
    raise ModelError(f"{folder}: no {single} and no {index.name}; {remedy}")


def other_weights(names: Iterable[str], single: str = BASE_FILE) -> list[str]:
    """Return the files that hold weights in a format that FedSpeed does not read; those with the names that
    libraries use come first.

    Args:
        names: of files, perhaps with folders before them. single: what the file would be called as
            safetensors: an adapter's files begin with its name, a base's do not begin with an adapter's.
    """
    found = []
    for name in names:
        file = name.rpartition("/")[2].lower()
        of_adapter = file.startswith("adapter_")
        if (
            file.endswith(_OTHER_FORMATS)
            and not file.startswith(_NO_WEIGHTS)
            and of_adapter == (single != BASE_FILE)
        ):
            found.append((not file.startswith(("pytorch_model", "adapter_model", "model")), name))
    return [name for _, name in sorted(found)]


def stored_tensors(folder: Path, single: str = BASE_FILE) -> dict[str, Stored]:
    """Return every tensor of a folder's safetensors by its name.

    Raises:
        ModelError: a file is missing or cut, or lacks what the index says it holds.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(folder, single):
        found.update(read_header(file))
    index = folder / f"{single}.index.json"
    if not (folder / single).is_file():
        for name, shard in _weight_map(index).items():
            if name not in found:
                raise ModelError(
                    f"{folder / shard}: has no {name}, which {index.name} says it holds; copy the folder "
                    "again"
                )
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """Read the header of one file; the library checks that the file is as long as the header says.

    Raises:
        ModelError: it is missing, cut, or another kind of file.
    """
    try:
        with safe_open(path, framework="np") as file:
            names = file.offset_keys()
            slices = [file.get_slice(name) for name in names]
            types = [one.get_dtype() for one in slices]
            shapes = [tuple(one.get_shape()) for one in slices]
        nbytes = [_nbytes(dtype, shape) for dtype, shape in zip(types, shapes)]
        begin = path.stat().st_size - sum(nbytes)  # tensors lie behind the header without gaps
    except FileNotFoundError:
        raise ModelError(f"{path}: named in the index, but missing; copy the folder again") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: truncated or no safetensors file ({error}); copy it again") from error
    found = {}
    for name, dtype, shape, size in zip(names, types, shapes, nbytes):
        found[name] = Stored(path, dtype, shape, begin, begin + size)
        begin += size
    return found


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor. The first number in the name of a type is its bits (F32, BF16, F8_E4M3);
    BOOL has eight.
    """
    bits = re.search(r"\d+", dtype)
    return (int(bits[0]) if bits else 8) * math.prod(shape) // 8


def check_types(tensors: Iterable[tuple[str, Stored]]) -> None:
    """Refuse tensors of types that do not hold the weights themselves, such as quantised ones, which need
    scales.

    Raises:
        ModelError: some are stored in another type than fp64, fp32, fp16 or bf16.
    """
    wrong = [(name, tensor) for name, tensor in tensors if tensor.dtype not in FLOATS]
    if wrong:
        name, tensor = wrong[0]
        count = "1 tensor" if len(wrong) == 1 else f"{len(wrong)} tensors"
        raise ModelError(
            f"{tensor.file}: {count} of a type that holds no plain weights, the first is {name} in "
            f"{tensor.dtype}; FedSpeed reads fp64, fp32, "
            "fp16 and bf16. Take the unquantised original, or dequantise the model in transformers "
            "(model.dequantize(), or dequantize=True in its quantization config) and write it "
            "with save_pretrained"
        )


def key_of(name: str, keys: Iterable[str], prefix: str) -> str | None:
    """Return the key under which a model's parameter `name` is stored, None if it is not. Files may leave
    out the decoder's `prefix` ("model."), or put it before what is outside the decoder.
    """
    return next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in keys), None)


def same_bytes(one: Stored, other: Stored) -> bool:
    """Tell whether two tensors hold the same numbers in the same type and shape."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left = one.end - one.begin
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        while left > 0:
            count = min(left, COMPARED_BYTES)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json_value(index.read_text(encoding="utf-8"))
        shards = content["weight_map"] if isinstance(content, dict) else None
        if (
            not isinstance(shards, dict)
            or not shards
            or not all(isinstance(name, str) for name in shards.values())
        ):
            raise ValueError("its weight_map is empty or damaged")
        outside = [name for name in shards.values() if not name or Path(name).name != name]
        if outside:
            raise ValueError(f"its weight_map names {outside[0][:200]!r}, which is no file of this folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{index}: not an index of safetensors shards ({error}); download the model again"
        ) from error
    return shards
