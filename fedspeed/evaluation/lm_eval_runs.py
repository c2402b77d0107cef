"""Run tasks of lm-evaluation-harness with a model, and turn what it returns into scores of ours."""

import hashlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from lm_eval import evaluator
from lm_eval.api import task as harness_task
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind  # the public interface tells no kinds of names
from lm_eval.tasks._yaml_loader import load_yaml

from fedspeed.data.eval_task import ALL, Scores, Tally
from fedspeed.errors import DataError, FedSpeedError
from fedspeed.evaluation.context import TaskContext
from fedspeed.evaluation.harness_results import HarnessResult, HarnessSettings, HarnessTasks
from fedspeed.evaluation.item_choice import chosen_items
from fedspeed.evaluation.presets import UNOFFICIAL
from fedspeed.evaluation.scoring import ScoredItem, TaskScores
from fedspeed.evaluation.tasks.choices import NOTE
from fedspeed.files import json_number

OWN_TASKS = Path(__file__).parent / "lm_eval_tasks"
LOCAL_SUFFIXES = (".jsonl.gz", ".jsonl", ".json")
FEWSHOT_SEED = 1234  # as in the harness


def load_requested(names: Sequence[str], settings: HarnessSettings) -> list[HarnessTasks]:
    """Load tasks of the harness with their data. See `harness.load_tasks`."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    manager = task_manager(names)
    return [_requested(manager, name, settings.folders) for name in names]


def run_tasks(model: LM, requested: HarnessTasks, settings: HarnessSettings) -> HarnessResult:
    """Compute tasks of the harness with any model of the harness."""
    for task in requested.tasks.values():
        if settings.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    samples = {
        name: chosen_items(len(task.eval_docs), settings.limit) for name, task in requested.tasks.items()
    }
    with _fixed_random_numbers(), _no_progress_bars():
        output = evaluator.evaluate(
            model,
            {"tasks": dict(requested.tasks)},
            samples=samples,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
        )
    return _result(requested, output, settings)


def task_manager(names: Sequence[str]) -> TaskManager:
    """Return the harness's index of tasks. That of its own ones takes seconds, and is left out if only tasks
    of ours or YAML files are named.
    """
    own = _index(own_only=True)
    known = all(name in own.task_index or Path(name).is_file() for name in names)
    return own if known else _index(own_only=False)


@cache
def _index(*, own_only: bool) -> TaskManager:
    return TaskManager(include_path=OWN_TASKS, include_defaults=not own_only)


def single_tasks(manager: TaskManager, name: str) -> list[str]:
    """Return the names of the single tasks that a name stands for: itself, or those of a group or tag."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind in {Kind.TASK, Kind.PY_TASK}:
        return [name]
    if entry.kind == Kind.TAG:
        return sorted(entry.tags)
    members = entry.cfg["task"]
    parts = [part if isinstance(part, str) else part.get("task", part.get("group")) for part in members]
    return [single for part in parts for single in single_tasks(manager, part)]


def _requested(manager: TaskManager, name: str, folders: tuple[Path, ...]) -> HarnessTasks:
    """Find and load what a name stands for.

    Raises:
        FedSpeedError: see `harness.load_tasks`.
    """
    if name not in manager.task_index and not Path(name).is_file():
        similar = [known for known in manager.all_tasks if name in known][:8]
        raise FedSpeedError(
            f"lm-evaluation-harness knows no task {name!r}"
            + (f"; it has {', '.join(similar)}" if similar else "; name one of its tasks, or a YAML file")
        )
    singles = single_tasks(manager, name)
    configs = {single: _config(manager, single) for single in singles}
    for single, config in configs.items():
        if config.get("unsafe_code"):
            raise FedSpeedError(
                f"task {single} of lm-evaluation-harness executes generated code inside this process",
                remedy="choose a code task of `fedspeed eval --list`, which runs it in a sandbox",
            )
    local = {single: _local_files(single, config, folders) for single, config in configs.items()}
    specs = (
        [_spec(manager, single, files) for single, files in local.items()] if any(local.values()) else [name]
    )
    try:
        tasks = manager.load(specs)["tasks"]
    except Exception as error:  # of many types: the library's, those of data sets and of its network stack
        raise DataError(
            f"task {name} of lm-evaluation-harness cannot be loaded ({type(error).__name__}: "
            f"{_first_line(error)}); its data is read from the Hugging Face Hub: run it once where the Hub "
            f"can be reached, or put the items into {singles[0]}.jsonl in a data folder (FEDSPEED_DATA)"
        ) from error
    return HarnessTasks(name, tasks, sorted({file for files in local.values() for file in files.values()}))


def _config(manager: TaskManager, single: str) -> dict[str, Any]:
    """Return the definition of a single task, with the functions that it names unresolved."""
    entry = manager.task_index.get(single)
    path = Path(single) if entry is None else entry.yaml_path
    return load_yaml(path, resolve_func=False) if path else {}


def _local_files(single: str, config: Mapping[str, Any], folders: tuple[Path, ...]) -> dict[str, Path]:
    """Return by split the local files of a task: those that its definition names, which must be there, or one
    that is called as the task.
    """
    context = TaskContext(name=single, folders=folders)
    named = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") == "json" and isinstance(named, Mapping):
        return {
            split: Path(file)
            if Path(file).is_file()
            else context.file(file, source=f"described in {single}.yaml")
            for split, file in named.items()
        }
    split = config.get("test_split") or config.get("validation_split") or "test"
    found = [
        folder / f"{Path(single).stem}{suffix}"
        for folder in folders
        for suffix in LOCAL_SUFFIXES
        if (folder / f"{Path(single).stem}{suffix}").is_file()
    ]
    return {split: found[0]} if found else {}


def _spec(manager: TaskManager, single: str, files: Mapping[str, Path]) -> str | dict[str, Any]:
    """Return a task's definition with local files for its data; its name if it has none."""
    if not files:
        return single
    entry = manager.task_index.get(single)
    config = load_yaml(Path(single) if entry is None else entry.yaml_path, resolve_func=True)
    splits = {
        key: config.get(key) if config.get(key) in files else None
        for key in ("training_split", "validation_split", "test_split", "fewshot_split")
    }
    fewshot = {key: value for key, value in (config.get("fewshot_config") or {}).items() if key != "split"}
    data = {"data_files": {split: str(path.resolve()) for split, path in files.items()}}
    return {
        **config,
        **splits,
        "fewshot_config": fewshot or None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": data,
    }


def _result(requested: HarnessTasks, output: Mapping[str, Any], settings: HarnessSettings) -> HarnessResult:
    """Return the result of a name. The scores of several tasks are those of all their items together."""
    single = len(requested.tasks) == 1
    merged: dict[str, Scores] = {}
    items: list[ScoredItem] = []
    for name in requested.tasks:
        scored = _scored_items(output["samples"][name], "" if single else name)
        items += scored
        for item in scored:
            for metric, tally in item.tallies.items():
                of_metric = merged.setdefault(metric, {})
                for category in filter(None, (ALL, item.category)):
                    of_metric[category] = of_metric.get(category, Tally()) + tally
    hashes = [sample["doc_hash"] for name in requested.tasks for sample in output["samples"][name]]
    details: dict[str, Any] = {
        "lm_eval": version("lm-eval"),
        "num_fewshot": {name: output["n-shot"].get(name) for name in requested.tasks},
        "task_versions": {name: output["versions"].get(name) for name in requested.tasks},
        "harness_results": {name: _numbers(output["results"][name]) for name in requested.tasks},
        "items_sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "chat": settings.chat,
    }
    if note := _note(requested):
        details["note"] = note
    [numbers, *_] = details["harness_results"].values()
    scores = TaskScores(merged, items)
    return HarnessResult(
        requested.name, scores, details, numbers=numbers if single else {}, files=requested.files
    )


def _note(requested: HarnessTasks) -> str:
    if all(name.startswith("fedspeed_") for name in requested.tasks):
        return NOTE
    return UNOFFICIAL if all(name.startswith("flowertune_") for name in requested.tasks) else ""


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the harness's own numbers of a task as JSON values, without missing standard errors."""
    return {
        name: json_number(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in name
    }


def _scored_items(samples: Sequence[Mapping[str, Any]], category: str) -> list[ScoredItem]:
    """Return what the model answered to each item of a task, from the harness's records: one for each item
    and filter.
    """
    by_item: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_item.setdefault(sample["doc_id"], []).append(sample)
    several = len({sample["filter"] for sample in samples}) > 1
    items = []
    for of_item in by_item.values():
        first = of_item[0]
        tallies = {}
        for sample in of_item:
            for metric in sample["metrics"]:
                if isinstance(sample[metric], int | float | np.number):
                    name = f"{metric},{sample['filter']}" if several else metric
                    tallies[name] = Tally.of([float(sample[metric])])
        texts, logprobs = _answers(first)
        prompt = str(first["arguments"][0][0])
        kind: Literal["answers", "choices"] = "choices" if logprobs else "answers"
        items.append(ScoredItem(prompt, category, texts, tallies, kind=kind, logprobs=logprobs))
    return items


def _answers(sample: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the answers of a record, and the log-probabilities of choices."""
    responses = [response for of_request in sample["resps"] for response in of_request]
    if all(isinstance(response, tuple) for response in responses):
        choices = tuple(str(arguments[-1]) for arguments in sample["arguments"])
        return choices, tuple(float(logprob) for logprob, _ in responses)
    return tuple(str(response) for response in responses), ()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


@contextmanager
def _fixed_random_numbers() -> Iterator[None]:
    """Seed the generators that tasks of the harness draw from, and restore them."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the harness from drawing a progress bar on each rank."""
    original = harness_task.tqdm
    harness_task.tqdm = lambda items, **_options: items
    try:
        yield
    finally:
        harness_task.tqdm = original
