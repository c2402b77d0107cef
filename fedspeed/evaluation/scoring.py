"""The scores of an evaluation task: prompts for an engine, and what its answers are worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fedspeed import activity
from fedspeed.data.batches import eval_batches
from fedspeed.data.encode import Tokenizer, prompt_text_ids, text_ids
from fedspeed.data.eval_task import (
    ALL,
    ChoiceTask,
    EvalTask,
    GenerationSettings,
    GenerationTask,
    Likelihood,
    LossTask,
    Scores,
    Tally,
    by_metric,
)
from fedspeed.data.prompt_template import PromptTemplate
from fedspeed.data.rows import Row
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.errors import DataError
from fedspeed.evaluation.answer_end import end_check, ended
from fedspeed.files import json_number


@dataclass(frozen=True)
class ScoredItem:
    """What a model answered to one item.

    Attributes:
        prompt: as text. category: of the item, or empty.
        texts: what `kind` says: the answers that were generated, the choices, or the expected answer.
        tallies: of the item, by metric.
        logprobs: of the choices.
    """

    prompt: str
    category: str
    texts: tuple[str, ...]
    tallies: Mapping[str, Tally]
    kind: Literal["answers", "choices", "expected"] = "answers"
    logprobs: tuple[float, ...] = ()

    def to_json(self, index: int) -> dict[str, Any]:
        """Return the item for a line of JSON.

        Args:
            index: of the item in the task.
        """
        values: dict[str, Any] = {"index": index, "category": self.category, "prompt": self.prompt}
        values[self.kind] = list(self.texts)
        if self.logprobs:
            values["logprobs"] = list(map(json_number, self.logprobs))
        return values | {"scores": {name: json_number(tally.mean) for name, tally in self.tallies.items()}}


@dataclass(frozen=True)
class TaskScores:
    """The result of a task on some items.

    Attributes:
        metrics: scores by category, for each metric; the main one is first.
        items: what the model answered, in the order of the items.
    """

    metrics: Mapping[str, Scores] = field(default_factory=dict)
    items: Sequence[ScoredItem] = ()

    @property
    def main(self) -> Scores:
        """Return the scores of the main metric by category; empty if there are none."""
        return next(iter(self.metrics.values()), {})


def score_task(
    engine: ClientEngine,
    task: EvalTask,
    items: Sequence[Any],
    *,
    tokenizer: Tokenizer,
    template: PromptTemplate,
) -> TaskScores:
    """Score the model in client slot 0 of an engine on some items of a task.

    Collective over the ranks of the client, which all pass the same items, and over the ranks that share the
    base, which all call it equally often, with any number of items.

    Args:
        template: of the model, for prompts that are rows.

    Returns:
        The scores on the first rank of the client, and nothing on its others, so that scores can be added up
        over ranks.

    Raises:
        ModelError: a prompt with its answer is longer than the model has positions.
        DataError: a choice is empty.
    """
    model = _Model(engine, tokenizer, template)
    if isinstance(task, GenerationTask):
        scored = _generated(model, task, items)
    elif isinstance(task, ChoiceTask):
        scored = _chosen(model, task, items)
    elif isinstance(task, LossTask):
        scored = _losses(model, task, items)
    else:
        raise TypeError(f"{type(task).__name__} is no GenerationTask, ChoiceTask or LossTask")
    if engine.groups.client_rank:
        return TaskScores()
    return TaskScores({metric: _by_category(scored, metric) for metric in task.metrics}, scored)


def _by_category(items: Sequence[ScoredItem], metric: str) -> Scores:
    scores: Scores = {}
    for item in items:
        for category in filter(None, (ALL, item.category)):
            scores[category] = scores.get(category, Tally()) + item.tallies[metric]
    return scores


@dataclass(frozen=True)
class _Model:
    """An engine with the tokenizer and the template of its model."""

    engine: ClientEngine
    tokenizer: Tokenizer
    template: PromptTemplate

    def prompt_ids(self, prompt: str | Row) -> list[int]:
        if isinstance(prompt, Row):
            return self.template.prompt_ids(prompt)
        return prompt_text_ids(prompt, self.tokenizer)

    def choice_ids(self, prompt: str | Row, text: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt, and those of a choice that follows it.

        A choice after a row's prompt is tokenized on its own, as an answer is in training; one after a text
        together with it, as lm-evaluation-harness does, since some tokenizers divide a text in its middle
        otherwise than at its beginning.
        """
        before = self.prompt_ids(prompt)
        if isinstance(prompt, Row):
            return before, text_ids(text, self.tokenizer)
        after = self.prompt_ids(prompt + text)[len(before) :]
        return before, after or text_ids(text, self.tokenizer)

    def prompt_text(self, prompt: str | Row) -> str:
        return self.template.prompt_text(prompt) if isinstance(prompt, Row) else prompt


def _generated(model: _Model, task: GenerationTask, items: Sequence[Any]) -> list[ScoredItem]:
    prompts = [task.prompt(item) for item in items]
    with activity.during(f"the evaluation on {task.name}", len(items), "item"):
        answers = generated_answers(model.engine, task.settings, prompts, model.tokenizer, model.template)
    if model.engine.groups.client_rank:  # scoring may run the answers: once is enough
        return []
    return [
        ScoredItem(model.prompt_text(prompt), task.category(item), tuple(texts), _tallies(task, score))
        for item, prompt, texts, score in zip(
            items, prompts, answers, task.score(items, answers), strict=True
        )
    ]


def _tallies(task: EvalTask, score: float | Mapping[str, float]) -> dict[str, Tally]:
    return {name: Tally.of([value]) for name, value in by_metric(task, score).items()}


def generated_answers(
    engine: ClientEngine,
    settings: GenerationSettings,
    prompts: Sequence[str | Row],
    tokenizer: Tokenizer,
    template: PromptTemplate,
) -> list[list[str]]:
    """Return the answers that the model generates to each prompt, as text without special tokens, each ended
    before the first of the stop texts.
    """
    model = _Model(engine, tokenizer, template)
    answers = engine.generate(
        [np.array(model.prompt_ids(prompt), dtype=np.int64) for prompt in prompts],
        max_new=settings.max_new,
        temperature=settings.temperature,
        top_p=settings.top_p,
        n=settings.samples,
        seed=settings.seed,
        stop=sorted({tokenizer.eos_token_id, *template.stop_ids}),
        is_done=end_check(tokenizer, settings),
    )
    return [
        [ended(tokenizer.decode(tokens.tolist(), skip_special_tokens=True), settings) for tokens in samples]
        for samples in answers
    ]


def _chosen(model: _Model, task: ChoiceTask, items: Sequence[Any]) -> list[ScoredItem]:
    prompts = [task.prompt(item) for item in items]
    choices = [task.choices(item) for item in items]
    for prompt, texts in zip(prompts, choices):
        if not all(texts) or not texts:
            raise DataError(
                f"{task.name}: an item whose prompt is {model.prompt_text(prompt)[-60:]!r} has no choices, "
                "or an empty one; give it some text each"
            )
    pairs = [list(zip(task.prompts(item), texts, strict=True)) for item, texts in zip(items, choices)]
    with activity.during(f"the evaluation on {task.name}", sum(map(len, pairs)), "choice"):
        likelihoods = choice_likelihoods(model.engine, pairs, model.tokenizer, model.template)
    return [
        ScoredItem(
            model.prompt_text(prompt),
            task.category(item),
            tuple(texts),
            _tallies(task, score),
            kind="choices",
            logprobs=tuple(choice.logprob for choice in of_item),
        )
        for item, prompt, texts, of_item, score in zip(
            items, prompts, choices, likelihoods, task.score(items, likelihoods), strict=True
        )
    ]


def choice_likelihoods(
    engine: ClientEngine,
    choices: Sequence[Sequence[tuple[str | Row, str]]],
    tokenizer: Tokenizer,
    template: PromptTemplate,
) -> list[list[Likelihood]]:
    """Return the likelihoods of each item's choices, (prompt, text that is not empty). The engine computes a
    prompt once for all choices that follow it.
    """
    model = _Model(engine, tokenizer, template)
    sequences = []
    spans = []
    for prompt, text in (pair for of_item in choices for pair in of_item):
        before, after = model.choice_ids(prompt, text)
        sequences.append(np.array([*before, *after], dtype=np.int64))
        spans.append((len(before), len(before) + len(after)))
    logprobs = engine.logprobs(sequences, spans)
    likelihoods = [Likelihood(float(values.sum(dtype=np.float64)), len(values)) for values in logprobs]
    ends = np.cumsum([0, *map(len, choices)])
    return [likelihoods[start:end] for start, end in zip(ends, ends[1:])]


def _losses(model: _Model, task: LossTask, items: Sequence[Row]) -> list[ScoredItem]:
    """Compute the loss of each row on its own, in a batch of one, so that its sums are known."""
    engine = model.engine
    pad_id = model.tokenizer.pad_token_id
    encoded = [model.template.encode(item).examples for item in items]
    rows = [(row, examples) for row, examples in zip(items, encoded) if examples]
    # A pad token may lie beyond the model's vocabulary; a batch of one sequence needs no padding.
    work = [
        [batch for one in examples for batch in eval_batches([one], 1, min(pad_id, int(one.input_ids.max())))]
        for _, examples in rows
    ]
    shares, share = engine.data_share
    own = work[share::shares]
    table = np.zeros((len(work), 4))
    name = f"the evaluation on {task.name}"
    with (
        activity.during(name, sum(map(len, own)), "row"),
        engine.matched_passes(engine.eval_passes(own), backward=False),
    ):
        for index, sums in enumerate(engine.evaluate(own)):
            table[share + index * shares] = (sums.loss, sums.tokens, sums.exact, sums.rows)
    table = engine.sum_over_client(table.reshape(-1)).reshape(table.shape)  # other ranks of a pipeline have 0
    return [
        ScoredItem(
            model.template.prompt_text(row),
            task.category(row),
            (row.output,),
            {
                "loss": Tally.of_sum(float(loss), float(tokens)),
                "exact": Tally.of_sum(float(exact), float(count)),
            },
            kind="expected",
        )
        for (row, _), (loss, tokens, exact, count) in zip(rows, table)
    ]
