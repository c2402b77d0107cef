"""Whether the model's generated answer to a held-out row equals the row's own."""

from collections.abc import Mapping, Sequence

from fedspeed.data.eval_task import GenerationSettings, GenerationTask
from fedspeed.data.rows import Row
from fedspeed.evaluation.context import TaskContext
from fedspeed.evaluation.held_out_rows import held_out_digests, held_out_rows


class ExactMatch(GenerationTask[Row]):
    """The score of a row is the share of generated answers that equal its own, ignoring space around them.

    Args:
        settings: of the generation.
    """

    name = "exact_match"

    def __init__(self, context: TaskContext, settings: GenerationSettings):
        self._context = context
        self.settings = settings

    def items(self, limit: int = 0) -> list[Row]:
        return held_out_rows(self._context, limit)

    def digests(self) -> Mapping[str, str]:
        return held_out_digests(self._context)

    def prompt(self, item: Row) -> Row:
        return item

    def score(self, items: Sequence[Row], answers: Sequence[Sequence[str]]) -> list[float]:
        return [
            sum(answer.strip() == row.output.strip() for answer in of_row) / len(of_row)
            for row, of_row in zip(items, answers)
        ]


def make(context: TaskContext) -> ExactMatch:
    """Make the task: greedy decoding, or samples at temperature 0.7 where several were asked for."""
    samples = context.samples or 1
    settings = GenerationSettings(max_new=256, samples=samples, temperature=0.0 if samples == 1 else 0.7)
    return ExactMatch(context, settings)
