"""The tensors of a model that is imported, by the names and in the shapes of an unquantised model, one in
memory at a time.
"""

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from fedspeed.errors import ModelError
from fedspeed.files import json_value
from fedspeed.models.importing.unpack import awq_weight, fp8_weight, gptq_weight
from fedspeed.models.quantisation import SUFFIXES, Quantisation
from fedspeed.models.stored import Stored, stored_tensors

TORCH_FILE = "pytorch_model.bin"
# Scales of activations, which exist only while a quantised model computes.
_OF_ACTIVATIONS = re.compile(r"\.(input_scale|activation_scale)$")


class Tensors(Protocol):
    """Tensors that are read by name."""

    def names(self) -> list[str]:
        """Return the names in the order in which they are read fastest."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor. Raises ModelError: it cannot be read."""
        ...

    def is_dequantised(self, name: str) -> bool:
        """Whether a tensor is computed from quantised values."""
        ...


class SafetensorFiles:
    """The tensors of a folder with safetensors, dequantised if need be.

    Args:
        folder: of the model. quantisation: None if its weights are plain.

    Raises:
        ModelError: files are missing or damaged, or a quantised weight lacks one of its tensors.
    """

    def __init__(self, folder: Path, quantisation: Quantisation | None):
        self._stored = stored_tensors(folder)
        self._quantisation = quantisation
        self._parts = _parts(self._stored, quantisation)
        inner = {key for parts in self._parts.values() for key in parts.values()}
        plain = {name for name in self._stored if name not in inner and not _OF_ACTIVATIONS.search(name)}
        if both := sorted(plain & self._parts.keys()):
            raise ModelError(
                f"{folder}: {both[0]} is stored both plain and quantised; download the model again"
            )
        self._plain = plain
        self._opened: tuple[Path, Any] | None = None

    def names(self) -> list[str]:
        """Return the names of all weights, in the order of the files."""
        first = {name: next(iter(parts.values())) for name, parts in self._parts.items()}
        keys = {name: name for name in self._plain} | first
        return sorted(keys, key=lambda name: (self._stored[keys[name]].file, self._stored[keys[name]].begin))

    def is_dequantised(self, name: str) -> bool:
        """Return whether a tensor is computed from quantised values."""
        return name in self._parts

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, in fp32 if it was quantised, else as it is stored.

        Raises:
            ModelError: it cannot be read, or shapes of its parts do not fit together.
        """
        if name not in self._parts:
            return self._load(name)
        assert self._quantisation is not None
        parts = {suffix: self._load(key) for suffix, key in self._parts[name].items()}
        try:
            return _dequantised(parts, self._quantisation)
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{suffix} {tuple(part.shape)}" for suffix, part in parts.items())
            raise ModelError(
                f"{name}: its quantised parts do not fit together ({shapes}); download the model again"
            ) from error

    def _load(self, key: str) -> torch.Tensor:
        path = self._stored[key].file
        try:
            if self._opened is None or self._opened[0] != path:
                self._opened = (path, safe_open(path, framework="pt"))
            return self._opened[1].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: {key} cannot be read ({error}); copy the file again") from error


def _parts(stored: Mapping[str, Stored], quantisation: Quantisation | None) -> dict[str, dict[str, str]]:
    """Return, for each quantised weight, suffix -> name of the tensors that hold it.

    Raises:
        ModelError: one of them is missing.
    """
    if quantisation is None:
        return {}
    suffixes = SUFFIXES[quantisation.method]
    optional = {".g_idx"}
    found: dict[str, dict[str, str]] = {}
    for key, tensor in stored.items():
        if not key.endswith(suffixes[0]) or (
            quantisation.method == "fp8" and not tensor.dtype.startswith("F8")
        ):
            continue
        module = key.removesuffix(suffixes[0])
        parts = {suffix: f"{module}{suffix}" for suffix in suffixes}
        if missing := [
            part for suffix, part in parts.items() if part not in stored and suffix not in optional
        ]:
            raise ModelError(f"{tensor.file}: holds {key}, but no {missing[0]}; download the model again")
        found[f"{module}.weight"] = {suffix: part for suffix, part in parts.items() if part in stored}
    return found


def _dequantised(parts: Mapping[str, torch.Tensor], quantisation: Quantisation) -> torch.Tensor:
    if quantisation.method == "fp8":
        return fp8_weight(parts[".weight"], parts[".weight_scale_inv"], quantisation.block)
    if quantisation.method == "gptq":
        return gptq_weight(
            parts[".qweight"], parts[".qzeros"], parts[".scales"], parts.get(".g_idx"), quantisation
        )
    return awq_weight(parts[".qweight"], parts[".qzeros"], parts[".scales"], quantisation)


class TorchFiles:
    """The tensors of pytorch_model.bin, or of its shards. Only files of tensors are read, not such that would
    run code (`torch.load(weights_only=True)`).

    Args:
        paths: of the files.

    Raises:
        ModelError: one cannot be read, or holds more than tensors.
    """

    def __init__(self, paths: Iterable[Path]):
        self._tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            self._tensors |= _torch_tensors(path)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def is_dequantised(self, name: str) -> bool:
        """Return False: such files hold plain weights."""
        return False

    def read(self, name: str) -> torch.Tensor:
        """Return a copy of a tensor: in the file, several may share memory."""
        return self._tensors[name].detach().clone()


def torch_paths(folder: Path) -> list[Path]:
    """Return the files of a model that torch saved; none if there are none.

    Raises:
        ModelError: their index is damaged.
    """
    if (folder / TORCH_FILE).is_file():
        return [folder / TORCH_FILE]
    index = folder / f"{TORCH_FILE}.index.json"
    if not index.is_file():
        return []
    try:
        content = json_value(index.read_text(encoding="utf-8"))
        names = set(content["weight_map"].values()) if isinstance(content, dict) else set()
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("its weight_map is damaged")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: not an index of shards ({error}); download the model again") from error
    return [folder / name for name in sorted(names)]


def _torch_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: is damaged, or holds more than tensors, and loading it would run code that it names; "
            "get the model as safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{path}: cannot be read ({reason}); download the file again") from error
    if not isinstance(content, dict) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise ModelError(f"{path}: no file of named tensors; get the model as safetensors")
    return content


def _is_zip(path: Path) -> bool:
    """Whether torch wrote the file in its current format, which can be mapped into memory."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
