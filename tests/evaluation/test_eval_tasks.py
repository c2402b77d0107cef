"""Tasks and their scores, with a fake engine and with a real one."""

from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.data.eval_task import (
    ALL,
    ChoiceTask,
    GenerationSettings,
    Likelihood,
    Tally,
    added,
    most_likely,
    tally,
)
from fedspeed.data.rows import Row
from fedspeed.errors import DataError
from fedspeed.evaluation.answer_choice import AnswerChoice
from fedspeed.evaluation.exact_match import ExactMatch
from fedspeed.evaluation.scoring import score_task
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

    def generate(self, prompts, *, max_new, n, stop, **settings):
        assert stop == [self.tokenizer.eos_token_id] and settings == {
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 4,
        }
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


def test_scores_are_counted_by_category_and_add_up():
    task = ExactMatch("plain", GenerationSettings(max_new=4))
    scores = tally(task, ROWS, [1, 0, 1, 1, 0, 0.5])
    assert scores == {
        ALL: Tally(3.5, 6),
        "reverse": Tally(1.5, 2),
        "copy": Tally(1, 2),
        "double": Tally(0, 1),
    }
    assert scores["reverse"].mean == 0.75 and np.isnan(Tally().mean)
    assert added([scores, {}, {ALL: Tally(1, 1), "new": Tally(1, 1)}]) == scores | {
        ALL: Tally(4.5, 7),
        "new": Tally(1, 1),
    }


def test_the_likeliest_choice_may_be_so_by_token():
    some = [Likelihood(-4.0, 2), Likelihood(-3.0, 1), Likelihood(-3.0, 1), Likelihood(-5.0, 10)]
    assert (most_likely(some), most_likely(some, per_token=True)) == (1, 3)


def test_all_samples_of_a_row_count_and_the_first_rank_speaks(tokenizer):
    task = ExactMatch("plain", GenerationSettings(max_new=4, samples=3, temperature=0.5, top_p=0.9, seed=4))
    scores = score_task(FakeEngine(tokenizer), task, ROWS, tokenizer)
    assert scores["reverse"].mean == pytest.approx(
        1 / 3
    )  # of dabe both texts are right, of "ab" none: "ba e"
    assert scores["copy"].total == 0 and scores[ALL].count == 6
    assert score_task(FakeEngine(tokenizer, client_rank=1), task, ROWS, tokenizer) == {}


def test_choices_are_ranked_by_likelihood(tokenizer):
    task = AnswerChoice(ROWS, "plain", count=2)
    assert task.choices(ROWS[0]) == ["ebad", "dabe", "fade"] and task.choices(ROWS[5]) == [
        "ba",
        "ebad",
        "dabe",
    ]
    scores = score_task(FakeEngine(tokenizer), task, ROWS, tokenizer)
    # Of texts that are as likely by token, the first one counts.
    assert scores[ALL] == Tally(4, 6) and scores["copy"] == Tally(2, 2) and scores["reverse"] == Tally(1, 2)


def test_a_choice_without_text_is_refused(tokenizer):
    class Empty(ChoiceTask):
        name = "empty"

        def prompt(self, row):
            return "which one?"

        def choices(self, row):
            return ["this", ""]

        def score(self, rows, likelihoods):
            raise AssertionError

    with pytest.raises(
        DataError, match="empty: a row whose prompt is 'which one\\?' has no choices, or an empty one"
    ):
        score_task(FakeEngine(tokenizer), Empty(), ROWS[:1], tokenizer)


def test_the_example_of_a_new_task(tokenizer):
    """As it stands in docs/extending.md."""
    [code] = code_of("A new evaluation task")
    made = {}
    exec(code, made)

    class Counts(FakeEngine):
        def generate(self, prompts, *, n, **_settings):
            assert all(
                self.tokenizer.decode(prompt.tolist(), skip_special_tokens=True).startswith(made["EXAMPLE"])
                for prompt in prompts
            )
            said = ["1 + 1 = 2", "no", "so -3.5 it is", "2", "3"]
            return [
                [np.array(self.tokenizer(text, add_special_tokens=False).input_ids) for text in said[:n]]
                for _ in prompts
            ]

    rows = [Row("1 + 1?", "", "It is 2", "sum"), Row("1 - 4.5?", "", "-3.5", "difference")]
    assert score_task(Counts(tokenizer), made["LastNumber"](), rows, tokenizer) == {
        ALL: Tally(1, 2),
        "sum": Tally(1, 1),
        "difference": Tally(0, 1),
    }


def learned(rank, base):
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
        found = (
            score_task(own, ExactMatch("plain", GenerationSettings(max_new=8)), ROWS, tokenizer),
            score_task(own, AnswerChoice(ROWS, "plain"), ROWS, tokenizer),
        )
        own.close()
    return exact, *found


def test_generation_finds_exact_what_the_held_out_evaluation_does(tmp_path):
    [(exact, generated, chosen)] = run_clusters([1], learned, write_llama(tmp_path / "base"))
    assert 3 <= sum(exact) < 6, "the model must have learned some rows only, or equality shows little"
    assert generated[ALL] == Tally(sum(exact), 6)
    assert generated["copy"] == Tally(exact[1] + exact[2], 2)
    assert chosen[ALL].total >= sum(exact), "what is written is found likeliest"
