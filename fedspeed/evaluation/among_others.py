"""Whether a model finds a row's answer likelier than the answers of other rows: defined for any data, and by
likelihood alone.
"""

from collections.abc import Sequence

from fedspeed.data.eval_task import ChoiceTask, Likelihood, most_likely
from fedspeed.data.rows import Row
from fedspeed.data.templates import prompt


class AmongOthers(ChoiceTask):
    """Gives each row its own answer, and those of the rows behind it (the first ones after the last), each
    text once.

    Args:
        rows: that answers are taken from. count: of the others' answers. template: that the model was trained
            with.
    """

    name = "answer among others"

    def __init__(self, rows: Sequence[Row], template: str, count: int = 3):
        self._template = template
        self._choices = {}
        for at, row in enumerate(rows):
            behind = (rows[(at + step) % len(rows)].output for step in range(1, len(rows)))
            others = [text for text in dict.fromkeys(behind) if text != row.output]
            self._choices[row] = [row.output, *others[:count]]

    def prompt(self, row: Row) -> str:
        return prompt(row, self._template)

    def choices(self, row: Row) -> list[str]:
        return self._choices[row]

    def score(self, rows: Sequence[Row], likelihoods: Sequence[Sequence[Likelihood]]) -> list[float]:
        return [float(most_likely(some, per_token=True) == 0) for some in likelihoods]
