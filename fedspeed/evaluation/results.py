"""The results of evaluation tasks: one JSON file for each evaluated model, `evaluation.json`."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspeed import __version__
from fedspeed.data.eval_task import ALL, EvalTask, Tally
from fedspeed.errors import DataError
from fedspeed.evaluation.harness_results import HARNESS, HarnessResult
from fedspeed.evaluation.intervals import interval_95
from fedspeed.files import json_number, json_value, sha256_of, write_atomically
from fedspeed.log import LOG
from fedspeed.monitor.tables import table

if TYPE_CHECKING:  # it loads torch
    from fedspeed.evaluation.scoring import ScoredItem, TaskScores

FILE = "evaluation.json"
_PACKAGES = ("torch", "transformers", "lm_eval")  # lm_eval where it is installed


def result_of(task: EvalTask, scores: "TaskScores", *, limit: int, seconds: float) -> dict[str, Any]:
    """Return the result of a task as JSON values.

    Args:
        limit: most items; 0: all. seconds: that the evaluation took.
    """
    return {
        "task": task.name,
        "metric": task.metrics[0],
        **_values(scores.main.get(ALL, Tally())),
        "metrics": {name: _values(of.get(ALL, Tally())) for name, of in scores.metrics.items()},
        "by_category": _by_category(scores),
        "limit": limit,
        "settings": task.describe(),
        "prompts_sha256": prompts_digest(item.prompt for item in scores.items),
        "data_sha256": dict(task.digests()),
        "versions": versions(),
        "seconds": round(seconds, 3),
    }


def harness_result_of(result: HarnessResult, *, limit: int, seconds: float) -> dict[str, Any]:
    """Return the result of a task of lm-evaluation-harness as JSON values, in the form of `result_of`.

    Metrics that are no mean of scores, such as perplexities, have the harness's own number and no interval.
    """
    scores = result.scores
    items = len(scores.items)
    metrics = {name: _values(of.get(ALL, Tally())) for name, of in scores.metrics.items()}
    for name, number in result.numbers.items():
        metric = name.removesuffix(",none")
        if metric not in metrics and metric != "sample_len":
            metrics[metric] = {"score": number, "interval_95": None, "items": items}
    main = next(iter(metrics), "")
    return {
        "task": f"{HARNESS}{result.name}",
        "metric": main,
        **metrics.get(main, {"score": None, "interval_95": None, "items": items}),
        "metrics": metrics,
        "by_category": _by_category(scores),
        "limit": limit,
        "settings": dict(result.details),
        "prompts_sha256": prompts_digest(item.prompt for item in scores.items),
        "data_sha256": {path.name: sha256_of(path) for path in result.files},
        "versions": versions(),
        "seconds": round(seconds, 3),
    }


def _by_category(scores: "TaskScores") -> dict[str, Any]:
    return {category: _values(tally) for category, tally in sorted(scores.main.items()) if category != ALL}


def _values(tally: Tally) -> dict[str, Any]:
    score = json_number(tally.mean)
    interval = None if score is None else interval_95(tally)
    return {"score": score, "interval_95": None if interval is None else list(interval), "items": tally.items}


def prompts_digest(prompts: Iterable[str]) -> str:
    """Return the SHA-256, in hex, of all prompts in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        content = prompt.encode("utf-8", errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of FedSpeed and of the libraries that compute the scores."""
    found = {"fedspeed": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a file of results, empty results where there is none.

    Raises:
        DataError: it is no file of results.
    """
    try:
        values = json_value(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"results": []}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as results ({error}); move it away") from error
    if not isinstance(values, dict) or not _are_results(values.get("results")):
        raise DataError(f"{path}: is no file of results; move it away, or name another one with --out")
    return values


def _are_results(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(one, dict) and "task" in one for one in values)


def add_results(path: Path, target: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """Write results into a file, which keeps those of other tasks; a task that is in it already is replaced.

    The file of another target, or of the same one with other weights, is renamed (`earlier_file`).

    Args:
        target: what was evaluated, as JSON values.

    Raises:
        DataError: the file is there and is no file of results.
    """
    earlier = read_results(path)
    kept: list[Mapping[str, Any]] = []
    if earlier.get("target") == target:
        names = {result["task"] for result in results}
        kept = [result for result in earlier["results"] if result["task"] not in names]
    elif earlier["results"]:
        renamed = earlier_file(path)
        path.rename(renamed)
        LOG.info(f"{path.name} was of another model or of other weights: it is now {renamed}")
    text = json.dumps({"target": target, "results": [*kept, *results]}, indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def earlier_file(path: Path) -> Path:
    """Return the first free name for a file of results that makes room for another: evaluation-1.json."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())


def write_answers(path: Path, results: "Iterable[tuple[str, Sequence[ScoredItem]]]") -> None:
    """Write what the model answered to each item as JSON lines.

    Args:
        results: (name of the task, its items in their order).
    """
    lines = [
        json.dumps({"task": name, **item.to_json(index)}, ensure_ascii=False)
        for name, items in results
        for index, item in enumerate(items)
    ]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode("utf-8", errors="replace"))


def results_table(results: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """Return the cells (task, metric, score, 95 % interval, items) of results, one row for each metric."""
    return [
        (
            result["task"] if name == result["metric"] else "",
            name,
            score_text(name, values["score"]),
            interval_text(name, values["interval_95"]),
            str(values["items"]),
        )
        for result in results
        for name, values in result["metrics"].items()
    ]


def scores_to_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of results in Markdown, with their notes below it, such as that they are unofficial."""
    header = ("task", "metric", "score", "95 % interval", "items")
    notes = [(result["task"], result.get("note") or result["settings"].get("note")) for result in results]
    lines = [f"\n{task}: {note}." for task, note in notes if note]
    return "\n".join([table(header, results_table(results), right=(2, 3, 4)), *lines])


def score_text(metric: str, score: float | None) -> str:
    """Return a score for people: losses and perplexities as a number, all others in per cent."""
    if score is None:
        return "-"
    return f"{100 * score:.2f} %" if is_share(metric) else f"{score:.4f}"


def is_share(metric: str) -> bool:
    """Whether people read a metric in per cent: all but losses and perplexities."""
    return metric not in {"loss", "bits_per_byte"} and "perplexity" not in metric


def interval_text(metric: str, interval: Sequence[float] | None) -> str:
    """Return an interval for people."""
    if interval is None:
        return "-"
    low, high = (score_text(metric, value) for value in interval)
    return f"{low.removesuffix(' %')} to {high}"
