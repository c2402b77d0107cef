"""Methods of averaging as pure functions, against their definitions in float64."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest

from fedspeed.errors import ConfigError
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import make_method, method_class
from fedspeed.federation.methods.config import METHODS, Entry, variant_of
from fedspeed.models.factors import is_factor_a, pairs

SHAPES = {
    "x.q.lora_A.default.weight": (3, 9),
    "x.q.lora_B.default.weight": (8, 3),
    "x.v.lora_A.default.weight": (3, 6),
    "x.v.lora_B.default.weight": (12, 3),
}
WEIGHTS = {0: 120.0, 1: 31.0, 2: 7.0}
A_NAMES = frozenset(n for n in SHAPES if ".lora_A." in n)
B_NAMES = frozenset(n for n in SHAPES if ".lora_B." in n)


def drawn(seed, shapes=SHAPES, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


RULES = ("avg_factors", "freeze_a", "alternate")


def variant(name):
    """The configuration of a method, or of a rule of `lora_average`."""
    return variant_of("lora_average")(rule=name) if name in RULES else variant_of(name)()


class Round:
    """A method in one round."""

    def __init__(self, name, shapes=SHAPES, clients=3, seed=5, round=1):
        self.method = make_method(variant(name), drawn(0, shapes), clients=clients, seed=seed)
        self.round = round
        self.values = self.method.values(round)
        self.frozen = self.method.frozen(round)

    def contribution(self, client, weight, start, end):
        turn = self.method.turn(client, self.round, start, steps=1, seed=0, memory={})
        assert turn.frozen == self.frozen
        return self.method.encode(turn, end, weight)

    def result(self, start, total, weight, factor=1.0):
        return self.method.aggregate(start, total, weight, round=self.round, factor=factor)


def frozen(name, round, shapes=SHAPES):
    return Round(name, shapes, round=round).frozen


def problem(name, start):
    """What is wrong with starting from these tensors."""
    return method_class(variant(name).name).start_problem(variant(name), start)


def aggregate(rule, start, ends, weights=WEIGHTS):
    """The result of one sum over all clients in `ends`."""
    total = np.sum(
        [rule.contribution(c, weights[c], start, end).astype(np.float64) for c, end in ends.items()], axis=0
    )
    return rule.result(start, total.astype(np.float32), sum(weights[c] for c in ends))


def trained(name, round=1, clients=(0, 1, 2), scale=0.1):
    """Where the clients end, with what is frozen left where it was."""
    start = drawn(99)
    stays = frozen(name, round)
    return start, {
        c: {n: t if n in stays else t + drawn(c, scale=scale)[n] for n, t in start.items()} for c in clients
    }


def weighted_mean(ends, weights=WEIGHTS):
    total = sum(weights[c] for c in ends)
    return {n: sum(weights[c] / total * end[n].astype(np.float64) for c, end in ends.items()) for n in SHAPES}


def mean_product(ends, a, b, weights=WEIGHTS):
    total = sum(weights[c] for c in ends)
    return sum(
        weights[c] / total * (end[b].astype(np.float64) @ end[a].astype(np.float64))
        for c, end in ends.items()
    )


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


# The exact rule.


def truncated(matrix, r):
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :r] * s[:r]) @ vt[:r], float(np.linalg.norm(s[r:]))


def test_svd_is_the_best_approximation_of_the_mean_product():
    start, ends = trained("flexlora", scale=1.0)
    result = aggregate(Round("flexlora"), start, ends)
    lost = 0.0
    whole = 0.0
    for a, b in pairs(SHAPES):
        assert result.state[a].shape == SHAPES[a] and result.state[b].shape == SHAPES[b]
        mean = mean_product(ends, a, b)
        best, cut = truncated(mean, 3)
        np.testing.assert_allclose(
            result.state[b].astype(np.float64) @ result.state[a], best, rtol=0, atol=2e-6
        )
        assert np.linalg.norm(result.state[a]) == pytest.approx(np.linalg.norm(result.state[b]), rel=1e-5), (
            "evenly split"
        )
        lost = lost + cut**2
        whole = whole + np.linalg.norm(mean) ** 2
    assert result.factor_error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)


def test_svd_is_exact_where_the_mean_has_rank_r():
    start, ends = trained("freeze_a", scale=1.0)  # one A for all: the mean product has A's rank
    result = aggregate(Round("flexlora"), start, ends)
    for a, b in pairs(SHAPES):
        np.testing.assert_allclose(
            result.state[b].astype(np.float64) @ result.state[a], mean_product(ends, a, b), rtol=0, atol=2e-6
        )
    assert result.factor_error < 1e-6


def test_svd_leaves_out_clients_without_weight():
    start, ends = trained("flexlora", clients=(0, 2), scale=1.0)
    result = aggregate(Round("flexlora"), start, ends)
    for a, b in pairs(SHAPES):
        best, _ = truncated(mean_product(ends, a, b), 3)
        np.testing.assert_allclose(
            result.state[b].astype(np.float64) @ result.state[a], best, rtol=0, atol=2e-6
        )


def test_svd_slots_are_bitwise_what_the_client_sent():
    rule = Round("flexlora")
    start, ends = trained("flexlora")
    assert rule.values == 3 * (105 + 1)
    vector = rule.contribution(1, 31.0, start, ends[1]).reshape(3, -1)
    assert not vector[[0, 2]].any() and vector[1, 0] == 31.0
    np.testing.assert_array_equal(vector[1, 1:], Layout.of(start).flatten(ends[1]))


def test_svd_of_matrices_smaller_than_r():
    shapes = {"m.lora_A.default.weight": (8, 3), "m.lora_B.default.weight": (2, 8)}
    start = drawn(9, shapes)
    ends = {c: drawn(c, shapes) for c in range(3)}
    result = aggregate(Round("flexlora", shapes), start, ends)
    a = "m.lora_A.default.weight"
    b = "m.lora_B.default.weight"
    np.testing.assert_allclose(
        result.state[b].astype(np.float64) @ result.state[a], mean_product(ends, a, b), rtol=0, atol=2e-6
    )
    assert result.state[a].shape == (8, 3) and result.factor_error < 1e-6


def test_svd_of_nothing_learned_can_still_learn():
    """All steps of fp16's first round may be skipped for overflow; factors that are both zero would stay zero
    for ever.
    """
    start = {n: t * (n in A_NAMES) for n, t in drawn(1).items()}
    result = aggregate(Round("flexlora"), start, {0: start, 1: start, 2: start})
    for a, b in pairs(SHAPES):
        assert not result.state[b].any()
        np.testing.assert_array_equal(result.state[a], start[a])
    assert result.factor_error == 0.0


@pytest.mark.parametrize("shape", [(6, 5, 2), (3, 4, 4)])
def test_the_norm_of_an_update_is_that_of_products_under_svd(shape):
    """Whatever rotation the factors come in; and without forming a product."""
    out, wide, r = shape
    rng = np.random.default_rng(0)
    a = "m.lora_A.default.weight"
    b = "m.lora_B.default.weight"
    bias = "m.lora_B.default.bias"
    before, after = (
        {
            a: rng.normal(size=(r, wide)).astype(np.float32),
            b: rng.normal(size=(out, r)).astype(np.float32),
            bias: rng.normal(size=out).astype(np.float32),
        }
        for _ in range(2)
    )
    method = make_method(variant("flexlora"), before, clients=1, seed=0)
    turn = np.linalg.qr(rng.normal(size=(r, r)))[0]
    turned = after | {a: (turn.T @ after[a]).astype(np.float32), b: (after[b] @ turn).astype(np.float32)}
    products = [state[b].astype(float) @ state[a] for state in (before, after)]
    expected = math.hypot(
        np.linalg.norm(products[1] - products[0]), np.linalg.norm(after[bias] - before[bias])
    )
    for state in (after, turned):
        assert method.update_norm(before, state) == pytest.approx(expected, rel=1e-5)
    only_turned = before | {a: turned[a], b: turned[b]}
    assert method.update_norm({**after, bias: before[bias]}, only_turned) == pytest.approx(0.0, abs=1e-5)


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
