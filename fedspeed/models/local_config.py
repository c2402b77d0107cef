"""Bases that can be read without a network: a folder, one that FedSpeed ships, or one in the hub's cache."""

from pathlib import Path

from fedspeed.errors import ModelError
from fedspeed.hub_names import is_hub_name
from fedspeed.models.config import ModelConfig
from fedspeed.models.stored import stored_tensors

# Folders with a config.json alone, for model.init=random.
SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs" / "models"
# Files that a tokenizer may consist of. Journals of earlier versions have a digest of the first ones alone.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
MORE_TOKENIZER_FILES = (
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
# A folder with a tokenizer has one of these.
TOKENIZER_SIGNS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def shipped_names() -> list[str]:
    """Return the names of the models whose config.json FedSpeed ships."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def tokenizer_place(model: ModelConfig) -> str:
    """Return where a run's tokenizer is: a folder or the name of a base; empty for the built-in one."""
    places = {"auto": model.base, "bytes": ""}
    return places.get(model.tokenizer, model.tokenizer)


def local_folder(base: str, weights: bool = True, tokenizer: bool = False) -> Path | None:
    """Return the folder of `model.base`: itself, that of a config.json, one that FedSpeed ships, or that of a
    hub name in the hub's cache; None if there is none on this machine.

    Args:
        weights: of the hub's cache, take only a folder that holds all weights.
        tokenizer: of the hub's cache, take only a folder that holds a tokenizer.
    """
    path = Path(base)
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    if base.lower() in shipped_names():
        return SHIPPED / base.lower()
    config = cached_file(base, "config.json")
    if config is None or (weights and not _has_weights(config.parent)):
        return None
    return config.parent if not tokenizer or has_tokenizer(config.parent) else None


def config_file(base: str) -> Path | None:
    """Return the config.json of `model.base`: that of a folder, the file itself, or that of a hub name that
    was downloaded before; None if there is none on this machine.
    """
    if Path(base).is_file():
        return Path(base)
    folder = local_folder(base, weights=False)
    return folder / "config.json" if folder and (folder / "config.json").is_file() else None


def cached_file(base: str, file: str) -> Path | None:
    """Return a file of a hub name that was downloaded before; None if it was not."""
    if not is_hub_name(base):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(base, file)
    except ValueError:  # no name that a hub could have
        return None
    return Path(found) if isinstance(found, str) else None


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_SIGNS)


def _has_weights(folder: Path) -> bool:
    try:
        stored_tensors(folder)
    except ModelError:
        return False
    return True
