"""A model in a GGUF file, as llama.cpp writes it, dequantised by transformers."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedspeed import activity
from fedspeed.errors import ModelError
from fedspeed.models.catalogue import from_config
from fedspeed.models.families.registry import FAMILIES, family_of
from fedspeed.models.loading import DTYPES

MAGIC = b"GGUF"
PROBE = "The quick brown fox, naïve café:\n    x = 3 * 14  # 東京"
# Keys of transformers' configuration of a GGUF file that do not describe the model.
_NO_CONFIG = ("_name_or_path", "_model_name_or_path", "quantization_config")


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class GgufModel:
    """The configuration, tokenizer and tensors of a GGUF file; all tensors are in memory.

    Args:
        path: of the file. dtype: fp32, bf16 or fp16, in which the tensors are kept.

    Raises:
        ModelError: the file is damaged, or holds a model that FedSpeed or transformers does not know.
    """

    def __init__(self, path: Path, dtype: str):
        self._path = path
        self._where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        with self._reading("its configuration"):
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(**self._where, trust_remote_code=False)
        family = family_of(config.model_type, str(path))
        with self._reading("its positions"):
            scaling = position_scaling(path)
        if scaling:
            raise ModelError(
                f"{path}: scales its rotary positions ({scaling}), and transformers does not read that from "
                "GGUF files: the model would be another one; get it as safetensors"
            )
        self._model = self._load(dtype)
        values = json.loads(self._model.config.to_json_string())
        self.config = {key: value for key, value in values.items() if key not in _NO_CONFIG}
        self.config["architectures"] = [family.architecture]
        shape = from_config(self.config, path.name, str(path))
        self._tensors = self._model.state_dict()
        if shape.tied:
            self._tensors.pop(FAMILIES[shape.family].head, None)

    def _load(self, dtype: str) -> Any:
        from transformers import AutoModelForCausalLM, GgufConfig, logging

        logging.disable_progress_bar()

        with self._reading("its tensors"), _counted_tensors(self._path.name):
            model, report = AutoModelForCausalLM.from_pretrained(
                **self._where,
                quantization_config=GgufConfig(dequantize=True),
                dtype=DTYPES[dtype],
                output_loading_info=True,
                trust_remote_code=False,
            )
        if missing := sorted(report["missing_keys"]):
            raise ModelError(
                f"{self._path}: lacks {missing[0]}, which a {model.config.model_type} has; get another GGUF "
                "file of the model, or its safetensors"
            )
        return model

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            raise ModelError(
                f"{self._path}: transformers needs the package gguf to read it ({error}); install "
                "requirements.txt"
            ) from error
        except ModelError:
            raise
        except Exception as error:  # which one a damaged file raises differs by its content
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"{self._path}: transformers cannot read {what} ({type(error).__name__}: {reason}); download "
                "the file again, or get the model as safetensors"
            ) from error

    def write_rest(self, folder: Path) -> None:
        """Write tokenizer and generation settings to a folder."""
        from transformers import AutoTokenizer

        with self._reading("its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(**self._where, trust_remote_code=False)
            tokenizer.save_pretrained(folder)
            written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if written(PROBE).input_ids != tokenizer(PROBE).input_ids:
            raise ModelError(
                f"{self._path}: its tokenizer gives other tokens once transformers has written it; get "
                "the model as safetensors"
            )
        self._model.generation_config.save_pretrained(folder)

    def names(self) -> list[str]:
        """Return the names of all tensors, without a head that is the embedding."""
        return list(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        return self._tensors[name]

    def is_dequantised(self, name: str) -> bool:
        """Return True: each has been converted."""
        return True


def position_scaling(path: Path) -> str:
    """Return the name of the key or tensor of a GGUF file that scales rotary positions; empty if none does.

    Args:
        path: of the file.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for name, field in reader.fields.items():
        if name.endswith(".rope.scaling.type") and field.contents() != "none":
            return name
    for tensor in reader.tensors:
        if tensor.name.startswith(("rope_freqs", "rope_factors")) and (tensor.data != 1).any():
            return str(tensor.name)
    return ""


@contextmanager
def _counted_tensors(name: str) -> Iterator[None]:
    """Count the tensors that transformers dequantises as an activity, instead of by its own progress bar."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def counted(tensors: Sequence[Any], **_: object) -> Iterator[Any]:
        return activity.counted(tensors, f"the dequantisation of {name}", "tensor")

    original = reader.tqdm
    reader.tqdm = counted
    try:
        yield
    finally:
        reader.tqdm = original
