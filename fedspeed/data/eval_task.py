"""The interface of evaluation tasks: they make prompts of rows, and score a model's answers.

A task knows no model and no engine; `evaluation/scoring.py` evaluates it with an engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedspeed.data.rows import Row

ALL = "all"  # the category of all rows


@dataclass(frozen=True)
class Tally:
    """The sum of some rows' scores and their number, which can be added up over ranks, clients and
    categories.
    """

    total: float = 0.0
    count: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float:
        """Return the mean score, NaN without rows."""
        return self.total / self.count if self.count else float("nan")


Scores = dict[str, Tally]  # by category, and under ALL


class EvalTask(ABC):
    """A task: a prompt for each row, and a score for the answer to it.

    Attributes:
        name: of the task, in records and messages.
    """

    name: str

    @abstractmethod
    def prompt(self, row: Row) -> str:
        """Return the text before the answer, few-shot examples included. The engine computes a common
        beginning of all prompts once.
        """

    def category(self, row: Row) -> str:
        """Return the category that a row is counted in besides ALL; empty: in none."""
        return row.category


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are generated.

    Attributes:
        max_new: largest number of tokens of an answer. samples: answers to each row.
        temperature: of sampling; 0: greedy decoding. top_p: probability mass of the tokens to sample from.
        seed: of the sampling.
    """

    max_new: int
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class GenerationTask(EvalTask):
    """A task whose answers the model generates.

    Attributes:
        settings: of the generation.
    """

    settings: GenerationSettings

    @abstractmethod
    def score(self, rows: Sequence[Row], answers: Sequence[Sequence[str]]) -> Sequence[float]:
        """Return a score for each row from all answers to it. All rows are passed at once, so that slow
        scoring (in a sandbox, for example) can process them together.
        """


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a text after a prompt, and its number of tokens."""

    logprob: float
    tokens: int


class ChoiceTask(EvalTask):
    """A task whose answers are chosen from given texts, by their likelihoods under the model."""

    @abstractmethod
    def choices(self, row: Row) -> Sequence[str]:
        """Return the answers to choose from, none of them empty."""

    @abstractmethod
    def score(self, rows: Sequence[Row], likelihoods: Sequence[Sequence[Likelihood]]) -> Sequence[float]:
        """Return a score for each row from the likelihoods of its choices."""


def most_likely(likelihoods: Sequence[Likelihood], *, per_token: bool = False) -> int:
    """Return the index of the likeliest choice, the first if several are equal.

    Args:
        per_token: divide log-probabilities by the number of tokens, which favours longer choices.
    """
    values = [choice.logprob / choice.tokens if per_token else choice.logprob for choice in likelihoods]
    return values.index(max(values))


def tally(task: EvalTask, rows: Iterable[Row], values: Iterable[float]) -> Scores:
    """Return the tallies of rows' scores, of all rows and by category."""
    scores: Scores = {}
    for row, value in zip(rows, values, strict=True):
        for category in filter(None, (ALL, task.category(row))):
            scores[category] = scores.get(category, Tally()) + Tally(float(value), 1)
    return scores


def added(tables: Iterable[Mapping[str, Tally]]) -> Scores:
    """Return the sums of several tables of scores by category, of several clients for example."""
    scores: Scores = {}
    for table in tables:
        for category, one in table.items():
            scores[category] = scores.get(category, Tally()) + one
    return scores
