"""Resolution of the paths in a configuration: relative to its YAML file, or to the working folder."""

import glob
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
        if home == Path.cwd():
            return text
        beside = Path(os.path.normpath(home / path))
        if beside.exists():
            return str(beside)
        if is_pattern(text) and any(glob.iglob(text, root_dir=home, recursive=True)):
            return os.path.join(glob.escape(str(home)), os.path.normpath(text))
        return text
    except (OSError, RuntimeError):  # no file can have such a name, nobody has such a home
        return text


def resolve_inputs(value: str | tuple[str, ...], folder: Path | None) -> str | tuple[str, ...]:
    """Return the paths of a key that may name several files or folders, each resolved as by `resolve`.

    Args:
        value: one path, several with commas between them, or a list of paths.
        folder: the folder of the YAML file that it was written in; None for the command line.
    """
    if isinstance(value, str) and (whole := resolve(value, folder)) != value:
        return whole
    parts = path_list(value)
    resolved = tuple(resolve(part, folder) for part in parts)
    return value if resolved == parts else resolved


def path_list(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the paths that the value of a key names: a list as it is, and a text divided at its commas,
    unless it is the name of an existing file or folder.
    """
    if isinstance(value, tuple):
        return value
    if "," not in value or existing_path(os.path.expanduser(value)):
        return (value,) if value else ()
    return tuple(part for text in value.split(",") if (part := text.strip()))


def is_pattern(text: str) -> bool:
    """Return whether a path has characters that match other characters: `*`, `?` or `[`."""
    return glob.has_magic(text)


def existing_path(text: str) -> str:
    """Return the absolute path of an existing file or folder; empty for a text that names none."""
    try:
        return os.path.abspath(text) if text and Path(text).exists() else ""
    except OSError:
        return ""


def existing_paths(value: str | tuple[str, ...]) -> str:
    """Return the absolute paths that a key names, with commas between them; empty where one of them is not
    there.
    """
    parts = path_list(value)
    absolute = [os.path.abspath(part) if _is_there(part) else "" for part in parts]
    return ",".join(absolute) if parts and all(absolute) else ""


def _is_there(text: str) -> bool:
    return bool(existing_path(text)) or (is_pattern(text) and any(glob.iglob(text, recursive=True)))
