"""The comparison of evaluated models, from the results that `fedspeed eval` has written for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspeed.errors import DataError
from fedspeed.evaluation.results import FILE, interval_text, is_share, read_results, score_text
from fedspeed.monitor.plots import BLUE, INK, new_figure
from fedspeed.monitor.summary_file import read_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUNS = "runs"  # where a run's name is looked for
MISSING = "-"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model and its results.

    Attributes:
        name: the run's folder, or the file of results without its suffix.
        results: by evaluation task, as `evaluation.results.result_of` returns them.
        best_loss: lowest held-out loss during training; None for a base, or where there was none.
        note: about the model, such as that the losses in training are of others; may be empty.
    """

    name: str
    results: Mapping[str, Mapping[str, Any]]
    best_loss: float | None = None
    note: str = ""


def read_model(name: str) -> EvaluatedModel:
    """Return an evaluated model.

    Args:
        name: of a run, its folder, or a file of results.

    Raises:
        DataError: there are no results there.
        JournalError: the run's summary cannot be read.
    """
    path = Path(name).expanduser()
    folder = path if path.exists() else Path(RUNS) / name
    if folder.is_file():
        file = folder
        summary = None
        shown = folder.resolve().parent.name if folder.name == FILE else folder.stem
    else:
        file = folder / FILE
        summary = read_summary(folder)
        shown = folder.resolve().name
    if not file.is_file():
        raise DataError(f"{name}: there is no {file}; evaluate it first: python -m fedspeed eval {name}")
    values = read_results(file)
    results = {result["task"]: result for result in values["results"]}
    if not results:
        raise DataError(f"{file}: has no results; evaluate it first: python -m fedspeed eval {name}")
    target = values.get("target")
    note = str(target.get("note", "")) if isinstance(target, dict) else ""
    best_loss = None if summary is None else summary.best_val_loss
    return EvaluatedModel(shown, results, best_loss, note=note)


def tasks_of(models: Sequence[EvaluatedModel]) -> list[str]:
    """Return the evaluation tasks of which any model has a result, in the order of the models."""
    return list(dict.fromkeys(task for model in models for task in model.results))


def comparison_text(models: Sequence[EvaluatedModel]) -> str:
    """Return tables in Markdown: the scores with 95 % intervals of models and tasks, for each task with
    categories the scores by category, and notes where the models did not have the same items.
    """
    tasks = tasks_of(models)
    has_loss = any(model.best_loss is not None for model in models)
    header = ["model", *(_task_heading(models, task) for task in tasks)]
    header += ["best loss in training"] if has_loss else []
    rows = []
    for model in models:
        rows.append([model.name, *(_cell(model.results.get(task)) for task in tasks)])
        if has_loss:
            rows[-1].append(MISSING if model.best_loss is None else f"{model.best_loss:.4f}")
    lines = _table(header, rows)
    for task in tasks:
        lines += _category_lines(models, task)
    lines += [f"note: {model.note}" for model in models if model.note]
    lines += [f"note: {note}" for task in tasks if (note := _difference(models, task))]
    return "\n".join(lines)


def comparison_figure(models: Sequence[EvaluatedModel]) -> "Figure":
    """Draw a panel for each task with a bar and a 95 % interval for each model that has a result."""
    from matplotlib.ticker import PercentFormatter

    tasks = tasks_of(models)
    figure = new_figure(2.0 + 3.6 * len(tasks), 1.4 + 0.42 * len(models))
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks):
        if is_share(_metric(models, task)):
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        for row, model in enumerate(models):
            result = model.results.get(task)
            if result is None or result["score"] is None:
                continue
            score = result["score"]
            low, high = result["interval_95"] or (score, score)
            errors = [[max(0.0, score - low)], [max(0.0, high - score)]]
            axes.barh(row, score, height=0.68, color=BLUE, alpha=0.8, xerr=errors, ecolor=INK, capsize=3)
            axes.annotate(
                score_text(result.get("metric", ""), score),
                (max(high, 0), row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=INK,
            )
        axes.margins(x=0.18)
        axes.set_title(_task_heading(models, task), loc="left", fontsize=10, color=INK, parse_math=False)
    panels[0].set_yticks(range(len(models)), [model.name for model in models], parse_math=False)
    panels[0].set_ylim(len(models) - 0.4, -0.6)
    return figure


def _task_heading(models: Sequence[EvaluatedModel], task: str) -> str:
    metric = _metric(models, task)
    return f"{task} ({metric})" if metric else task


def _metric(models: Sequence[EvaluatedModel], task: str) -> str:
    """Return the metric of a task's first result; empty where it has none."""
    return next(model.results[task].get("metric", "") for model in models if task in model.results)


def _cell(result: Mapping[str, Any] | None) -> str:
    """Return a score with its interval and the number of items: `18.50 % [13.70 to 24.50 %] of 200`."""
    if result is None or result["score"] is None:
        return MISSING
    metric = result.get("metric", "")
    interval = result.get("interval_95")
    between = f" [{interval_text(metric, interval)}]" if interval else ""
    return f"{score_text(metric, result['score'])}{between} of {result['items']}"


def _category_lines(models: Sequence[EvaluatedModel], task: str) -> list[str]:
    by_model = [model.results.get(task, {}).get("by_category", {}) for model in models]
    categories = sorted({category for of_model in by_model for category in of_model})
    if len(categories) < 2:
        return []
    rows = [
        [
            model.name,
            *(_category_cell(model.results[task], of_model.get(category)) for category in categories),
        ]
        for model, of_model in zip(models, by_model)
        if of_model
    ]
    return ["", *_table([_task_heading(models, task), *categories], rows)]


def _category_cell(result: Mapping[str, Any], category: Mapping[str, Any] | None) -> str:
    if category is None:
        return MISSING
    return _cell({**category, "metric": result.get("metric", ""), "interval_95": None})


def _difference(models: Sequence[EvaluatedModel], task: str) -> str:
    """Return a note if the models' results of a task come from different prompts, data or settings, such as
    the temperature; else nothing.
    """
    with_result = [model for model in models if task in model.results]
    compared = {
        "data_sha256": "data",
        "prompts_sha256": "prompts",
        "items": "items",
        "settings": "settings of the generation",
    }
    for key, name in compared.items():
        values = [_compared(model.results[task], key) for model in with_result]
        others = [model.name for model, value in zip(with_result, values) if value != values[0]]
        if others:
            first = with_result[0].name
            return f"{task}: {', '.join(others)} had other {name} than {first}; the scores do not compare"
    return ""


def _compared(result: Mapping[str, Any], key: str) -> Any:
    """Return a field of a result; of the settings, not the scores that lm-evaluation-harness puts there."""
    value = result.get(key)
    if key == "settings" and isinstance(value, dict):
        return {name: setting for name, setting in value.items() if name != "harness_results"}
    return value


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [[value.ljust(width) for value, width in zip(row, widths)] for row in (header, *rows)]
    lines.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(values)} |" for values in lines]
