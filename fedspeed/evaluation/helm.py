"""Files with which HELM (crfm-helm) evaluates an exported model. HELM itself is not needed to write them."""

import datetime
import re
from pathlib import Path
from typing import Any

import yaml

from fedspeed.errors import ModelError
from fedspeed.evaluation.helm_entries import SCENARIOS, run_entries
from fedspeed.files import write_atomically
from fedspeed.models.json_object import read_object
from fedspeed.models.local_config import has_tokenizer

ITEMS = 100  # of each entry, as in the published evaluation
_DTYPES = {"float32", "bfloat16", "float16"}
_DEFAULT_LENGTH = 2048


def write_helm(folder: Path, model: str) -> list[Path]:
    """Write the descriptions of a model and its tokenizer, the run entries of 16 scenarios, and a README.

    Args:
        folder: that is written into; it is made where it does not exist.
        model: the folder of a whole model, with its tokenizer.

    Returns:
        The files that were written.

    Raises:
        ModelError: the folder holds no whole model.
    """
    place = Path(model).resolve()
    _check(place)
    config = read_object(place / "config.json", "a model configuration")
    name = f"fedspeed/{_plain(place)}"
    contents = {
        "prod_env/model_deployments.yaml": _yaml({"model_deployments": [_deployment(name, place, config)]}),
        "prod_env/model_metadata.yaml": _yaml({"models": [_metadata(name, place)]}),
        "prod_env/tokenizer_configs.yaml": _yaml({"tokenizer_configs": [_tokenizer(name, place)]}),
        "run_entries.conf": run_entries(name),
        "README.md": _readme(name),
    }
    for file, text in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / file, text.encode())
    return [folder / file for file in contents]


def _check(place: Path) -> None:
    if (place / "adapter_config.json").is_file():
        raise ModelError(
            f"{place}: is an adapter, and HELM loads whole models; write one with "
            "`fedspeed export RUN --merged` and name that folder"
        )
    if not (place / "config.json").is_file() or not has_tokenizer(place):
        raise ModelError(
            f"{place}: holds no model with its tokenizer (config.json, tokenizer.json); name the folder that "
            "`fedspeed export RUN --merged` has written, or that of a base"
        )


def _plain(place: Path) -> str:
    """Return a name for HELM, which divides run entries at commas, colons and equals signs."""
    parts = [place.parent.name, place.name] if place.name in {"model", "merged"} else [place.name]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part for part in parts if part))


def _deployment(name: str, place: Path, config: dict[str, Any]) -> dict[str, Any]:
    length = config.get("max_position_embeddings") or config.get("n_positions") or _DEFAULT_LENGTH
    dtype = config.get("dtype") or config.get("torch_dtype")
    arguments = {"pretrained_model_name_or_path": str(place)}
    if dtype in _DTYPES:
        arguments["torch_dtype"] = f"torch.{dtype}"
    return {
        "name": name,
        "model_name": name,
        "tokenizer_name": name,
        "max_sequence_length": int(length),
        "client_spec": {"class_name": "helm.clients.huggingface_client.HuggingFaceClient", "args": arguments},
    }


def _metadata(name: str, place: Path) -> dict[str, Any]:
    written = datetime.datetime.fromtimestamp((place / "config.json").stat().st_mtime, datetime.UTC)
    return {
        "name": name,
        "display_name": name.partition("/")[2],
        "description": "A model that was exported by FedSpeed.",
        "creator_organization_name": "FedSpeed",
        "access": "limited",
        "release_date": written.date(),
        "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"],
    }


def _tokenizer(name: str, place: Path) -> dict[str, Any]:
    settings = {}
    if (place / "tokenizer_config.json").is_file():
        settings = read_object(place / "tokenizer_config.json", "a tokenizer configuration")
    return {
        "name": name,
        "tokenizer_spec": {
            "class_name": "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
            "args": {"pretrained_model_name_or_path": str(place)},
        },
        "end_of_text_token": _token(settings.get("eos_token")),
        "prefix_token": _token(settings.get("bos_token")),
    }


def _token(value: Any) -> str:
    """Return a special token of a tokenizer configuration, which is a text or an object; empty if unset."""
    return (value.get("content") if isinstance(value, dict) else value) or ""


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _readme(name: str) -> str:
    return f"""# HELM on {name}

These files let HELM evaluate the model on the {len(SCENARIOS)} scenarios that FederatedScope-LLM reports
({sum(map(len, SCENARIOS.values()))} run entries, {ITEMS} items each). HELM downloads the data itself.
In this folder, and in an environment of its own:

    pip install crfm-helm
    helm-run --conf-paths run_entries.conf --suite fedspeed --max-eval-instances {ITEMS} --local-path prod_env
    helm-summarize --suite fedspeed

The scores are not those of the published tables: these were computed with a fork of HELM of 2023.
"""
