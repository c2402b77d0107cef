"""Clients with different LoRA ranks under `stack` and `flexlora`, against dense sums in float64."""

from types import SimpleNamespace

import numpy as np
import pytest

from fedspeed.federation.methods.base import make_method
from fedspeed.federation.methods.config import variant_of
from fedspeed.federation.trainer import simultaneous_turns
from fedspeed.models.factors import pairs
from fedspeed.models.folded import as_factors, folded_parts, module_of, trainable

COMMON = 4
RANKS = (4, 2, 1)
SHAPES = {
    "x.k.lora_A.default.weight": (COMMON, 30),
    "x.k.lora_B.default.weight": (10, COMMON),
    "x.q.lora_A.default.weight": (COMMON, 90),
    "x.q.lora_B.default.weight": (80, COMMON),
}
WEIGHTS = {0: 120.0, 1: 31.0, 2: 7.0}


def drawn(seed, shapes, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


def product(state, a, b):
    """What a module adds to its base, in float64."""
    own = state[b].astype(np.float64) @ state[a]
    if module_of(a) not in folded_parts(state):
        return own
    left, right = as_factors(folded_parts(state)[module_of(a)])
    return own + left.astype(np.float64) @ right


def method_of(name, lora_ranks=RANKS, clients=3):
    return make_method(variant_of(name)(), drawn(0, SHAPES), clients=clients, seed=5, lora_ranks=lora_ranks)


def one_round(method, state, number, clients=(0, 1, 2), scale=0.1):
    """Return (ends of the clients by number, state after a round in which each moves by a random delta)."""
    total = np.zeros(method.values(number))
    ends = {}
    for client in clients:
        turn = method.turn(client, number, state, steps=1, seed=0, memory={})
        shapes = {name: array.shape for name, array in trainable(turn.start).items()}
        delta = drawn(10 * number + client, shapes, scale)
        ends[client] = turn.start | {n: turn.start[n] + delta[n] for n in shapes}
        total += method.encode(turn, trainable(ends[client]), WEIGHTS[client])
    whole = sum(WEIGHTS[client] for client in clients)
    return ends, method.aggregate(state, total.astype(np.float32), whole, round=number)


def mean_model(ends, a, b):
    """Return the weighted mean, in float64, of what a module adds to its base on each client."""
    whole = sum(WEIGHTS[client] for client in ends)
    return sum(WEIGHTS[client] / whole * product(end, a, b) for client, end in ends.items())


@pytest.mark.parametrize("name", ["stack", "flexlora"])
def test_every_client_starts_from_the_whole_common_model(name):
    """Whatever its rank: it trains its own directions, and has the others as frozen ones."""
    method = method_of(name)
    state = drawn(99, SHAPES)
    for client, lora_rank in enumerate(RANKS):
        start = method.turn(client, 1, state, steps=1, seed=0, memory={}).start
        for a, b in pairs(SHAPES):
            assert (len(start[a]), start[b].shape[1]) == (lora_rank, lora_rank)
            np.testing.assert_allclose(product(start, a, b), product(state, a, b), rtol=0, atol=2e-5)
    again = method.turn(2, 1, state, steps=1, seed=0, memory={}).start
    assert all(again[name] is start[name] for name in start), "uploaded once for all clients of a rank"


@pytest.mark.parametrize("name", ["stack", "flexlora"])
def test_a_small_client_sends_its_own_factors_only(name):
    method = method_of(name)
    sizes = [r * (30 + 10 + 90 + 80) + 1 for r in RANKS]
    assert method.values(1) == sum(sizes)
    state = drawn(99, SHAPES)
    turn = method.turn(1, 1, state, steps=1, seed=0, memory={})
    vector = method.encode(turn, trainable(turn.start), 31.0)
    assert np.flatnonzero(vector).tolist() == list(range(sizes[0], sizes[0] + sizes[1]))
    assert vector[sizes[0]] == 31.0


def test_stack_folds_exactly_the_mean_of_the_products():
    """Over so many rounds that the folded adapter of k becomes a whole matrix."""
    method = method_of("stack")
    state = drawn(99, SHAPES)
    for number in range(1, 5):
        clients = (1, 2) if number == 2 else (0, 1, 2)
        ends, result = one_round(method, state, number, clients)
        for a, b in pairs(SHAPES):
            expected = mean_model(ends, a, b)
            np.testing.assert_allclose(
                product(result.state, a, b), expected, rtol=0, atol=1e-6 * np.abs(expected).max()
            )
            assert result.state[a].shape == SHAPES[a] and not result.state[b].any()
        state = result.state
    assert set(folded_parts(state)["x.k"]) == {"whole"}


def test_stack_grows_by_the_sum_of_the_ranks():
    method = method_of("stack")
    state = drawn(99, SHAPES) | {b: np.zeros(SHAPES[b], np.float32) for _, b in pairs(SHAPES)}
    grown = []
    for number in range(1, 4):
        state = one_round(method, state, number)[1].state
        grown.append(len(folded_parts(state)["x.q"]["right"]))
    assert grown == [7, 14, 21]


def test_flexlora_approximates_the_mean_of_the_clients_models():
    method = method_of("flexlora")
    state = drawn(99, SHAPES)
    for number, clients in enumerate([(0, 1, 2), (1, 2), (2,), (0, 2)], 1):
        ends, result = one_round(method, state, number, clients)
        lost = 0.0
        whole = 0.0
        for a, b in pairs(SHAPES):
            expected = mean_model(ends, a, b)
            u, values, vt = np.linalg.svd(expected, full_matrices=False)
            best = (u[:, :COMMON] * values[:COMMON]) @ vt[:COMMON]
            np.testing.assert_allclose(
                product(result.state, a, b), best, rtol=0, atol=1e-6 * np.abs(expected).max()
            )
            lost += (values[COMMON:] ** 2).sum()
            whole += (values**2).sum()
            norms = np.linalg.norm(result.state[a], axis=1)
            assert (np.diff(norms) <= 1e-6).all(), "the leading directions have the largest singular values"
        assert result.factor_error == pytest.approx((lost / whole) ** 0.5, abs=1e-6)
        state = result.state


def test_flexlora_keeps_directions_that_few_clients_train():
    """If no client changes anything, nothing changes, in however many rounds. A mean of the clients' own
    products would lose, in each, the share of the clients that do not have a direction: rank collapse.
    """
    method = method_of("flexlora")
    first = one_round(method, drawn(99, SHAPES), 1)[1].state
    state = first
    for number in range(2, 6):
        state = one_round(method, state, number, scale=0.0)[1].state
    for a, b in pairs(SHAPES):
        expected = product(first, a, b)
        np.testing.assert_allclose(product(state, a, b), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_flexlora_leaves_no_direction_that_can_never_learn():
    """After a round of small clients only, the larger one still has an A for each direction."""
    method = method_of("flexlora")
    state = drawn(99, SHAPES) | {b: np.zeros(SHAPES[b], np.float32) for _, b in pairs(SHAPES)}
    _, result = one_round(method, state, 1, clients=(2,))
    for a, b in pairs(SHAPES):
        np.testing.assert_array_equal(result.state[a][1:], state[a][1:])
        assert not result.state[b][:, 1:].any() and result.state[b][:, 0].any()


@pytest.mark.parametrize("name", ["stack", "flexlora"])
def test_equal_ranks_that_are_named_change_nothing(name):
    state = drawn(99, SHAPES)
    named = one_round(method_of(name, (COMMON,) * 3), state, 1)
    plain = one_round(method_of(name, ()), state, 1)
    assert named[1].factor_error == plain[1].factor_error
    assert all(named[1].state[n].tobytes() == array.tobytes() for n, array in plain[1].state.items())


def test_the_norm_of_an_update_is_that_of_the_models():
    method = method_of("flexlora")
    state = one_round(method, drawn(99, SHAPES), 1)[1].state
    _, result = one_round(method, state, 2)
    expected = sum(
        np.linalg.norm(product(result.state, a, b) - product(state, a, b)) ** 2 for a, b in pairs(SHAPES)
    )
    assert method.update_norm(state, result.state) == pytest.approx(expected**0.5, rel=1e-5)


def test_only_clients_of_one_rank_are_trained_at_the_same_time():
    """An engine has one set of folded arrays, and clients of another rank have others."""
    lora_ranks = (4, 2, 4, 2, 4)
    turns = [
        SimpleNamespace(client=client, round=1, steps=2, start={"m.lora_A.default.weight": np.zeros((r, 3))})
        for client, r in enumerate(lora_ranks)
    ]
    groups = [[turn.client for turn in group] for group in simultaneous_turns(turns, 2)]
    assert groups == [[0, 2], [4], [1, 3]]
    assert [len(group) for group in simultaneous_turns(turns[:1] * 5, 2)] == [2, 2, 1]
    assert simultaneous_turns([], 2) == []
