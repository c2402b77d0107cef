"""Put a task to an engine: prompts in, scores out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedspeed import activity
from fedspeed.data.encode import asked_ids, text_ids
from fedspeed.data.eval_task import ChoiceTask, EvalTask, GenerationTask, Likelihood, Scores, tally
from fedspeed.data.rows import Row
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.errors import DataError


def ask(engine: ClientEngine, task: EvalTask, rows: Sequence[Row], tokenizer: Any) -> Scores:
    """Score the model in client slot 0 of an engine on some rows.

    Collective over the ranks of the client, which all have the same rows, and over the ranks that share the
    base, which all call it equally often.

    Returns:
        Scores by category, on the first rank of the client; none on its others. So they can be added up over
        ranks.

    Raises:
        ModelError: a prompt, with what is asked for, is longer than the model has positions.
        DataError: a choice is empty.
    """
    with activity.during(f"the evaluation on {task.name}", len(rows), "row"):
        if isinstance(task, GenerationTask):
            found = generate(engine, task, rows, tokenizer)
        elif isinstance(task, ChoiceTask):
            found = choose(engine, task, rows, tokenizer)
        else:
            raise TypeError(f"{type(task).__name__} is neither a GenerationTask nor a ChoiceTask")
        if engine.groups.client_rank:
            return {}
        return tally(task, rows, task.score(rows, found))


def generate(
    engine: ClientEngine, task: GenerationTask, rows: Sequence[Row], tokenizer: Any
) -> list[list[str]]:
    """Let the model answer each row; its answers as text, without special tokens."""
    asked = task.asked
    prompts = [np.array(asked_ids(task.prompt(row), tokenizer), dtype=np.int64) for row in rows]
    answers = engine.generate(
        prompts,
        max_new=asked.max_new,
        temperature=asked.temperature,
        top_p=asked.top_p,
        n=asked.samples,
        seed=asked.seed,
        stop=[tokenizer.eos_token_id],
    )
    return [
        [tokenizer.decode(tokens.tolist(), skip_special_tokens=True) for tokens in samples]
        for samples in answers
    ]


def choose(
    engine: ClientEngine, task: ChoiceTask, rows: Sequence[Row], tokenizer: Any
) -> list[list[Likelihood]]:
    """Find how likely the model finds each choice of each row; a prompt is computed once for all of its
    choices.
    """
    sequences = []
    spans = []
    counts = []
    for row in rows:
        prompt = asked_ids(task.prompt(row), tokenizer)
        choices = [text_ids(text, tokenizer) for text in task.choices(row)]
        if not all(choices) or not choices:
            raise DataError(
                f"{task.name}: a row whose prompt is {task.prompt(row)[-60:]!r} has no choices, or an empty "
                "one; "
                "give it some text each"
            )
        sequences += [np.array([*prompt, *choice], dtype=np.int64) for choice in choices]
        spans += [(len(prompt), len(prompt) + len(choice)) for choice in choices]
        counts.append(len(choices))
    values = engine.logprobs(sequences, spans)
    likelihoods = [Likelihood(float(own.sum(dtype=np.float64)), len(own)) for own in values]
    ends = np.cumsum([0, *counts])
    return [likelihoods[start:end] for start, end in zip(ends, ends[1:])]
