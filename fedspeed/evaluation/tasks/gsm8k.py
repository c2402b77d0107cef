"""GSM8K: word problems of grade-school mathematics, whose answers are compared as numbers."""

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from fedspeed.data.eval_task import GenerationSettings, GenerationTask
from fedspeed.data.formats import Fields
from fedspeed.data.read import Layout, read_rows
from fedspeed.data.rows import Row
from fedspeed.errors import DataError
from fedspeed.evaluation.context import TaskContext
from fedspeed.evaluation.item_choice import chosen_items
from fedspeed.evaluation.number_answers import extract_number, same_number
from fedspeed.evaluation.tasks.gsm8k_prompt import few_shot_prompt

FILES = ("gsm8k_test.jsonl.gz", "gsm8k_test.jsonl")
SOURCE = "grade_school_math/data/test.jsonl in the GitHub repository openai/grade-school-math"
MAX_NEW = 256
NEXT_QUESTION = "\nQ:"
RESULT = "####"  # stands before the result of a solution


class GSM8K(GenerationTask[Row]):
    """The questions of the test set.

    Args:
        few_shot: whether eight worked examples precede each question, as text; otherwise the question is put
            through the model's own template, as in training.
    """

    def __init__(self, context: TaskContext, *, few_shot: bool):
        self.name = context.name
        self._file = context.file(*FILES, source=SOURCE)
        self._few_shot = few_shot
        samples = context.samples or 1
        self.settings = GenerationSettings(
            max_new=MAX_NEW,
            samples=samples,
            temperature=0.0 if samples == 1 else 0.7,
            stop_texts=(NEXT_QUESTION,) if few_shot else (),
        )

    def items(self, limit: int = 0) -> list[Row]:
        fields = Fields(instruction="question", input="", output="answer", category="")
        rows = read_rows(self._file, Layout(fields))
        for where, row in rows:
            if RESULT not in row.output or expected_number(row) is None:
                raise DataError(
                    f"{where}: the answer has no line '{RESULT} number', so this is not a row of GSM8K; the "
                    f"test set is {SOURCE}"
                )
        return [rows[index][1] for index in chosen_items(len(rows), limit)]

    def files(self) -> Sequence[Path]:
        return [self._file]

    def prompt(self, item: Row) -> str | Row:
        return few_shot_prompt(item.instruction) if self._few_shot else item

    def score(self, items: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[float]:
        return [
            sum(same_number(answer, expected_number(row)) for answer in of_row) / len(of_row)
            for row, of_row in zip(items, answers)
        ]


def expected_number(row: Row) -> Decimal | None:
    """Return the number behind "####" in a row's solution; None if there is none."""
    return extract_number(row.output.partition(RESULT)[2])


def make(context: TaskContext) -> GSM8K:
    """Make the task. Greedy decoding, or samples at temperature 0.7 where several were asked for."""
    return GSM8K(context, few_shot=context.options["few_shot"])
