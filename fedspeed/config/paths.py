"""Where the files and folders that a configuration names are: beside its YAML, or in the folder of the
command.
"""

import os
from pathlib import Path


def found(text: str, folder: Path | None) -> str:
    """The place that an input's path means; the text itself where it is as good, or names no file here (a hub
    name, say).

    Args:
        text: as it was written; `~` is a home folder.
        folder: of the YAML it was written in; None: it was given on the command line.
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


def place(text: str) -> str:
    """The absolute path of a file or folder that is here, empty for a text that names none."""
    try:
        return os.path.abspath(text) if text and Path(text).exists() else ""
    except OSError:
        return ""
