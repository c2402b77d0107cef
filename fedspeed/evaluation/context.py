"""What an evaluation task is made from, and the making of it by its name."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from fedspeed.data.config import DataConfig
from fedspeed.data.eval_task import EvalTask
from fedspeed.errors import ConfigError, DataError
from fedspeed.evaluation.config import EVAL_TASKS, EvalTaskEntry


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """Hold what an evaluation task is made from.

    Attributes:
        name: of the task, as in EVAL_TASKS. options: of its entry.
        folders: where data files are looked for, in this order.
        samples: answers to each item; 0: the task's own number.
        unsafe: whether generated code may run without a sandbox.
        data: the configuration of the rows of a run; None if there is no run.
        seed: of the run.
        held_out: a file of rows that are used instead of a run's; None: none.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()
    samples: int = 0
    unsafe: bool = False
    data: DataConfig | None = None
    seed: int = 0
    held_out: Path | None = None

    def file(self, *names: str, source: str) -> Path:
        """Return the first file of some possible names in the data folders.

        Args:
            names: of the file, the preferred one first; relative to a folder.
            source: where a user can download it, for the message.

        Raises:
            DataError: there is none.
        """
        for folder in self.folders:
            for name in names:
                if (folder / name).is_file():
                    return folder / name
        searched = ", ".join(str(folder.resolve()) for folder in self.folders)
        raise DataError(
            f"evaluation task {self.name}: none of {', '.join(names)} in {searched or 'no folder'}; put the "
            f"file into one of them, or set the environment variable FEDSPEED_DATA to its folder. The data "
            f"is {source}"
        )


def entry_of(name: str) -> EvalTaskEntry:
    """Return the entry of an evaluation task.

    Raises:
        ConfigError: there is no such task, with similar names.
    """
    if name in EVAL_TASKS:
        return EVAL_TASKS[name]
    similar = difflib.get_close_matches(name, EVAL_TASKS, n=3) or list(EVAL_TASKS)
    raise ConfigError(
        f"{name!r} is no evaluation task; did you mean {', '.join(similar)}? `fedspeed eval --list` shows "
        "all of them"
    )


def make_task(context: TaskContext) -> EvalTask:
    """Make the evaluation task that a context names.

    Raises:
        FedSpeedError: what the task needs is missing.
    """
    return import_module(entry_of(context.name).module).make(context)
