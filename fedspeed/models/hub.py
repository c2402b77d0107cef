"""Models of the Hugging Face hub: a quick check whether one exists, and its files in the hub's cache."""

from pathlib import Path

from fedspeed.errors import ModelError
from fedspeed.hub_names import is_hub_name
from fedspeed.models.families.registry import family_of
from fedspeed.models.local_config import cached_file, local_folder
from fedspeed.models.quantisation import import_command, refuse_quantised
from fedspeed.models.stored import IMPORTED_FORMATS, other_weights

ANSWER_S = 5.0  # timeout of a request to the hub; its client retries downloads for half a minute
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def check_hub(name: str, weights: bool = True, quantised: bool = False) -> None:
    """Ask the hub for a model, without downloading a file of it.

    Args:
        weights: whether its weights are wanted. quantised: whether they may be quantised.

    Raises:
        ModelError: the hub cannot be reached or has no such model, or it is not one that FedSpeed can read.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.is_offline_mode():
        raise _missing(name, "HF_HUB_OFFLINE is set")
    try:
        info = HfApi().model_info(name, timeout=ANSWER_S)
    except RepositoryNotFoundError as error:
        raise _missing(
            name, "the hub has no such model, or shows it to its members only (log in with `hf auth login`)"
        ) from error
    except Exception as error:  # the hub's client and its network libraries raise a dozen kinds
        raise _missing(name, f"the hub cannot be reached ({type(error).__name__})") from error
    kind = (info.config or {}).get("model_type")
    if kind is not None:
        family_of(kind, f"model.base={name}")
    if weights and not quantised:
        refuse_quantised(info.config or {}, name, f"model.base={name}")
    files = [sibling.rfilename for sibling in info.siblings or []]
    if weights and not any(file.endswith(".safetensors") for file in files):
        other = next(iter(other_weights(files)), "")
        convert = "load it in transformers and write it with save_pretrained(FOLDER)"
        if other.lower().endswith(IMPORTED_FORMATS):
            source = f"FOLDER/{other}" if other.lower().endswith(".gguf") else "FOLDER"
            convert = f"`hf download {name} --local-dir FOLDER`, then `{import_command(source, 'BASE')}`"
        raise ModelError(
            f"model.base={name}: the hub has no safetensors of it{other and f', but {other}'}; convert it: "
            f"{convert}, and give that folder"
        )


def hub_config(name: str) -> Path:
    """Return the config.json of a model on the hub, from the cache or downloaded.

    Raises:
        ModelError: it is not in the cache, and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    if path := cached_file(name, "config.json"):
        return path
    check_hub(name, weights=False)
    try:
        return Path(hf_hub_download(name, "config.json", etag_timeout=ANSWER_S))
    except Exception as error:  # see check_hub
        raise _missing(name, f"its config.json cannot be downloaded ({type(error).__name__})") from error


def model_folder(base: str, weights: bool = True, tokenizer: bool = False, quantised: bool = False) -> Path:
    """Return a local folder for `base`: itself, the folder of a config.json, one that FedSpeed ships, or a
    hub name's cached or downloaded snapshot.

    Args:
        weights: whether its weights are wanted. tokenizer: whether its tokenizer is. quantised: whether the
            weights may be quantised.

    Raises:
        ModelError: there is none, or the hub cannot be reached.
    """
    if folder := local_folder(base, weights, tokenizer):
        return folder
    if not is_hub_name(base):
        raise ModelError(
            f"model.base: {base} does not exist; give a folder with config.json, or a hub name such as "
            "org/model"
        )
    from huggingface_hub import snapshot_download

    check_hub(base, weights, quantised)
    try:
        return Path(snapshot_download(base, allow_patterns=FILES, etag_timeout=ANSWER_S))
    except Exception as error:  # see check_hub
        raise _missing(base, f"it cannot be downloaded ({type(error).__name__})") from error


def _missing(name: str, reason: str) -> ModelError:
    from huggingface_hub import constants

    return ModelError(
        f"model.base: {name} is no folder here, is not whole in the hub's cache "
        f"({constants.HF_HUB_CACHE}), and {reason}; download it where "
        f"there is network (hf download {name} --local-dir FOLDER) and give that folder"
    )
