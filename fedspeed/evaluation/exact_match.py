"""Whether a model writes a row's answer exactly."""

from collections.abc import Sequence

from fedspeed.data.eval_task import Asked, GenerationTask
from fedspeed.data.rows import Row
from fedspeed.data.templates import prompt


class ExactMatch(GenerationTask):
    """Scores a row by the share of its answers that are its own, but for space around them.

    Args:
        template: of data.templates, that the model was trained with. asked: how it answers.
    """

    name = "exact match"

    def __init__(self, template: str, asked: Asked):
        self._template = template
        self.asked = asked

    def prompt(self, row: Row) -> str:
        return prompt(row, self._template)

    def score(self, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[float]:
        return [
            sum(answer.strip() == row.output.strip() for answer in some) / len(some)
            for row, some in zip(rows, answers)
        ]
