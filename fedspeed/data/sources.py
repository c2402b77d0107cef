"""The files that data.path and data.held_out name: single files, patterns, folders, lists of these, and the
usual folders of a published task.
"""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedspeed.config.paths import existing_path, is_pattern, path_list
from fedspeed.data.config import DataConfig, path_text
from fedspeed.data.files import SUFFIXES
from fedspeed.errors import DataError
from fedspeed.hub_names import is_hub_name
from fedspeed.text_safety import quoted

FOLDER_VARIABLE = "FEDSPEED_DATA"
_USUAL_FOLDERS = ("data", "../shared/data")


def reads_hub(config: DataConfig) -> bool:
    """Return whether data.path names a hub data set: it has the form of a name, and is no local file or
    folder.
    """
    path = config.path
    if not isinstance(path, str) or is_pattern(path) or "," in path:
        return False
    name, _, split = path.partition(":")
    if not is_hub_name(name) or "/" in split or existing_path(path):
        return False
    return not path.lower().endswith(SUFFIXES)


@dataclass(frozen=True)
class Wanted:
    """Describe which files a key should name.

    Attributes:
        key: data.path or data.held_out, for messages.
        task: the name of the task.
        task_files: possible names of a published task's file, the preferred one first; a folder then stands
            for its file of the task. Empty: a folder stands for all data files in it.
        remedy: where the rows of the task are found, to be added to messages; may be empty.
    """

    key: str
    task: str
    task_files: Sequence[str] = ()
    remedy: str = ""


def files_of(value: str | tuple[str, ...], wanted: Wanted) -> list[Path]:
    """Return the files that a key names: those of a list in its order, those of a pattern or a folder sorted
    by name, where digits compare as numbers.

    Args:
        value: the value of the key, not empty.

    Raises:
        DataError: a file or folder is missing or cannot be looked for, a pattern matches nothing, a folder
            holds no data file, or a file is named twice.
    """
    try:
        files = [file for text in path_list(value) for file in _files(text, wanted)]
    except (OSError, RuntimeError, ValueError) as error:  # no possible name of a file, or no home
        raise DataError(
            f"{wanted.key}={quoted(path_text(value))}: cannot be looked for "
            f"({getattr(error, 'strerror', None) or error}); correct the path"
        ) from error
    where = f"{wanted.key}={path_text(value)}"
    if not files:
        raise DataError(f"{where}: names no file; give a file, a pattern, a folder or a list of these")
    first: dict[Path, Path] = {}
    for file in files:
        if first.setdefault(file.resolve(), file) is not file:
            raise DataError(
                f"{where}: {file} is named twice, so that its rows would count twice; leave one of "
                "the two out"
            )
    return files


def usual_file(wanted: Wanted) -> Path:
    """Return the file of a published task in $FEDSPEED_DATA or one of the usual folders.

    Raises:
        DataError: none of them holds the file.
    """
    folders = data_folders()
    for folder in folders:
        for file in wanted.task_files:
            if (folder / file).is_file():
                return folder / file
    raise DataError(
        f"no rows for task {wanted.task}: none of {', '.join(wanted.task_files)} in "
        f"{', '.join(str(folder.resolve()) for folder in folders)}; put the file there, or set data.path, or "
        f"the environment variable {FOLDER_VARIABLE} to its folder{wanted.remedy}"
    )


def data_folders() -> list[Path]:
    """Return the folders in which published data is looked for: $FEDSPEED_DATA if it is set, then the usual
    folders.
    """
    variable = os.environ.get(FOLDER_VARIABLE)
    return [Path(folder).expanduser() for folder in ([variable] if variable else []) + list(_USUAL_FOLDERS)]


def _files(text: str, wanted: Wanted) -> list[Path]:
    path = Path(text).expanduser()
    if path.is_dir():
        return _in_folder(path, wanted)
    if path.exists():
        return [path]
    if is_pattern(text):
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        if found := sorted((match for match in matches if match.is_file()), key=_order):
            return found
        raise DataError(
            f"{wanted.key}={text}: no file matches the pattern (looked for {path.absolute()}); correct the "
            f"pattern{wanted.remedy}"
        )
    is_hub = wanted.key == "data.held_out" and is_hub_name(text)
    hub = " (of the hub, only data.path reads a set: save the rows to hold out as a file)" if is_hub else ""
    raise DataError(
        f"{wanted.key}={text}: no such file or folder (looked for {path.resolve()}); correct the path{hub}"
        f"{wanted.remedy}"
    )


def _in_folder(folder: Path, wanted: Wanted) -> list[Path]:
    present = [entry for entry in folder.iterdir() if entry.name.lower().endswith(SUFFIXES)]
    data_files = sorted((entry for entry in present if not entry.name.startswith(".")), key=_order)
    where = f"{wanted.key}={folder}"
    if not wanted.task_files:
        if data_files:
            return data_files
        raise DataError(
            f"{where}: the folder holds no data file, whose name would end in {', '.join(SUFFIXES)}; name "
            "another folder, or a file"
        )
    names = [entry.name for entry in data_files]
    for file in wanted.task_files:
        if file in names:
            return [folder / file]
    raise DataError(
        f"{where}: the folder holds no file of task {wanted.task} (none of {', '.join(wanted.task_files)}; "
        f"data files there: {', '.join(names) or 'none'}); name the file itself{wanted.remedy}"
    )


def _order(path: Path) -> tuple[list[tuple[str, int]], str]:
    """Return the key that files are sorted by: north2.jsonl comes before north10.jsonl."""
    parts = re.findall(r"([^0-9]*)([0-9]*)", str(path))
    return [(text, int(digits or 0)) for text, digits in parts], str(path)
