"""Methods of averaging as pure functions, against their definitions in float64."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from fedspeed.errors import ConfigError
from fedspeed.federation.methods.base import method_class
from fedspeed.federation.methods.config import METHODS, Entry, variant_of
from fedspeed.models.factors import is_factor_a, pairs
from tests.federation.one_round import (
    A_NAMES,
    B_NAMES,
    SHAPES,
    WEIGHTS,
    Round,
    aggregate,
    drawn,
    frozen,
    mean_product,
    trained,
    variant,
    weighted_mean,
)


def problem(name, start):
    """What is wrong with starting from these tensors."""
    return method_class(variant(name).name).start_problem(variant(name), start)


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_travels_between_processes(name):
    assert pickle.loads(pickle.dumps(variant_of(name)())) == variant_of(name)()


# What is frozen.


def test_frozen_names_by_round():
    assert frozen("freeze_a", 1) == frozen("freeze_a", 2) == A_NAMES
    assert [frozen("alternate", r) for r in (1, 2, 3, 4)] == [A_NAMES, B_NAMES, A_NAMES, B_NAMES]
    assert frozen("avg_factors", 1) == frozen("flexlora", 1) == frozenset()
    assert frozen("avg_factors", 1, {"wte.weight": (5, 4)}) == frozenset()


def test_pairs_are_matched_by_matrix():
    assert pairs(SHAPES) == [
        ("x.q.lora_A.default.weight", "x.q.lora_B.default.weight"),
        ("x.v.lora_A.default.weight", "x.v.lora_B.default.weight"),
    ]
    assert pairs(["wte.weight"]) == []

    assert [is_factor_a(n) for n in SHAPES] == [n in A_NAMES for n in SHAPES]


# LoRA on an embedding, and with a bias.

WHOLE = {
    "x.embed.lora_embedding_A.default": (3, 11),
    "x.embed.lora_embedding_B.default": (8, 3),
    "x.q.lora_A.default.weight": (3, 9),
    "x.q.lora_B.default.weight": (8, 3),
    "x.q.lora_B.default.bias": (8,),
}
EVERY_A = {"x.embed.lora_embedding_A.default", "x.q.lora_A.default.weight"}


def test_embeddings_and_biases_have_a_side():
    assert pairs(WHOLE) == [
        ("x.embed.lora_embedding_A.default", "x.embed.lora_embedding_B.default"),
        ("x.q.lora_A.default.weight", "x.q.lora_B.default.weight"),
    ]
    assert pairs(["e.lora_embedding_A"]) == [("e.lora_embedding_A", "e.lora_embedding_B")], (
        "as PEFT writes them into a file"
    )
    assert frozen("freeze_a", 1, WHOLE) == frozen("alternate", 1, WHOLE) == EVERY_A
    assert frozen("alternate", 2, WHOLE) == WHOLE.keys() - EVERY_A


def test_a_factor_that_is_zero_and_frozen_is_found():
    """As PEFT leaves the A of a fresh LoRA on an embedding."""
    start = drawn(3, WHOLE)
    assert problem("freeze_a", start) == ""
    start["x.embed.lora_embedding_A.default"][:] = 0
    assert "x.embed.lora_embedding_A.default is zero" in problem("freeze_a", start)
    assert [problem(name, start) for name in ("avg_factors", "alternate", "flexlora")] == ["", "", ""]


@pytest.mark.parametrize(
    ("name", "round"),
    [("avg_factors", 1), ("freeze_a", 1), ("alternate", 1), ("alternate", 2), ("flexlora", 1)],
)
def test_every_rule_aggregates_every_tensor(name, round):
    start = drawn(99, WHOLE)
    stays = frozen(name, round, WHOLE)
    ends = {
        c: {n: t if n in stays else t + drawn(c, WHOLE, 0.1)[n] for n, t in start.items()} for c in WEIGHTS
    }
    state = aggregate(Round(name, WHOLE, round=round), start, ends).state
    mean = {
        n: sum(WEIGHTS[c] / sum(WEIGHTS.values()) * end[n].astype(np.float64) for c, end in ends.items())
        for n in WHOLE
    }
    assert {n: t.shape for n, t in state.items()} == WHOLE and all(
        t.dtype == np.float32 for t in state.values()
    )
    averaged = WHOLE.keys() if name != "flexlora" else {"x.q.lora_B.default.bias"}
    for n in averaged:
        np.testing.assert_allclose(state[n], mean[n], rtol=0, atol=1e-6)
    if name == "flexlora":
        for a, b in pairs(WHOLE):
            u, values, vt = np.linalg.svd(mean_product(ends, a, b))
            np.testing.assert_allclose(
                state[b] @ state[a], (u[:, :3] * values[:3]) @ vt[:3], rtol=0, atol=1e-5
            )


# The three rules that are one sum.


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("name", ["avg_factors", "freeze_a", "alternate"])
def test_sum_rules_give_the_weighted_mean(name, round):
    start, ends = trained(name, round)
    result = aggregate(Round(name, round=round), start, ends)
    expected = weighted_mean(ends)
    stays = frozen(name, round)
    assert result.state.keys() == start.keys()
    for n in SHAPES:
        assert result.state[n].dtype == np.float32
        if n in stays:
            np.testing.assert_array_equal(result.state[n], start[n])
        else:
            np.testing.assert_allclose(result.state[n], expected[n], rtol=0, atol=3e-7)


@pytest.mark.parametrize(
    ("name", "round", "values"),
    [
        ("avg_factors", 1, 105),
        ("freeze_a", 1, 105 - 45),
        ("alternate", 1, 105 - 45),
        ("alternate", 2, 105 - 60),
    ],
)
def test_only_what_trains_travels(name, round, values):
    rule = Round(name, round=round)
    assert rule.values == values + 2 * 16, "16 values of sketch for each of the two matrices"
    start, ends = trained(name, round)
    vector = rule.contribution(0, 120.0, start, ends[0])
    assert vector.shape == (rule.values,) and vector.dtype == np.float32


@pytest.mark.parametrize("name", ["avg_factors", "freeze_a", "alternate", "flexlora"])
def test_any_grouping_of_clients_sums_to_the_same(name):
    """Clients of one rank are summed in float32 before the exchange sums the ranks in float64."""
    start, ends = trained(name)
    rule = Round(name)
    parts = [rule.contribution(c, WEIGHTS[c], start, ends[c]) for c in ends]
    results = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        rank = np.zeros(rule.values, dtype=np.float32)
        for c in order[:2]:
            rank += parts[c]
        total = rank.astype(np.float64) + parts[order[2]]
        results.append(rule.result(start, total.astype(np.float32), sum(WEIGHTS.values())))
    for other in results[1:]:
        for n in SHAPES:
            np.testing.assert_allclose(other.state[n], results[0].state[n], rtol=0, atol=1e-6)
        assert other.factor_error == pytest.approx(results[0].factor_error, abs=1e-5)


def test_a_client_that_was_not_asked_changes_nothing():
    start, ends = trained("avg_factors", clients=(0, 2))
    rule = Round("avg_factors")
    with_idle = [rule.contribution(c, WEIGHTS[c], start, ends[c]) for c in ends] + [
        np.zeros(rule.values, np.float32)
    ]
    result = rule.result(start, np.sum(with_idle, axis=0), WEIGHTS[0] + WEIGHTS[2])
    expected = weighted_mean(ends)
    for n in SHAPES:
        np.testing.assert_allclose(result.state[n], expected[n], rtol=0, atol=3e-7)


def test_full_fine_tuning_has_no_factors():
    shapes = {"wte.weight": (5, 4), "ln.weight": (4,)}
    start = drawn(9, shapes)
    ends = {c: drawn(c, shapes) for c in range(3)}
    rule = Round("avg_factors", shapes)
    assert rule.values == 24
    result = aggregate(rule, start, ends)
    assert result.factor_error is None
    for n in shapes:
        expected = sum(WEIGHTS[c] / sum(WEIGHTS.values()) * ends[c][n].astype(np.float64) for c in ends)
        np.testing.assert_allclose(result.state[n], expected, rtol=0, atol=1e-6)


# The factor-averaging error.


def true_error(ends, state):
    gap = 0.0
    whole = 0.0
    for a, b in pairs(SHAPES):
        mean = mean_product(ends, a, b)
        gap += np.linalg.norm(mean - state[b].astype(np.float64) @ state[a]) ** 2
        whole += np.linalg.norm(mean) ** 2
    return (gap / whole) ** 0.5


def test_sketch_estimates_the_relative_frobenius_error():
    """Every probe pair gives E (u^T M v)^2 = |M|^2, so the mean of the squared estimates over many rounds is
    the squared truth.
    """
    start, ends = trained("avg_factors", scale=3.0)
    results = [aggregate(Round("avg_factors", round=r), start, ends) for r in range(1, 201)]
    estimates = [r.factor_error for r in results]
    truth = true_error(ends, results[0].state)
    assert 0.2 < truth < 0.9, "the case must have an error worth estimating"
    assert np.median(estimates) == pytest.approx(truth, rel=0.05)
    assert np.quantile(np.abs(np.array(estimates) / truth - 1), 0.9) < 0.5, (
        "one round's estimate is good to a factor"
    )
    assert len(set(estimates)) == 200, "each round draws probes of its own"


def test_all_participants_draw_the_same_probes():
    start, ends = trained("avg_factors")
    np.testing.assert_array_equal(
        *(Round("avg_factors", seed=8, round=3).contribution(0, 1.0, start, ends[0]) for _ in range(2))
    )
    ours, other = (Round("avg_factors", seed=s, round=3).contribution(0, 1.0, start, ends[0]) for s in (8, 9))
    assert (ours[-32:] != other[-32:]).all()
    np.testing.assert_array_equal(ours[:-32], other[:-32])


@pytest.mark.parametrize(("name", "round"), [("freeze_a", 1), ("alternate", 1), ("alternate", 2)])
def test_no_error_where_one_factor_is_shared(name, round):
    start, ends = trained(name, round, scale=1.0)
    result = aggregate(Round(name, round=round), start, ends)
    assert result.factor_error == pytest.approx(0.0, abs=2e-6)
    assert true_error(ends, result.state) < 2e-6


def test_no_error_while_b_is_zero():
    start = {n: t * (n in A_NAMES) for n, t in drawn(1).items()}
    assert aggregate(Round("avg_factors"), start, {0: start, 1: start, 2: start}).factor_error == 0.0


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (
            Entry(module="tests.federation.methods.served"),
            "Served has serve and server_step; say server=True",
        ),
        (
            Entry(module="tests.federation.methods.served", server=True, sums_only=True),
            "clients send it single values in serve",
        ),
        (replace(METHODS["lora_average"], server=True), "has neither serve nor server_step"),
        (replace(METHODS["lora_average"], public_rows=True), "has neither serve nor server_step"),
    ],
)
def test_what_is_said_of_a_server_and_what_it_has_to_do_are_held_against_each_other(entry, text, monkeypatch):
    monkeypatch.setitem(METHODS, "own", entry)
    with pytest.raises(ConfigError) as refused:
        method_class("own")
    assert text in str(refused.value) and "federation/methods/config.py" in str(refused.value)
