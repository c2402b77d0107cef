"""A task that generates: whether a model's answer equals the row's answer exactly."""

from collections.abc import Sequence

from fedspeed.data.eval_task import GenerationSettings, GenerationTask
from fedspeed.data.rows import Row
from fedspeed.data.templates import prompt


class ExactMatch(GenerationTask):
    """The score of a row is the share of generated answers that equal its own, ignoring space around them.

    Args:
        template: of data.templates, that the model was trained with. settings: of the generation.
    """

    name = "exact match"

    def __init__(self, template: str, settings: GenerationSettings):
        self._template = template
        self.settings = settings

    def prompt(self, row: Row) -> str:
        return prompt(row, self._template)

    def score(self, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[float]:
        return [
            sum(answer.strip() == row.output.strip() for answer in of_row) / len(of_row)
            for row, of_row in zip(rows, answers)
        ]
