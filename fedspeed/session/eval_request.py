"""What a user asks `fedspeed eval` for, and the checks before anything starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedspeed.config.run import RunConfig
from fedspeed.data.config import DataConfig
from fedspeed.data.eval_task import EvalTask, GenerationTask
from fedspeed.data.sources import data_folders
from fedspeed.errors import ConfigError, DataError, FedSpeedError
from fedspeed.evaluation.config import EVAL_TASKS
from fedspeed.evaluation.context import TaskContext, entry_of, make_task
from fedspeed.evaluation.harness import check_installed
from fedspeed.evaluation.harness_results import HARNESS, HarnessSettings
from fedspeed.evaluation.held_out_rows import names_rows
from fedspeed.evaluation.presets import UNOFFICIAL, preset_of
from fedspeed.evaluation.results import read_results
from fedspeed.files import check_writable
from fedspeed.session.eval_target import EvalTarget


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What is evaluated, on what, and where the results go.

    Attributes:
        tasks: names of the evaluation tasks. limit: most items of each; 0: all.
        samples: answers to each item; 0: the task's own number.
        sampling: values of GenerationSettings that replace those of each task that generates.
        held_out: a file of rows for the tasks that read held-out rows; None: those of the run.
        out: the file of results. answers: the file of answers; None: they are not kept.
        unsafe: whether generated code may run without a sandbox.
        harness: names of tasks of lm-evaluation-harness. num_fewshot: examples before each of their items;
            None: the task's own number.
        chat: whether their prompts go through the model's chat template.
        presets: names of the presets that some of the tasks belong to.
    """

    target: EvalTarget
    tasks: tuple[str, ...]
    out: Path
    limit: int = 0
    samples: int = 0
    sampling: Mapping[str, float] = field(default_factory=dict)
    held_out: Path | None = None
    answers: Path | None = None
    unsafe: bool = False
    harness: tuple[str, ...] = ()
    num_fewshot: int | None = None
    chat: bool = False
    presets: tuple[str, ...] = ()

    def labels(self, task: str) -> dict[str, str]:
        """Return what a result says of the preset that its task belongs to; empty if it belongs to none."""
        for name in self.presets:
            preset = preset_of(name)
            if task in {*preset.tasks, *(f"{HARNESS}{member}" for member in preset.harness)}:
                return {"preset": name, "note": UNOFFICIAL}
        return {}

    @property
    def harness_settings(self) -> HarnessSettings:
        """Return how tasks of lm-evaluation-harness are computed."""
        return HarnessSettings(
            num_fewshot=self.num_fewshot, limit=self.limit, chat=self.chat, folders=tuple(data_folders())
        )

    def make_tasks(self) -> list[EvalTask]:
        """Make the evaluation tasks.

        Raises:
            FedSpeedError: a task is unknown, or what it needs is missing.
        """
        target = self.target
        return make_tasks(
            self.tasks,
            target.data,
            seed=target.config.run.seed,
            samples=self.samples,
            sampling=self.sampling,
            unsafe=self.unsafe,
            held_out=self.held_out,
        )


def make_tasks(
    names: Sequence[str],
    data: DataConfig | None,
    *,
    seed: int,
    samples: int = 0,
    sampling: Mapping[str, float] | None = None,
    unsafe: bool = False,
    held_out: Path | None = None,
) -> list[EvalTask]:
    """Make evaluation tasks by their names.

    Args:
        data: the configuration of the rows of a run; None if there is no run.
        sampling: values of GenerationSettings that replace those of each task that generates.

    Raises:
        FedSpeedError: a task is unknown, or what it needs is missing; with all that is wrong.
    """
    tasks = []
    faults: list[str] = []
    for name in names:
        try:
            entry = entry_of(name)
            context = TaskContext(
                name=name,
                options=entry.options,
                folders=tuple(data_folders()),
                samples=samples,
                unsafe=unsafe,
                data=data,
                seed=seed,
                held_out=held_out,
            )
            task = make_task(context)
            assert task.name == name, f"{entry.module} makes a task of the name {task.name}, not {name}"
            if isinstance(task, GenerationTask):
                task.settings = replace(task.settings, **dict[str, Any](sampling or {}))
            tasks.append(task)
        except FedSpeedError as error:
            faults.append(str(error))
    if faults:
        raise FedSpeedError("\n  ".join(faults))
    return tasks


def round_tasks(config: RunConfig) -> list[tuple[EvalTask, Sequence[Any]]]:
    """Make the evaluation tasks that a run scores while it goes on, and load their items.

    Raises:
        FedSpeedError: a task is unknown, or what it needs is missing; with all that is wrong.
    """
    names = config.evaluation.tasks
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"evaluation.tasks: {', '.join(twice)} is named twice; leave one of them out")
    loaded: list[tuple[EvalTask, Sequence[Any]]] = []
    faults: list[str] = []
    for task in make_tasks(names, config.data, seed=config.run.seed, unsafe=config.evaluation.unsafe):
        try:
            loaded.append((task, task.items(config.evaluation.limit)))
        except FedSpeedError as error:
            faults.append(str(error))
    if faults:
        raise FedSpeedError("\n  ".join(faults))
    return loaded


def default_tasks(target: EvalTarget, held_out: Path | None) -> tuple[str, ...]:
    """Return the tasks that are meant where none is named: held-out rows, where there are some.

    Raises:
        ConfigError: there are none.
    """
    if names_rows(target.data) or held_out is not None:
        return ("held_out",)
    raise ConfigError(
        f"{target.name}: has no held-out rows of its own, so that a task must be named: --tasks "
        f"{','.join(list(EVAL_TASKS)[:3])} (`fedspeed eval --list` shows all), or --held-out FILE"
    )


def check_request(request: EvalRequest) -> None:
    """Check a request before any rank starts: its tasks, their data, and where the results go.

    Raises:
        FedSpeedError: something is wrong, with what to do about it.
    """
    names = [*request.tasks, *(f"{HARNESS}{name}" for name in request.harness)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--tasks: {', '.join(twice)} is named twice; leave one of them out")
    if request.harness:
        check_installed()
    faults = []
    for task in request.make_tasks():
        try:
            if not task.items(1):
                raise DataError(f"evaluation task {task.name}: its data has no items; name other data")
        except FedSpeedError as error:
            faults.append(str(error))
    if faults:
        raise FedSpeedError("\n  ".join(faults))
    for path in filter(None, (request.out, request.answers)):
        try:
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            check_writable(path.absolute().parent)
        except OSError as error:
            raise FedSpeedError(
                f"{path}: cannot be written ({error.strerror}); choose another file"
            ) from error
    read_results(request.out)
