"""The scores of a task: prompts for an engine, and what its answers are worth."""

from collections.abc import Sequence

import numpy as np

from fedspeed import activity
from fedspeed.data.encode import Tokenizer, prompt_text_ids, text_ids
from fedspeed.data.eval_task import ChoiceTask, EvalTask, GenerationTask, Likelihood, Scores, tally
from fedspeed.data.rows import Row
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.errors import DataError


def score_task(engine: ClientEngine, task: EvalTask, rows: Sequence[Row], tokenizer: Tokenizer) -> Scores:
    """Score the model in client slot 0 of an engine on some rows.

    Collective over the ranks of the client, which all pass the same rows, and over the ranks that share the
    base, which all call it equally often.

    Returns:
        Scores by category on the first rank of the client, and none on its others, so that scores can be
        added up over ranks.

    Raises:
        ModelError: a prompt with its answer is longer than the model has positions.
        DataError: a choice is empty.
    """
    with activity.during(f"the evaluation on {task.name}", len(rows), "row"):
        is_first_rank = engine.groups.client_rank == 0
        if isinstance(task, GenerationTask):
            answers = generated_answers(engine, task, rows, tokenizer)
            return tally(task, rows, task.score(rows, answers)) if is_first_rank else {}
        if isinstance(task, ChoiceTask):
            likelihoods = choice_likelihoods(engine, task, rows, tokenizer)
            return tally(task, rows, task.score(rows, likelihoods)) if is_first_rank else {}
        raise TypeError(f"{type(task).__name__} is neither a GenerationTask nor a ChoiceTask")


def generated_answers(
    engine: ClientEngine, task: GenerationTask, rows: Sequence[Row], tokenizer: Tokenizer
) -> list[list[str]]:
    """Return the answers that the model generates to each row, as text without special tokens."""
    settings = task.settings
    prompts = [np.array(prompt_text_ids(task.prompt(row), tokenizer), dtype=np.int64) for row in rows]
    answers = engine.generate(
        prompts,
        max_new=settings.max_new,
        temperature=settings.temperature,
        top_p=settings.top_p,
        n=settings.samples,
        seed=settings.seed,
        stop=[tokenizer.eos_token_id],
    )
    return [
        [tokenizer.decode(tokens.tolist(), skip_special_tokens=True) for tokens in samples]
        for samples in answers
    ]


def choice_likelihoods(
    engine: ClientEngine, task: ChoiceTask, rows: Sequence[Row], tokenizer: Tokenizer
) -> list[list[Likelihood]]:
    """Return the likelihoods of each row's choices. The engine computes a prompt once for all of its choices.

    Raises:
        DataError: a row has no choices, or an empty one.
    """
    sequences = []
    spans = []
    counts = []
    for row in rows:
        prompt = prompt_text_ids(task.prompt(row), tokenizer)
        choices = [text_ids(text, tokenizer) for text in task.choices(row)]
        if not all(choices) or not choices:
            raise DataError(
                f"{task.name}: a row whose prompt is {task.prompt(row)[-60:]!r} has no choices, or an empty "
                "one; give it some text each"
            )
        sequences += [np.array([*prompt, *choice], dtype=np.int64) for choice in choices]
        spans += [(len(prompt), len(prompt) + len(choice)) for choice in choices]
        counts.append(len(choices))
    logprobs = engine.logprobs(sequences, spans)
    likelihoods = [Likelihood(float(values.sum(dtype=np.float64)), len(values)) for values in logprobs]
    ends = np.cumsum([0, *counts])
    return [likelihoods[start:end] for start, end in zip(ends, ends[1:])]
