"""The interface of evaluation tasks: they bring their own items, make prompts of them, and score a model's
answers.

A task knows no model and no engine; `evaluation/scoring.py` evaluates it with an engine.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fedspeed.data.rows import Row
from fedspeed.files import sha256_of

ALL = "all"  # the category of all items
Item = TypeVar("Item")
ItemScore = float | Mapping[str, float]  # one score, or several by the names in `EvalTask.metrics`


@dataclass(frozen=True)
class Tally:
    """Sums over the scores of some items, from which their mean and its interval follow. Tallies can be added
    up over ranks, clients and categories.

    Attributes:
        items: number of items. total: sum of the scores, each times its weight.
        weight: sum of the weights; a weight is 1 unless the task says otherwise (tokens, for a loss).
        squares, cross, weight_squares: sums of the squares of weighted scores, of weighted scores times
            weights, and of the squares of weights.
    """

    items: int = 0
    total: float = 0.0
    weight: float = 0.0
    squares: float = 0.0
    cross: float = 0.0
    weight_squares: float = 0.0

    @staticmethod
    def of(scores: Iterable[float]) -> "Tally":
        """Return the tally of scores of weight 1."""
        return sum((Tally.of_sum(float(score), 1.0) for score in scores), Tally())

    @staticmethod
    def of_sum(total: float, weight: float) -> "Tally":
        """Return the tally of one item, of a weight and the sum of so much (a loss over tokens)."""
        return Tally(1, total, weight, squares=total**2, cross=total * weight, weight_squares=weight**2)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.items + other.items,
            self.total + other.total,
            self.weight + other.weight,
            squares=self.squares + other.squares,
            cross=self.cross + other.cross,
            weight_squares=self.weight_squares + other.weight_squares,
        )

    @property
    def mean(self) -> float:
        """Return the mean score, NaN without items."""
        return self.total / self.weight if self.weight else float("nan")


Scores = dict[str, Tally]  # by category, and under ALL


class EvalTask(ABC, Generic[Item]):
    """A task: its items, a prompt for each of them, and a score for the answer to it.

    Attributes:
        name: of the task, in records and messages.
        metrics: names of its scores, the main one first.
    """

    name: str
    metrics: tuple[str, ...] = ("accuracy",)

    @abstractmethod
    def items(self, limit: int = 0) -> Sequence[Item]:
        """Load the task's data, and return its items in a fixed order, the first `limit` of them where that
        is above 0.

        Raises:
            DataError: the data is absent, with what to do about it; or it is malformed.
        """

    @abstractmethod
    def prompt(self, item: Item) -> str | Row:
        """Return what precedes the answer: a text that goes to the model as it is, few-shot examples
        included, or a row that is put through the model's own template. The engine computes a common
        beginning of all prompts once.
        """

    def category(self, item: Item) -> str:
        """Return the category that an item is counted in besides ALL; empty: in none."""
        return item.category if isinstance(item, Row) else ""

    def files(self) -> Sequence[Path]:
        """Return the data files that the items were read from, whose digests are part of a result."""
        return ()

    def digests(self) -> Mapping[str, str]:
        """Return the SHA-256 of the task's data by name: that of each of its files."""
        return {path.name: sha256_of(path) for path in self.files()}

    def describe(self) -> dict[str, Any]:
        """Return the settings of the task for its result, as JSON values."""
        return {}


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are generated.

    Attributes:
        max_new: largest number of tokens of an answer. samples: answers to each item.
        temperature: of sampling; 0: greedy decoding. top_p: probability mass of the tokens to sample from.
        seed: of the sampling.
        stop_texts: an answer ends before the first of these texts that it contains.
        ends_with_brace: whether it also ends behind the brace that closes the block in which it begins.
    """

    max_new: int
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_texts: tuple[str, ...] = ()
    ends_with_brace: bool = False


class GenerationTask(EvalTask[Item]):
    """A task whose answers the model generates.

    Attributes:
        settings: of the generation.
    """

    settings: GenerationSettings

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Sequence[Sequence[str]]) -> Sequence[ItemScore]:
        """Return a score for each item from all answers to it. All items are passed at once, so that slow
        scoring (in a sandbox, for example) can process them together.
        """

    def describe(self) -> dict[str, Any]:
        settings = asdict(self.settings)
        return {**settings, "stop_texts": list(self.settings.stop_texts)}


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a text after a prompt, and its number of tokens."""

    logprob: float
    tokens: int


class ChoiceTask(EvalTask[Item]):
    """A task whose answers are chosen from given texts, by their likelihoods under the model."""

    @abstractmethod
    def choices(self, item: Item) -> Sequence[str]:
        """Return the answers to choose from, none of them empty."""

    def prompts(self, item: Item) -> Sequence[str | Row]:
        """Return the prompt of each choice, which is the item's prompt unless the choices differ in what
        precedes the same continuation.
        """
        return [self.prompt(item)] * len(self.choices(item))

    @abstractmethod
    def score(
        self, items: Sequence[Item], likelihoods: Sequence[Sequence[Likelihood]]
    ) -> Sequence[ItemScore]:
        """Return a score for each item from the likelihoods of its choices."""


class LossTask(EvalTask[Row]):
    """A task that needs no scoring of its own: the loss of each row's answer per token (nats), and whether
    greedy decoding reproduces the answer exactly.
    """

    metrics = ("loss", "exact")

    def prompt(self, item: Row) -> Row:
        return item


def most_likely(likelihoods: Sequence[Likelihood], *, per_token: bool = False) -> int:
    """Return the index of the likeliest choice, the first if several are equal; -1 if the likelihood of one
    is NaN.

    Args:
        per_token: divide log-probabilities by the number of tokens, which favours longer choices.
    """
    values = [choice.logprob / choice.tokens if per_token else choice.logprob for choice in likelihoods]
    return largest(values)


def largest(values: Sequence[float]) -> int:
    """Return the index of the largest value, the first if several are equal; -1 if one is NaN."""
    return -1 if any(map(math.isnan, values)) else values.index(max(values))


def by_metric(task: EvalTask, score: ItemScore) -> dict[str, float]:
    """Return an item's scores by name, in the order of the task's metrics.

    Raises:
        ValueError: the names are not those of the task.
    """
    if not isinstance(score, Mapping):
        return {task.metrics[0]: float(score)}
    if set(score) != set(task.metrics):
        raise ValueError(f"{task.name} has scores {sorted(score)}, but its metrics are {task.metrics}")
    return {name: float(score[name]) for name in task.metrics}


def added(tables: Iterable[Mapping[str, Tally]]) -> Scores:
    """Return the sums of several tables of scores by category, of several clients for example."""
    scores: Scores = {}
    for table in tables:
        for category, one in table.items():
            scores[category] = scores.get(category, Tally()) + one
    return scores
