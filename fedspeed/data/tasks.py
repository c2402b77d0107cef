"""The registry of tasks: where their rows are found and how a record becomes a row.

A new published task needs one entry in `TASKS` and its name in `DataConfig.task`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedspeed.data import streams
from fedspeed.data.builtin import DEFAULT_ROWS, builtin_rows
from fedspeed.data.config import DataConfig
from fedspeed.data.rows import SUFFIXES, Fields, Row, hub_rows, read_rows
from fedspeed.errors import DataError
from fedspeed.hub_names import is_hub_name

FOLDER_VARIABLE = "FEDSPEED_DATA"
_USUAL_FOLDERS = ("data", "../shared/data")


def _unchanged(row: Row) -> Row:
    return row


def _gsm8k_edit(row: Row) -> Row:
    """Return the row with the result line of its answer, "#### 72", as "The answer is 72". Calculator
    annotations stay.
    """
    if "####" not in row.output:
        raise ValueError("the answer has no line '#### result', so this is not a row of GSM8K")
    return replace(row, output=row.output.replace("####", "The answer is"))


def _codealpaca_edit(row: Row) -> Row | None:
    # The published task has nine languages, and assembly, of which the raw file has a few rows, is not among
    # them.
    return None if row.category == "X86-64 Assembly" else row


@dataclass(frozen=True)
class Task:
    """A published data set.

    Attributes:
        files: possible names of its file in a data folder, the preferred one first.
        fields: names of its records' fields.
        source: where a user can download the file.
        edit: changes a row, or returns None to drop it; raises ValueError if the row does not belong to the
            task.
    """

    files: tuple[str, ...]
    fields: Fields
    source: str
    edit: Callable[[Row], Row | None] = _unchanged


TASKS = {
    "gsm8k": Task(
        files=("gsm8k_train.jsonl.gz", "gsm8k_train.jsonl"),
        fields=Fields(instruction="question", input="", output="answer", category=""),
        source="grade_school_math/data/train.jsonl in the GitHub repository openai/grade-school-math, or "
        "the hub set openai/gsm8k:main",
        edit=_gsm8k_edit,
    ),
    "dolly": Task(
        files=("dolly_15k.jsonl.gz", "dolly_15k.jsonl", "databricks-dolly-15k.jsonl"),
        fields=Fields(input="context", output="response"),
        source="the hub set databricks/databricks-dolly-15k",
    ),
    "codealpaca": Task(
        files=("fed_codealpaca.jsonl.gz", "fed_codealpaca.jsonl", "rosetta_alpaca.json"),
        fields=Fields(category="input"),
        source="data/rosetta_alpaca.json in the GitHub repository sahil280114/codealpaca",
        edit=_codealpaca_edit,
    ),
}


def load_rows(config: DataConfig, seed: int) -> list[Row]:
    """Return the rows of the configured task in the file's order. If there are more than data.max_rows, a
    random choice by the seed.

    Raises:
        DataError: the file is not found, with the folders that were searched; or its rows are malformed.
    """
    if config.task == "builtin":
        return builtin_rows(seed, config.max_rows or DEFAULT_ROWS)
    task = task_of(config)
    rows = [
        row for row in (edited(task, where, row) for where, row in _read(config, task)) if row is not None
    ]
    if rows and not any(row.output.strip() for row in rows):
        raise DataError(
            f"task {config.task}: none of the {len(rows)} rows has an answer, field {task.fields.output!r} "
            "is blank in all of them; name the right field with task=file and data.output_field, or choose "
            "another file in data.path"
        )
    if not 0 < config.max_rows < len(rows):
        return rows
    kept = np.random.default_rng([seed, streams.SUBSET]).permutation(len(rows))[: config.max_rows]
    return [rows[i] for i in sorted(kept)]


def task_of(config: DataConfig) -> Task:
    """Return the published task that a configuration names, or for other files a task with its configured
    fields.
    """
    if config.task in TASKS:
        return TASKS[config.task]
    return Task(
        files=(),
        source="",
        fields=Fields(
            instruction=config.instruction_field,
            input=config.input_field,
            output=config.output_field,
            category=config.category_field,
        ),
    )


def edited(task: Task, where: str, row: Row) -> Row | None:
    """Return a row after its task's edit, None if it is dropped.

    Raises:
        DataError: the row does not belong to the task.
    """
    try:
        return task.edit(row)
    except ValueError as error:
        raise DataError(
            f"{where}: {error}; choose the right file in data.path, or read it as task=file"
        ) from None


def _read(config: DataConfig, task: Task) -> list[tuple[str, Row]]:
    if not config.path:
        return read_rows(_in_usual_folders(config.task, task), task.fields)
    path = Path(config.path).expanduser()
    if path.is_dir():
        return read_rows(_in_folder(path, config.task, task), task.fields)
    if reads_hub(config):
        return hub_rows(config.path, task.fields)
    if not path.exists():
        raise DataError(
            f"data.path={config.path}: no such file or folder (looked for {path.resolve()}); correct the path"
            f"{_how_to_get(task)}"
        )
    return read_rows(path, task.fields)


def reads_hub(config: DataConfig) -> bool:
    """Return whether data.path names a hub data set: it has the form of a name, and is no local file or
    folder.
    """
    name, _, split = config.path.partition(":")
    if not is_hub_name(name) or "/" in split or Path(config.path).expanduser().exists():
        return False
    return not config.path.lower().endswith(SUFFIXES)


def _in_folder(folder: Path, name: str, task: Task) -> Path:
    present = sorted(entry.name for entry in folder.iterdir() if entry.name.lower().endswith(SUFFIXES))
    if task.files:
        matching = [file for file in task.files if file in present]
        if not matching:
            raise DataError(
                f"data.path={folder}: the folder holds no file of task {name} (none of "
                f"{', '.join(task.files)}; data files there: {', '.join(present) or 'none'}); name the file "
                f"itself{_how_to_get(task)}"
            )
        return folder / matching[0]
    if len(present) != 1:
        raise DataError(
            f"data.path={folder}: task=file needs one data file and the folder holds {len(present)} "
            f"({', '.join(present) or 'none'}); name the file itself in data.path"
        )
    return folder / present[0]


def _in_usual_folders(name: str, task: Task) -> Path:
    if not task.files:
        raise DataError(
            "data.task=file needs data.path: a .json, .jsonl or .jsonl.gz file, a folder with one, or a hub "
            "data set owner/name"
        )
    folders = data_folders()
    for folder in folders:
        for file in task.files:
            if (folder / file).is_file():
                return folder / file
    raise DataError(
        f"no rows for task {name}: none of {', '.join(task.files)} in "
        f"{', '.join(str(folder.resolve()) for folder in folders)}; put the file there, or set data.path, or "
        f"the environment variable {FOLDER_VARIABLE} to its folder{_how_to_get(task)}"
    )


def data_folders() -> list[Path]:
    """Return the folders in which data files are looked for: that of the environment variable first."""
    variable = os.environ.get(FOLDER_VARIABLE)
    return [Path(folder).expanduser() for folder in ([variable] if variable else []) + list(_USUAL_FOLDERS)]


def _how_to_get(task: Task) -> str:
    return f". The data is {task.source}" if task.source else ""
