"""Questions with given answers, of which the model should find the right one the likeliest: BoolQ, ARC, PIQA,
WinoGrande and COPA, from files with ready prompts.

lm-evaluation-harness computes the same on the same files (evaluation/lm_eval_tasks/). Published scores of the
harness use other prompts, and are not comparable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspeed.data.eval_task import ChoiceTask, Likelihood, largest, most_likely
from fedspeed.data.files import records
from fedspeed.errors import DataError
from fedspeed.evaluation.context import TaskContext
from fedspeed.evaluation.item_choice import chosen_items

SOURCE = "the file of this name of the open_lm project's evaluation data (GitHub mlfoundations/open_lm)"
NOTE = "ready prompts: not comparable with published scores of lm-evaluation-harness"
ANSWER = "\nAnswer:"


@dataclass(frozen=True)
class Question:
    """A question, or the two possible beginnings of a sentence.

    Attributes:
        prompts: what precedes each choice. choices: the texts whose likelihoods are compared.
        right: number of the right one. category: the name of its task.
    """

    prompts: tuple[str, ...]
    choices: tuple[str, ...]
    right: int
    category: str


class Choices(ChoiceTask[Question]):
    """The questions of one or several files.

    Args:
        sets: names of the sets. Of several, each is a category, and a limit is that of each.

    Attributes:
        metrics: the share of questions whose right choice has the largest log-probability, and the largest
            one by character, which does not favour short choices.
    """

    metrics = ("accuracy", "accuracy_by_length")

    def __init__(self, context: TaskContext, sets: Sequence[str]):
        self.name = context.name
        self._files = {
            name: context.file(f"qa_{name}.jsonl.gz", f"qa_{name}.jsonl", source=SOURCE) for name in sets
        }

    def items(self, limit: int = 0) -> list[Question]:
        found = []
        for name, path in self._files.items():
            questions = [question(record, where, name) for where, record in records(path)]
            found += [questions[index] for index in chosen_items(len(questions), limit)]
        return found

    def files(self) -> Sequence[Path]:
        return list(self._files.values())

    def prompt(self, item: Question) -> str:
        return item.prompts[0]

    def prompts(self, item: Question) -> Sequence[str]:
        return item.prompts

    def choices(self, item: Question) -> Sequence[str]:
        return item.choices

    def category(self, item: Question) -> str:
        return item.category if len(self._files) > 1 else ""

    def describe(self) -> dict[str, Any]:
        return {"note": NOTE}

    def score(
        self, items: Sequence[Question], likelihoods: Sequence[Sequence[Likelihood]]
    ) -> list[dict[str, float]]:
        return [
            {
                "accuracy": float(most_likely(of_item) == item.right),
                "accuracy_by_length": float(_likeliest_by_length(item, of_item) == item.right),
            }
            for item, of_item in zip(items, likelihoods)
        ]


def _likeliest_by_length(item: Question, likelihoods: Sequence[Likelihood]) -> int:
    lengths = [len(choice.lstrip()) for choice in item.choices]
    values = [choice.logprob / length for choice, length in zip(likelihoods, lengths, strict=True)]
    return largest(values)


def question(record: Any, where: str, category: str) -> Question:
    """Return the question of a record: `query`, `choices` and `gold`; or `context_options`, `continuation`
    and `gold`, the number of the context that makes sense.

    Raises:
        DataError: a field is missing, or is not of its type.
    """
    try:
        right = record["gold"]
        if "context_options" in record:
            prompts = tuple(record["context_options"])
            choices = (f" {record['continuation']}",) * len(prompts)
        else:
            text = record["query"].strip()
            end = ANSWER if record["query"].endswith("\n") else ""
            choices = tuple(f" {choice}" for choice in record["choices"])
            prompts = (text + end,) * len(choices)
        if not all(isinstance(prompt, str) for prompt in prompts) or not 0 <= right < len(choices):
            raise ValueError
        if not all(choice.strip() for choice in choices):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"{where}: this is no question with choices: it needs query, choices and gold, or "
            "context_options, continuation and gold, the number of the right one; the data is "
            f"{SOURCE}"
        ) from None
    return Question(prompts, choices, right, category)


def make(context: TaskContext) -> Choices:
    """Make the task of the sets that its entry names."""
    return Choices(context, context.options["sets"])
