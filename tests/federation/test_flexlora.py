"""FlexLoRA: the exact mean of the clients' products, cut to the adapter's rank, against numpy's SVD."""

import math

import numpy as np
import pytest

from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import make_method
from fedspeed.models.factors import pairs
from tests.federation.one_round import (
    A_NAMES,
    SHAPES,
    Round,
    aggregate,
    drawn,
    mean_product,
    trained,
    variant,
)


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
