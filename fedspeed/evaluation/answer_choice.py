"""A task for any data that needs likelihoods only: whether a model finds a row's answer likelier than the
answers of other rows.
"""

from collections.abc import Sequence

from fedspeed.data.eval_task import ChoiceTask, Likelihood, most_likely
from fedspeed.data.rows import Row
from fedspeed.data.templates import prompt


class AnswerChoice(ChoiceTask):
    """The choices of a row are its own answer first, and then different answers of the rows that follow it in
    the data; the first row follows the last.

    Args:
        rows: whose answers are used. template: that the model was trained with. count: how many answers of
            other rows a row gets at most.
    """

    name = "answer among others"

    def __init__(self, rows: Sequence[Row], template: str, count: int = 3):
        self._template = template
        self._choices = {}
        for index, row in enumerate(rows):
            following = (rows[(index + step) % len(rows)].output for step in range(1, len(rows)))
            others = [text for text in dict.fromkeys(following) if text != row.output]
            self._choices[row] = [row.output, *others[:count]]

    def prompt(self, row: Row) -> str:
        return prompt(row, self._template)

    def choices(self, row: Row) -> list[str]:
        return self._choices[row]

    def score(self, rows: Sequence[Row], likelihoods: Sequence[Sequence[Likelihood]]) -> list[float]:
        return [float(most_likely(of_row, per_token=True) == 0) for of_row in likelihoods]
