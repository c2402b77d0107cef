"""Resolution of the paths in a configuration: relative to its YAML file, or to the working folder."""

import os
from pathlib import Path


def resolve(text: str, folder: Path | None) -> str:
    """Return the path of an input file or folder.

    The text is returned unchanged where it needs no resolution, and where it names no existing file, as a hub
    name does.

    Args:
        text: the path as it was written; `~` is a home folder.
        folder: the folder of the YAML file that it was written in; None for the command line.
    """
    if not text:
        return text
    try:
        if text.startswith("~"):
            return str(Path(text).expanduser())
        path = Path(text)
        if folder is None or path.is_absolute():
            return text
        home = folder.resolve()
        beside = Path(os.path.normpath(home / path))
        return str(beside) if home != Path.cwd() and beside.exists() else text
    except (OSError, RuntimeError):  # no file can have such a name, nobody has such a home
        return text


def existing_path(text: str) -> str:
    """Return the absolute path of an existing file or folder; empty for a text that names none."""
    try:
        return os.path.abspath(text) if text and Path(text).exists() else ""
    except OSError:
        return ""
