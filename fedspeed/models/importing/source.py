"""The model that is imported: a folder, a hub name or a GGUF file, with its configuration and its tensors."""

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedspeed.errors import ModelError
from fedspeed.hub_names import is_hub_name
from fedspeed.models.catalogue import from_config
from fedspeed.models.file_digests import files_digest
from fedspeed.models.hub import model_folder
from fedspeed.models.importing.gguf_file import GgufModel, is_gguf
from fedspeed.models.importing.tensors import SafetensorFiles, Tensors, TorchFiles, torch_paths
from fedspeed.models.json_object import read_object
from fedspeed.models.local_config import (
    MORE_TOKENIZER_FILES,
    TOKENIZER_FILES,
    TOKENIZER_SIGNS,
    has_tokenizer,
    local_folder,
)
from fedspeed.models.provenance import Provenance
from fedspeed.models.quantisation import QUANTISED_BY, Quantisation, quantisation_of
from fedspeed.models.stored import BASE_FILE, weight_files

GENERATION_FILE = "generation_config.json"
_COPIED = (*TOKENIZER_FILES, *MORE_TOKENIZER_FILES, GENERATION_FILE)


@dataclass(frozen=True)
class Source:
    """A model that can be imported.

    Attributes:
        path: of the GGUF file, or of the folder.
        paths: of the files with its weights.
        quantisation: None where config.json names none.
        provenance: its origin, without the digests of its files.
    """

    path: Path
    paths: tuple[Path, ...]
    quantisation: Quantisation | None
    provenance: Provenance

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.provenance.format == "gguf"

    def open(self, draft: Path, dtype: str) -> tuple[dict[str, Any], Tensors]:
        """Write tokenizer and generation settings to a folder; return config.json's values, as of a model
        with plain weights, and the tensors.

        Args:
            dtype: fp32, bf16 or fp16: in which a GGUF file's values are kept in memory.

        Raises:
            ModelError: the files are damaged, or FedSpeed does not train such a model.
        """
        if self.is_gguf:
            model = GgufModel(self.path, dtype)
            model.write_rest(draft)
            return model.config, model
        for name in _COPIED:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, draft / name)
        config = _plain(read_object(self.path / "config.json", "a model configuration"))
        if self.provenance.format == "torch":
            return config, TorchFiles(self.paths)
        return config, SafetensorFiles(self.path, self.quantisation)


def find_source(name: str, dtype: str, origin: str = "") -> Source:
    """Find the model that a user names, and check that it can be imported, before anything is written.

    Args:
        name: a folder, a GGUF file, or a hub name. dtype: as asked for. origin: where it came from.

    Raises:
        ModelError: it is not there, or FedSpeed does not train such a model.
    """
    path = Path(name).expanduser()
    blank = Provenance(source=path.resolve().name, format="", dtype=dtype, origin=origin)
    if path.is_file():
        return _gguf_source(path, blank)
    if path.is_dir():
        return _folder_source(path, blank, name)
    if not is_hub_name(name):
        raise ModelError(
            f"{name}: no such file or folder; name a GGUF file, the folder of a Hugging Face model, or a hub "
            "name such as org/model"
        )
    folder = local_folder(name, tokenizer=True) or model_folder(name, tokenizer=True, quantised=True)
    revision = folder.name if folder.parent.name == "snapshots" else ""
    return _folder_source(folder, replace(blank, source=name, hub_name=name, revision=revision), name)


def _gguf_source(path: Path, blank: Provenance) -> Source:
    if not is_gguf(path):
        raise ModelError(
            f"{path}: is not a GGUF file; name a GGUF file, the folder of a Hugging Face model, or a hub name"
        )
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise ModelError(
            f"{path}: is one part of a divided GGUF file; join the parts with llama.cpp's "
            f"`llama-gguf-split --merge {path.name} WHOLE.gguf` and import that"
        )
    return _with_fingerprint(Source(path, (path,), None, replace(blank, format="gguf")))


def _folder_source(folder: Path, blank: Provenance, name: str) -> Source:
    """Return the source of a model's folder."""
    config = folder / "config.json"
    if not config.is_file():
        files = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"name the file {folder / files[0]}" if files else "name the folder of a Hugging Face model"
        raise ModelError(f"{config}: no such file; {hint}")
    values = read_object(config, "a model configuration")
    quantisation = quantisation_of(values, str(config))
    from_config(_plain(values), name, str(config))  # refuses other families
    if not has_tokenizer(folder):
        raise ModelError(
            f"{folder}: holds no tokenizer (none of {', '.join(TOKENIZER_SIGNS)}), without which the model "
            "cannot be asked anything; put the files of its tokenizer there"
        )
    shards = torch_paths(folder)
    if shards and not any((folder / file).is_file() for file in (BASE_FILE, f"{BASE_FILE}.index.json")):
        if missing := [path for path in shards if not path.is_file()]:
            raise ModelError(f"{missing[0]}: named in the index, but missing; download the model again")
        if quantisation is not None:
            raise ModelError(f"{folder}: quantised weights in {shards[0].name}; get them as safetensors")
        return _with_fingerprint(Source(folder, tuple(shards), None, replace(blank, format="torch")))
    form = quantisation.method if quantisation else "safetensors"
    paths = tuple(weight_files(folder, BASE_FILE))
    return _with_fingerprint(Source(folder, paths, quantisation, replace(blank, format=form)))


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json without those that describe a quantisation."""
    return {key: value for key, value in config.items() if key not in QUANTISED_BY}


def _with_fingerprint(source: Source) -> Source:
    """Return the source with a digest of its files, by which the same import is recognised."""
    others = [] if source.is_gguf else [source.path / name for name in ("config.json", *_COPIED)]
    digest = files_digest([*source.paths, *others])
    return replace(source, provenance=replace(source.provenance, fingerprint=digest))
