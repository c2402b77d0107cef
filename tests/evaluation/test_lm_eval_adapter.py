"""Our engine as a model of lm-evaluation-harness: equal to the harness's own `hf` model."""

import string

import numpy as np
import pytest

from fedspeed.models.tokenizer import byte_tokenizer
from tests.evaluation.harness_models import engine_lm, hf_lm, requests
from tests.processes import run_clusters
from tests.tiny import write_llama

pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")

CONTEXT = "Question: what is it?\nAnswer:"
LONG = "a text that goes beyond the model's context " * 3
PAIRS = [
    (CONTEXT, " yes"),
    (CONTEXT, " no"),
    ("Question: what else? ", "this"),  # the space is moved to the continuation
    ("", "without a context"),
    ("<bos>begins as a template does", " x"),
    (LONG, " of a long context the end counts"),
    ("one", " é"),
]
TEXTS = ["short", LONG, "0123456789" * 13]
ASKED = [
    ("abc", {"until": ["\n"], "max_gen_toks": 6}),
    ("a longer prompt", {"until": ["\n"], "max_gen_toks": 6}),
    (LONG, {"until": [], "max_gen_toks": 4, "do_sample": False}),
]
LENGTH = 60  # positions that both models are limited to


def asked(lm):
    """Return what a model of the harness answers to all kinds of requests."""
    return {
        "pairs": lm.loglikelihood(requests("loglikelihood", PAIRS)),
        "texts": lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS])),
        "answers": lm.generate_until(requests("generate_until", ASKED)),
    }


def of_engines(rank, base, kinds, ranks=1):
    """Return what our engines answer and what the harness's own model does."""
    from fedspeed.engine.world import join_world, leave_world, quiet
    from tests.limits import LIMIT_S

    quiet()
    join_world(LIMIT_S)
    tokenizer = byte_tokenizer()
    found = {}
    for kind in kinds:
        with engine_lm(base, tokenizer, kind, ranks=ranks, max_length=LENGTH) as lm:
            found[kind] = asked(lm)
            found[kind]["greedy"] = greedy(lm)
    if rank == 0:
        found["hf"] = asked(hf_lm(base, tokenizer, max_length=LENGTH))
    leave_world()
    return found


def greedy(lm):
    """Return whether greedy answers of one character are the most likely continuations, and whether others
    are.
    """
    prompts = [(letter, {"max_gen_toks": 1}) for letter in string.ascii_letters]
    answers = lm.generate_until(requests("generate_until", prompts))
    pairs = [(prompt, text) for (prompt, _), text in zip(prompts, answers) if text in string.printable[:94]]
    assert len(pairs) > 3
    other = [(prompt, chr(ord(text) ^ 1)) for prompt, text in pairs]
    return [
        [likeliest for _, likeliest in lm.loglikelihood(requests("loglikelihood", some))]
        for some in (pairs, other)
    ]


def same(found, expected):
    for (ours, likeliest), (theirs, expected_likeliest) in zip(
        found["pairs"], expected["pairs"], strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-3) and likeliest == expected_likeliest
    assert found["texts"] == pytest.approx(expected["texts"], abs=1e-3)
    assert found["answers"] == expected["answers"]


def test_scores_and_answers_are_those_of_the_hf_model(tmp_path):
    base = write_llama(tmp_path / "base", vocab=260, seed=3)
    [found] = run_clusters([1], of_engines, base, ("resident", "ram"))
    same(found["resident"], found["hf"])
    same(found["ram"], found["hf"])
    for kind in ("resident", "ram"):
        right, wrong = found[kind]["greedy"]
        assert all(right) and not any(wrong)
    values = [value for value, _ in found["hf"]["pairs"]]
    assert np.ptp(values) > 1, "the values must differ, or equality shows little"


def test_the_ranks_of_a_client_share_the_requests_and_all_know_the_scores(tmp_path):
    base = write_llama(tmp_path / "base", vocab=260, seed=3)
    ranks = run_clusters([2], of_engines, base, ("zero3",), 2)
    for found in ranks:
        same(found["zero3"], ranks[0]["hf"])
