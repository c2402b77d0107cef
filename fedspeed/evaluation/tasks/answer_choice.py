"""Whether a model finds a held-out row's answer likelier than the answers of other rows. It needs likelihoods
only, so it suits any data.
"""

from collections.abc import Mapping, Sequence

from fedspeed.data.eval_task import ChoiceTask, Likelihood, most_likely
from fedspeed.data.rows import Row
from fedspeed.evaluation.context import TaskContext
from fedspeed.evaluation.held_out_rows import held_out_digests, held_out_rows


class AnswerChoice(ChoiceTask[Row]):
    """The choices of a row are its own answer first, and then different answers of the rows that follow it in
    the data; the first row follows the last.

    Args:
        count: how many answers of other rows a row gets at most.
    """

    name = "answer_choice"

    def __init__(self, context: TaskContext, count: int = 3):
        self._context = context
        self._count = count
        self._choices: dict[Row, list[str]] = {}

    def items(self, limit: int = 0) -> list[Row]:
        rows = held_out_rows(self._context, limit)
        for index, row in enumerate(rows):
            following = (rows[(index + step) % len(rows)].output for step in range(1, len(rows)))
            others = [text for text in dict.fromkeys(following) if text != row.output]
            self._choices[row] = [row.output, *others[: self._count]]
        return rows

    def digests(self) -> Mapping[str, str]:
        return held_out_digests(self._context)

    def prompt(self, item: Row) -> Row:
        return item

    def choices(self, item: Row) -> list[str]:
        return self._choices[item]

    def score(self, items: Sequence[Row], likelihoods: Sequence[Sequence[Likelihood]]) -> list[float]:
        return [float(most_likely(of_row, per_token=True) == 0) for of_row in likelihoods]


def make(context: TaskContext) -> AnswerChoice:
    """Make the task."""
    return AnswerChoice(context)
