"""HumanEval and HumanEval-X: functions to complete, and programs that test them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedspeed.data.eval_task import GenerationSettings, GenerationTask
from fedspeed.data.files import records
from fedspeed.errors import DataError
from fedspeed.evaluation.context import TaskContext
from fedspeed.evaluation.item_choice import chosen_items
from fedspeed.evaluation.languages import LANGUAGES
from fedspeed.evaluation.languages.language import Exercise
from fedspeed.evaluation.sandbox.runner import Runner
from fedspeed.evaluation.tasks.code.pass_at_k import pass_at_k, reported_ks
from fedspeed.evaluation.tasks.code.programs import passed, runner_for

# File names and source by language. Python's exercises are those of HumanEval itself.
_FILES = {
    "python": (
        ("humaneval.jsonl.gz", "HumanEval.jsonl.gz"),
        "data/HumanEval.jsonl.gz in the GitHub repository openai/human-eval",
    ),
    **{
        name: (
            (f"humanevalx_{name}.jsonl.gz", f"humaneval_{name}.jsonl.gz"),
            f"codegeex/benchmark/humaneval-x/{name}/data/humaneval_{name}.jsonl.gz in the GitHub repository "
            "THUDM/CodeGeeX",
        )
        for name in ("cpp", "go", "java", "js")
    },
}
_MAX_NEW = 384


class HumanEval(GenerationTask[Exercise]):
    """Exercises in one or several languages; the score is pass@k.

    Args:
        languages: names of the registry. runner: runs the programs.
    """

    def __init__(
        self, context: TaskContext, languages: Sequence[str], settings: GenerationSettings, runner: Runner
    ):
        self.name = context.name
        self.settings = settings
        self.metrics = tuple(f"pass@{k}" for k in reported_ks(settings.samples))
        self._files = {
            language: context.file(*_FILES[language][0], source=_FILES[language][1]) for language in languages
        }
        self._runner = runner

    def items(self, limit: int = 0) -> list[Exercise]:
        """Return as many items of every language, the same ones every time."""
        chosen = []
        for name, path in self._files.items():
            exercises = read_exercises(path, name)
            chosen += [exercises[index] for index in chosen_items(len(exercises), limit)]
        return chosen

    def files(self) -> Sequence[Path]:
        return tuple(self._files.values())

    def prompt(self, item: Exercise) -> str:
        return item.prompt

    def category(self, item: Exercise) -> str:
        return LANGUAGES[item.language].title if len(self._files) > 1 else ""

    def score(self, items: Sequence[Exercise], answers: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        ks = reported_ks(self.settings.samples)
        return [
            {f"pass@{k}": pass_at_k(len(verdicts), sum(verdicts), k) for k in ks}
            for verdicts in passed(self._runner, items, answers)
        ]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"sandbox": self._runner.is_sandbox}


def read_exercises(path: Path, language: str) -> list[Exercise]:
    """Return the exercises of a file of HumanEval or HumanEval-X.

    The line break at the end of a prompt becomes the beginning of its solution. Where a tokenizer has a token
    for a line break with the indentation behind it, a model that is given the line break alone may write
    something else than the body of the function (benchmarks/results/learning.md).

    Raises:
        DataError: a record lacks a field.
    """
    exercises = []
    for where, record in records(path):
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: not an object; {path.name} has to be a file of HumanEval or HumanEval-X"
            )
        try:
            prompt = record["prompt"].rstrip()
            exercises.append(
                Exercise(
                    name=record["task_id"],
                    language=language,
                    prompt=prompt,
                    solution=record["prompt"][len(prompt) :] + record["canonical_solution"],
                    test=record["test"],
                    entry_point=record.get("entry_point", ""),
                    imports=record.get("import", ""),
                    test_setup=record.get("test_setup", ""),
                )
            )
        except KeyError as error:
            raise DataError(
                f"{where}: no field {error}; {path.name} has to be a file of HumanEval or HumanEval-X"
            ) from None
    return exercises


def make(context: TaskContext) -> HumanEval:
    """Make the task of the languages that are in the context's options, in that order.

    One sample is decoded greedily; several are drawn at temperature 0.2, and from ten on at 0.8, with top-p
    0.95, as in Chen et al. 2021.

    Raises:
        SandboxError: generated programs cannot be run here.
        DataError: a data file is missing.
    """
    languages = context.options["languages"]
    samples = context.samples or 1
    first, *others = (LANGUAGES[name] for name in languages)
    assert all(language.ends_with_brace and not language.stop_texts for language in others)
    sampling = 0.2 if samples < 10 else 0.8
    settings = GenerationSettings(
        max_new=_MAX_NEW,
        samples=samples,
        temperature=0.0 if samples == 1 else sampling,
        top_p=1.0 if samples == 1 else 0.95,
        stop_texts=first.stop_texts,
        ends_with_brace=first.ends_with_brace,
    )
    return HumanEval(context, languages, settings, runner_for(languages, unsafe=context.unsafe))
