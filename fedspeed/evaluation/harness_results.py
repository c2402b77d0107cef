"""What is asked of lm-evaluation-harness, and what it results in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it loads torch
    from fedspeed.evaluation.scoring import TaskScores

HARNESS = "lm_eval/"  # precedes the names of the harness's tasks in results


@dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """How tasks of the harness are computed.

    Attributes:
        num_fewshot: examples before each item; None: the task's own number.
        limit: items of each task, a fixed choice; 0: all.
        chat: whether prompts go through the model's chat template.
        folders: where local data files are looked for.
    """

    num_fewshot: int | None = None
    limit: int = 0
    chat: bool = False
    folders: tuple[Path, ...] = ()


@dataclass(frozen=True)
class HarnessTasks:
    """The tasks that one name stands for: itself, or the members of a group or tag.

    Attributes:
        tasks: definitions of the harness, with their items, by name.
        files: local data files that items were read from.
    """

    name: str
    tasks: Mapping[str, Any]
    files: Sequence[Path] = ()


@dataclass(frozen=True)
class HarnessResult:
    """The result of a task or a group of tasks of the harness.

    Attributes:
        name: of the task or group. scores: with a category for each task of a group.
        details: versions, settings and the harness's own numbers, as JSON values.
        numbers: the harness's own numbers of all its metrics, of a single task.
        files: local data files that items were read from.
    """

    name: str
    scores: "TaskScores"
    details: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    files: Sequence[Path] = ()
