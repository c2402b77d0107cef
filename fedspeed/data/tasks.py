"""The registry of tasks: where their rows are found and how a record becomes a row.

A new published task needs one entry in `TASKS` and its name in `DataConfig.task`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedspeed.data import streams
from fedspeed.data.builtin import DEFAULT_ROWS, builtin_rows
from fedspeed.data.config import DataConfig, path_text
from fedspeed.data.files import SUFFIXES
from fedspeed.data.formats import Fields
from fedspeed.data.read import Layout, hub_rows, read_rows
from fedspeed.data.rows import Row
from fedspeed.data.sources import Wanted, files_of, reads_hub, usual_file
from fedspeed.errors import DataError


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
        format: of its records, see `read.Layout`.
        source: where a user can download the file.
        edit: changes a row, or returns None to drop it; raises ValueError if the row does not belong to the
            task.
    """

    files: tuple[str, ...]
    fields: Fields
    source: str
    edit: Callable[[Row], Row | None] = _unchanged
    format: str = "instruction"

    @property
    def layout(self) -> Layout:
        """Return how the records of its files are written."""
        return Layout(self.fields, self.format)


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


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task, and where each comes from.

    Attributes:
        sources: the files, or the hub data set, in their order; one empty name for generated rows.
        source_of: [rows] the number of each row's source.
    """

    rows: list[Row]
    sources: tuple[str, ...]
    source_of: list[int]


def load_rows(config: DataConfig, seed: int) -> list[Row]:
    """Return the rows of the configured task in the order of its files. If there are more than data.max_rows,
    a random choice by the seed.

    Raises:
        DataError: the file is not found, with the folders that were searched; or its rows are malformed.
    """
    return load_task_rows(config, seed).rows


def load_task_rows(config: DataConfig, seed: int) -> TaskRows:
    """Return the rows of `load_rows` with their sources; raises what it raises."""
    if config.task == "builtin":
        rows = builtin_rows(seed, config.max_rows or DEFAULT_ROWS)
        return TaskRows(rows, ("",), [0] * len(rows))
    task = task_of(config)
    sources = _read(config, task)
    rows = []
    source_of = []
    for number, (_, pairs) in enumerate(sources):
        of_source = [row for row in (edited(task, where, row) for where, row in pairs) if row is not None]
        rows += of_source
        source_of += [number] * len(of_source)
    if rows and not any(row.output.strip() for row in rows):
        raise DataError(
            f"task {config.task}: none of the {len(rows)} rows has an answer, field {task.fields.output!r} "
            "is blank in all of them; name the right field with task=file and data.output_field, or choose "
            "another file in data.path"
        )
    kept: Sequence[int] = range(len(rows))
    if 0 < config.max_rows < len(rows):
        order = np.random.default_rng([seed, streams.SUBSET]).permutation(len(rows))
        kept = sorted(order[: config.max_rows].tolist())
    names = tuple(name for name, _ in sources)
    return TaskRows([rows[i] for i in kept], names, [source_of[i] for i in kept])


def task_of(config: DataConfig) -> Task:
    """Return the published task that a configuration names, or for other files a task with its configured
    fields.
    """
    if config.task in TASKS:
        return TASKS[config.task]
    return Task(
        files=(),
        source="",
        format=config.format,
        fields=Fields(
            instruction=config.instruction_field,
            input=config.input_field,
            output=config.output_field,
            category=config.category_field,
        ),
    )


def edited(task: Task, where: str, row: Row) -> Row | None:
    """Return a row of `where` after its task's edit, None if it is dropped.

    Raises:
        DataError: the row does not belong to the task.
    """
    try:
        return task.edit(replace(row, where=where))
    except ValueError as error:
        raise DataError(
            f"{where}: {error}; choose the right file in data.path, or read it as task=file"
        ) from None


def held_out_rows(config: DataConfig) -> list[Row]:
    """Return all rows of data.held_out, in the order of its files; empty where it is not set.

    Raises:
        DataError: see `load_rows`.
    """
    if not config.held_out:
        return []
    task = task_of(config)
    wanted = Wanted("data.held_out", config.task, remedy=_how_to_get(task))
    return [row for file in files_of(config.held_out, wanted) for row in rows_of_file(file, task, wanted.key)]


def rows_of_file(path: Path, task: Task, key: str) -> list[Row]:
    """Return all rows of one file after the task's edit.

    Args:
        key: the key that names the file, for messages.

    Raises:
        DataError: see `read_rows` and `edited`.
    """
    pairs = read_rows(path, task.layout, key)
    return [row for row in (edited(task, where, row) for where, row in pairs) if row is not None]


def _read(config: DataConfig, task: Task) -> list[tuple[str, list[tuple[str, Row]]]]:
    """Return (name, pairs of `read_rows`) of each source of data.path."""
    wanted = Wanted("data.path", config.task, task.files, _how_to_get(task))
    if not config.path and not task.files:
        raise DataError(
            f"data.task=file needs data.path: a file ({', '.join(SUFFIXES)}), a pattern, a folder, a list of "
            "these, or a hub data set owner/name"
        )
    if reads_hub(config):
        name = path_text(config.path)
        return [(name, hub_rows(name, task.layout))]
    files = files_of(config.path, wanted) if config.path else [usual_file(wanted)]
    return [(str(file), read_rows(file, task.layout)) for file in files]


def _how_to_get(task: Task) -> str:
    return f". The data is {task.source}" if task.source else ""
