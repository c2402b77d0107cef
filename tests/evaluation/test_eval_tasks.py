"""Tasks and their scores, with a fake engine and with a real one."""

import importlib
import importlib.util
import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.data.config import DataConfig
from fedspeed.data.eval_task import (
    ALL,
    ChoiceTask,
    GenerationSettings,
    Likelihood,
    Tally,
    added,
    by_metric,
    most_likely,
)
from fedspeed.data.prompt_template import template_for
from fedspeed.data.rows import Row
from fedspeed.errors import ConfigError, DataError
from fedspeed.evaluation.answer_end import before_stop_text
from fedspeed.evaluation.config import EVAL_TASKS, EvalTaskEntry
from fedspeed.evaluation.context import TaskContext, make_task
from fedspeed.evaluation.scoring import score_task
from fedspeed.evaluation.tasks.answer_choice import AnswerChoice
from fedspeed.evaluation.tasks.exact_match import ExactMatch
from fedspeed.evaluation.tasks.held_out import HeldOutLoss
from tests.page_examples import code_of
from tests.processes import run_clusters
from tests.tiny import write_llama

ROWS = [
    Row("reverse", "dabe", "ebad", "reverse"),
    Row("copy", "dabe", "dabe", "copy"),
    Row("copy", "fade", "fade", "copy"),
    Row("last", "fade", "e", ""),
    Row("double", "ab", "aabb", "double"),
    Row("reverse", "ab", "ba", "reverse"),
]


class FakeEngine:
    """An engine that answers a prompt with its last characters, reversed, and gives texts a high likelihood
    that contain many of 'd'.
    """

    def __init__(self, tokenizer, client_rank=0):
        self.tokenizer = tokenizer
        self.groups = SimpleNamespace(client_rank=client_rank)

    def generate(self, prompts, *, max_new, n, stop, is_done, **settings):
        assert (
            is_done is None
            and stop == [self.tokenizer.eos_token_id]
            and settings == {"temperature": 0.5, "top_p": 0.9, "seed": 4}
        )
        texts = [self.tokenizer.decode(prompt.tolist()).strip()[-4:][::-1] for prompt in prompts]
        return [
            [
                np.array(self.tokenizer(text + " " * sample, add_special_tokens=False).input_ids)
                for sample in range(n - 1)
            ]
            + [np.array([7])]
            for text in texts
        ]

    def logprobs(self, tokens, spans):
        letter = self.tokenizer("d", add_special_tokens=False).input_ids[0]
        return [
            np.where(own[a:b] == letter, -0.5, -2.0).astype(np.float32) for own, (a, b) in zip(tokens, spans)
        ]


@pytest.fixture(scope="module")
def tokenizer():
    from fedspeed.models.config import ModelConfig
    from fedspeed.models.tokenizer import load_tokenizer

    return load_tokenizer(ModelConfig(tokenizer="bytes"))


def score(engine, task, items, tokenizer):
    return score_task(
        engine,
        task,
        items,
        tokenizer=tokenizer,
        template=template_for(DataConfig(template="plain", max_tokens=64), tokenizer),
    )


@pytest.fixture
def context(tmp_path):
    """The context of tasks whose held-out rows are ROWS."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(asdict(row)) for row in ROWS))
    return TaskContext(name="held_out", held_out=path, data=DataConfig(task="file"))


def test_tallies_add_up():
    assert Tally.of([1, 0, 0.5]) + Tally.of([1]) == Tally.of([1, 0, 0.5, 1])
    assert Tally.of([1, 0.5]).mean == 0.75 and np.isnan(Tally().mean)
    assert (Tally.of_sum(6.0, 3) + Tally.of_sum(2.0, 1)).mean == 2.0
    table = {ALL: Tally.of([1, 0])}
    assert added([table, {}, {ALL: Tally.of([1]), "new": Tally.of([1])}]) == {
        ALL: Tally.of([1, 0, 1]),
        "new": Tally.of([1]),
    }


def test_a_task_has_the_scores_that_it_names():
    class Several(ExactMatch):
        metrics = ("pass@1", "pass@2")

    task = Several(TaskContext(name="several"), GenerationSettings(max_new=4))
    assert by_metric(task, {"pass@2": 1, "pass@1": 0.5}) == {"pass@1": 0.5, "pass@2": 1.0}
    with pytest.raises(ValueError, match="metrics are"):
        by_metric(task, {"pass@1": 1})


def test_an_unknown_task_is_refused_with_similar_names():
    with pytest.raises(ConfigError, match="'exactmatch' is no evaluation task; did you mean exact_match"):
        make_task(TaskContext(name="exactmatch"))


@pytest.mark.parametrize("name", EVAL_TASKS)
def test_every_registered_task_defines_make(name):
    assert callable(importlib.import_module(EVAL_TASKS[name].module).make)


def test_an_answer_ends_before_the_first_stop_text():
    assert before_stop_text("a Q: b\n", ("\n", "Q:")) == "a " and before_stop_text("a", ("b",)) == "a"


def test_the_likeliest_choice_may_be_so_by_token():
    some = [Likelihood(-4.0, 2), Likelihood(-3.0, 1), Likelihood(-3.0, 1), Likelihood(-5.0, 10)]
    assert (most_likely(some), most_likely(some, per_token=True)) == (1, 3)


def test_a_model_that_computes_no_numbers_finds_nothing_likeliest():
    none = [Likelihood(float("nan"), 2), Likelihood(float("nan"), 1)]
    assert most_likely(none) == most_likely([none[0], Likelihood(-1.0, 1)]) == -1


def test_all_samples_of_a_row_count_and_the_first_rank_speaks(tokenizer, context):
    settings = GenerationSettings(max_new=4, samples=3, temperature=0.5, top_p=0.9, seed=4)
    task = ExactMatch(context, settings)
    assert task.items() == ROWS and task.items(2) == ROWS[:2]
    scores = score(FakeEngine(tokenizer), task, ROWS, tokenizer).main
    assert scores["reverse"].mean == pytest.approx(
        1 / 3
    )  # of dabe both texts are right, of "ab" none: "ba e"
    assert scores["copy"].total == 0 and scores[ALL].items == 6
    assert score(FakeEngine(tokenizer, client_rank=1), task, ROWS, tokenizer).main == {}


def test_choices_are_ranked_by_likelihood(tokenizer, context):
    task = AnswerChoice(context, count=2)
    assert task.items() == ROWS
    assert task.choices(ROWS[0]) == ["ebad", "dabe", "fade"] and task.choices(ROWS[5]) == [
        "ba",
        "ebad",
        "dabe",
    ]
    scores = score(FakeEngine(tokenizer), task, ROWS, tokenizer).main
    # Of texts that are as likely by token, the first one counts.
    assert scores["copy"] == Tally.of([1, 1]) and scores["reverse"] == Tally.of([1, 0])
    assert (scores[ALL].total, scores[ALL].items) == (4, 6)


def test_a_choice_without_text_is_refused(tokenizer):
    class Empty(ChoiceTask):
        name = "empty"

        def items(self, limit=0):
            raise AssertionError

        def prompt(self, row):
            return "which one?"

        def choices(self, row):
            return ["this", ""]

        def score(self, rows, likelihoods):
            raise AssertionError

    with pytest.raises(
        DataError, match="empty: an item whose prompt is 'which one\\?' has no choices, or an empty one"
    ):
        score(FakeEngine(tokenizer), Empty(), ROWS[:1], tokenizer)


def test_the_example_of_a_new_task(tokenizer, tmp_path):
    """As it stands in docs/extending.md."""
    code, line = code_of("A new evaluation task")
    module = tmp_path / "last_number.py"
    module.write_text(code)
    made = imported(module)
    entries = eval(f"{{{line}}}", {"EvalTaskEntry": EvalTaskEntry, "_TASKS": "fedspeed.evaluation.tasks"})
    assert entries["last_number"].module == "fedspeed.evaluation.tasks.last_number"

    class Counts(FakeEngine):
        def generate(self, prompts, *, n, is_done, **_settings):
            assert all(
                self.tokenizer.decode(prompt.tolist(), skip_special_tokens=True).startswith(made.EXAMPLE)
                for prompt in prompts
            )
            said = ["1 + 1 = 2", "no", "so -3.5 it is", "2\n\n9", "3"]
            ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in said[:n]]
            assert [is_done(tokens) for tokens in ids] == [False, False, False, True, False]
            return [[np.array(tokens) for tokens in ids] for _ in prompts]

    problems = [("1 + 1?", "It is 2", "sum"), ("1 - 4.5?", "-3.5", "difference"), ("2?", "2", "sum")]
    lines = [json.dumps({"question": q, "solution": s, "topic": t}) for q, s, t in problems]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    task = made.make(TaskContext(name="last_number", folders=(tmp_path / "none", tmp_path)))
    items = task.items(2)
    assert len(items) == 2 and len(task.items()) == 3
    assert score(Counts(tokenizer), task, items, tokenizer).main == {
        ALL: Tally.of([1, 0]),
        "sum": Tally.of([1]),
        "difference": Tally.of([0]),
    }
    with pytest.raises(DataError, match="last_number: none of problems.jsonl in .*FEDSPEED_DATA"):
        made.make(TaskContext(name="last_number", folders=(tmp_path / "none",)))


def imported(path):
    """Import a module from a file, under its own name, which dataclasses look up."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def learned(rank, base, context):
    """A model that has learned some rows and not others, and what it comes to by generation, by choice, and
    by its losses.
    """
    from fedspeed.data.batches import StepBatches, eval_batches
    from fedspeed.data.config import DataConfig, TrainConfig
    from fedspeed.data.prompt_template import template_for
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.models.tokenizer import load_tokenizer
    from tests.engine.engines import engine

    tokenizer = load_tokenizer(ModelConfig(tokenizer="bytes"))
    template = template_for(DataConfig(template="plain", max_tokens=64), tokenizer)
    examples = [template.encode(row).examples[0] for row in ROWS]
    (batch,) = eval_batches(examples[:4], 4, tokenizer.pad_token_id)
    with engine(
        base, "resident", adapter=AdapterConfig(targets="all-linear", lora_rank=16), train=TrainConfig()
    ) as own:
        own.load(own.state())
        for _ in range(60):
            own.train_step([StepBatches([batch], batch.answer_tokens)], 1e-2)
        exact = [own.evaluate([eval_batches([one], 1, tokenizer.pad_token_id)])[0].exact for one in examples]
        choice = AnswerChoice(context)
        found = (
            score(own, ExactMatch(context, GenerationSettings(max_new=8)), ROWS, tokenizer).main,
            score(own, choice, choice.items(), tokenizer).main,
            score(own, HeldOutLoss(context), ROWS, tokenizer).metrics,
        )
        single = own.evaluate([eval_batches(examples, 6, tokenizer.pad_token_id)])[0]
        own.close()
    return exact, single, *found


def test_generation_finds_exact_what_the_held_out_evaluation_does(tmp_path, context):
    base = write_llama(tmp_path / "base")
    [(exact, sums, generated, chosen, losses)] = run_clusters([1], learned, base, context)
    assert 3 <= sum(exact) < 6, "the model must have learned some rows only, or equality shows little"
    assert generated[ALL] == Tally.of(exact)
    assert generated["copy"] == Tally.of(exact[1:3])
    assert chosen[ALL].total >= sum(exact), "what is written is found likeliest"
    assert losses["exact"][ALL] == Tally.of(exact) and losses["loss"][ALL].weight == sums.tokens
    assert losses["loss"][ALL].total == pytest.approx(sums.loss, rel=1e-5)
