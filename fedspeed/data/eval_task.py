"""What a model is asked about rows of text, and what its answers are worth.

A task knows no model and no engine: it makes prompts out of rows, and scores what came back.
    `evaluation/ask.py` puts it to an
engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedspeed.data.rows import Row

ALL = "all"  # the category of everything together


@dataclass(frozen=True)
class Tally:
    """Scores of some rows: their sum and their number, which can be added up over ranks, clients and
    categories.
    """

    total: float = 0.0
    count: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else float("nan")


Scores = dict[str, Tally]  # by category, and under ALL


class EvalTask(ABC):
    """Puts rows to a model as prompts.

    Attributes:
        name: in records and messages.
    """

    name: str

    @abstractmethod
    def prompt(self, row: Row) -> str:
        """Give the text in front of the answer, examples included; what all prompts begin with is computed
        once.
        """

    def category(self, row: Row) -> str:
        """Give the name under which a row is counted beside ALL; empty: under none."""
        return row.category


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How answers are generated.

    Attributes:
        max_new: tokens of an answer at most. samples: answers to each row.
        temperature: 0 takes the most likely token. top_p: of the tokens that are drawn from. seed: of the
            draws.
    """

    max_new: int
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class GenerationTask(EvalTask):
    """A model writes its answers.

    Attributes:
        asked: how.
    """

    asked: Asked

    @abstractmethod
    def score(self, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> Sequence[float]:
        """Score each row, from all answers to it. All rows come at once, so that what is slow (a sandbox,
        say) can be done for many of them together.
        """


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a text behind a prompt: log-probability of all its tokens, and their
    number.
    """

    logprob: float
    tokens: int


class ChoiceTask(EvalTask):
    """A model chooses among given answers, by how likely it finds each of them."""

    @abstractmethod
    def choices(self, row: Row) -> Sequence[str]:
        """Give the answers to choose from, none of them empty."""

    @abstractmethod
    def score(self, rows: Sequence[Row], likelihoods: Sequence[Sequence[Likelihood]]) -> Sequence[float]:
        """Score each row, from the likelihoods of its choices."""


def most_likely(likelihoods: Sequence[Likelihood], *, per_token: bool = False) -> int:
    """Give the number of the likeliest choice, the first of several; `per_token` divides by length, which
    long ones gain by.
    """
    values = [one.logprob / one.tokens if per_token else one.logprob for one in likelihoods]
    return values.index(max(values))


def tally(task: EvalTask, rows: Iterable[Row], values: Iterable[float]) -> Scores:
    """Count the scores of rows, in all and by category."""
    scores: Scores = {}
    for row, value in zip(rows, values, strict=True):
        for category in filter(None, (ALL, task.category(row))):
            scores[category] = scores.get(category, Tally()) + Tally(float(value), 1)
    return scores


def added(parts: Iterable[Mapping[str, Tally]]) -> Scores:
    """Add up scores by category, those of several clients for example."""
    scores: Scores = {}
    for part in parts:
        for category, one in part.items():
            scores[category] = scores.get(category, Tally()) + one
    return scores
