"""Where the config.json of a base is that can be read without a network."""

import re
from pathlib import Path

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def config_file(base: str) -> Path | None:
    """The config.json of `model.base`: a folder's, the file itself, or that of a hub name that was downloaded before; None if none is at hand."""
    path = Path(base)
    if path.is_file():
        return path
    if path.is_dir():
        return path / "config.json" if (path / "config.json").is_file() else None
    if not HUB_NAME.fullmatch(base):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(base, "config.json")
    except ValueError:  # no name that a hub could have
        return None
    return Path(found) if isinstance(found, str) else None
