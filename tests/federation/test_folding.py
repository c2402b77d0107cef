"""`stack` and `residual`: exact whatever the round, as factors and as whole matrices, against dense sums in
float64.
"""

import numpy as np
import pytest

from fedspeed.errors import JournalError
from fedspeed.federation.folded_layout import fits, shared_layout
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import make_method
from fedspeed.federation.methods.config import variant_of
from fedspeed.federation.methods.folding import folded_delta
from fedspeed.models.factors import pairs
from fedspeed.models.folded import (
    LEFT,
    RIGHT,
    WHOLE,
    as_factors,
    as_one_adapter,
    fold,
    folded_parts,
    is_folded,
    module_of,
    trainable,
)

SHAPES = {
    "x.q.lora_A.default.weight": (2, 90),
    "x.q.lora_B.default.weight": (80, 2),
    "x.q.lora_B.default.bias": (80,),
    "x.k.lora_A.default.weight": (2, 30),
    "x.k.lora_B.default.weight": (10, 2),
}
B = "x.q.lora_B.default.weight"
WEIGHTS = {0: 120.0, 1: 31.0, 2: 7.0}


def drawn(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in SHAPES.items()}


def product(state, a, b):
    """What a module adds to its base, in float64."""
    folded = folded_parts(state).get(module_of(a))
    left, right = as_factors(folded) if folded else (np.zeros((SHAPES[b][0], 0)), np.zeros((0, SHAPES[a][1])))
    return state[b].astype(np.float64) @ state[a] + left.astype(np.float64) @ right


def rounds(name, count, asked=lambda number: (0, 1, 2)):
    """(state before, ends of its clients, state after) of some rounds in a row."""
    state = drawn(99)
    method = make_method(variant_of(name)(), state, clients=3, seed=5)
    for number in range(1, count + 1):
        ends = {}
        total = np.zeros(method.values(number))
        for client in asked(number):
            turn = method.turn(client, number, state, steps=1, seed=0, memory={})
            delta = drawn(10 * number + client, 0.1)
            ends[client] = {n: turn.start[n] + delta[n] for n in SHAPES}
            total += method.encode(turn, ends[client], WEIGHTS[client])
        weight = sum(WEIGHTS[client] for client in ends)
        after = method.aggregate(state, total.astype(np.float32), weight, round=number).state
        yield method, state, ends, after
        state = after


@pytest.mark.parametrize("name", ["stack", "residual"])
def test_every_round_adds_the_mean_of_the_products(name):
    """Over so many rounds that the folded adapter of k becomes whole after 3, and that of q stays factors."""
    for method, before, ends, after in rounds(name, 5, lambda number: (1,) if number == 4 else (0, 1, 2)):
        whole = sum(WEIGHTS[client] for client in ends)
        squares = 0.0
        for a, b in pairs(SHAPES):
            mean = sum(WEIGHTS[c] / whole * (end[b].astype(np.float64) @ end[a]) for c, end in ends.items())
            own = before[b].astype(np.float64) @ before[a]
            expected = product(before, a, b) - own + mean
            np.testing.assert_allclose(
                product(after, a, b), expected, rtol=0, atol=1e-6 * np.abs(expected).max()
            )
            squares += np.linalg.norm(mean - own) ** 2
        bias = "x.q.lora_B.default.bias"
        mean = sum(WEIGHTS[c] / whole * end[bias].astype(np.float64) for c, end in ends.items())
        np.testing.assert_allclose(after[bias], mean, rtol=0, atol=1e-6)
        squares += np.linalg.norm(after[bias].astype(np.float64) - before[bias]) ** 2
        assert method.update_norm(before, after) == pytest.approx(squares**0.5, rel=1e-5)
        assert all(array.dtype == np.float32 for array in after.values())
    kinds = {module: set(parts) for module, parts in folded_parts(after).items()}
    assert kinds == {"x.q": {LEFT, RIGHT}, "x.k": {WHOLE}}


def test_ranks_grow_as_stated_and_no_further():
    """K r a round with `stack`, (K - 1) r with `residual`; never beyond what a whole matrix takes."""
    for name, step in (("stack", 6), ("residual", 4)):
        grown = [len(after["folded:x.q.right"]) for *_, after in rounds(name, 3)]
        assert grown == [step, 2 * step, 3 * step]
    *_, after = list(rounds("stack", 9))[-1]
    assert set(folded_parts(after)["x.q"]) == {WHOLE}
    assert sum(array.size for n, array in after.items() if is_folded(n)) <= 80 * 90 + 10 * 30


def test_stack_begins_anew_and_residual_goes_on():
    a, b = pairs(SHAPES)[1]
    _, before, ends, after = next(rounds("stack", 1))
    assert not after[b].any() and 0 < np.abs(after[a]).max() <= 1 / np.sqrt(90)
    assert not np.array_equal(after[a], list(rounds("stack", 2))[1][3][a]), (
        "each round trains other directions"
    )
    _, before, ends, after = next(rounds("residual", 1))
    share = {c: w / sum(WEIGHTS.values()) for c, w in WEIGHTS.items()}
    np.testing.assert_allclose(after[b], sum(share[c] * ends[c][b] for c in share), rtol=0, atol=1e-6)


def test_what_a_folded_product_became_more():
    """Whatever form it had before and has after."""
    rng = np.random.default_rng(0)
    left = rng.standard_normal((8, 2)).astype(np.float32)
    right = rng.standard_normal((2, 9)).astype(np.float32)
    forms = [{}, fold({}, left, right), fold({}, -left, right), fold(fold({}, left, right), left, 2 * right)]
    forms += [{WHOLE: left @ right}]
    assert all(form.keys() == {LEFT, RIGHT} for form in forms[1:4])

    def dense(form):
        if WHOLE in form:
            return form[WHOLE]
        return form[LEFT] @ form[RIGHT] if form else np.zeros((8, 9))

    for before in forms:
        for after in forms:
            if WHOLE in before and WHOLE not in after:
                continue  # a whole product never becomes factors again
            factors, whole = folded_delta(before, after)
            found = sum((one @ other for one, other in factors), np.zeros((8, 9))) + (
                0 if whole is None else whole
            )
            np.testing.assert_allclose(found, dense(after) - dense(before), rtol=0, atol=1e-6)


class SendingLink:
    """The link of the participant that sends a state; records what it sends."""

    def __init__(self):
        self.sent = []

    def share(self, vector, priority):
        self.sent.append(vector)
        return vector


class ReceivingLink:
    """The link of another participant, which must know each length before it receives."""

    def __init__(self, sent):
        self.sent = list(sent)

    def share(self, vector, priority):
        sent = self.sent.pop(0)
        assert (vector.shape, vector.dtype) == (sent.shape, sent.dtype)
        return sent


def packed(state):
    return Layout.of({f"global/{name}": array for name, array in state.items()})


def test_who_resumes_learns_what_is_folded():
    """A participant without the state, and one whose own state is of another round."""
    states = [after for *_, after in rounds("stack", 4)]
    offered = packed(states[3])
    fresh = packed(trainable(states[3]))
    sender = SendingLink()
    assert shared_layout(sender, fresh, offered, 4.0) == offered
    for known, own, priority in (
        (fresh, None, 0.0),
        (fresh, packed(states[1]), 2.0),
        (packed(states[2]), None, 0.0),
    ):
        assert shared_layout(ReceivingLink(sender.sent), known, own, priority) == offered
    assert fits(offered, fresh) and fits(packed(states[0]), offered)
    assert not fits(packed({**states[0], B: states[0][B][:5]}), offered)
    nobody = SendingLink()
    nobody.share = lambda vector, priority: None
    assert shared_layout(nobody, offered, None, 0.0) == fresh


@pytest.mark.parametrize(
    "text",
    [
        '[["global/folded:x.q.whole", [80]]]',
        '[["global/folded:x.q.whole", [80.0, 90]]]',
        '[["global/folded:x.q.whole", [90, 80]]]',
        '[["global/folded:x.q.whole", [80, 90]], ["global/folded:x.q.left", [80, 1]]]',
        '[["folded:x.q.whole", [80, 90]]]',
        '[["global/folded:x.z.whole", [80, 90]]]',
        '[["global/x.q.lora_A.default.weight", [1, 1]]]',
        '[["global/folded:x.q.other", [80, 90]]]',
        '[["global/folded:x.q.left", [80, 9]]]',
        '[["global/folded:x.q.left", [80, 9]], ["global/folded:x.q.right", [8, 90]]]',
        '[["global/folded:x.q.left", [80, 0]], ["global/folded:x.q.right", [0, 90]]]',
        '[["global/folded:x.q.left", [80, 43]], ["global/folded:x.q.right", [43, 90]]]',
        "[[7, [80, 90]]]",
        "[" * 100_000,
        '[["global/folded:x.q.whole", ' + "[" * 40 + "]" * 40 + "]]",
        "5",
        "null",
        '{"ab": 1}',
        "{",
        "[1]",
    ],
    ids=lambda text: text[:40],
)
def test_nothing_else_is_learned(text):
    sent = [np.array([float(len(text))]), np.frombuffer(text.encode(), np.uint8)]
    with pytest.raises(JournalError, match="--fresh"):
        shared_layout(ReceivingLink(sent), packed(drawn(1)), None, 0.0)


@pytest.mark.parametrize("length", [np.nan, np.inf, -1.0, 0.0, 2.5, 2.0**20 + 1, 1e15])
def test_no_memory_is_taken_for_a_length_that_is_none(length):
    with pytest.raises(JournalError, match="of at most 1048576"):
        shared_layout(ReceivingLink([np.array([length])]), packed(drawn(1)), None, 0.0)


@pytest.mark.parametrize("name", ["stack", "residual"])
def test_one_adapter_has_the_same_products(name):
    """With one rank for all modules, wherever the folded adapter is whole."""
    *_, state = list(rounds(name, 4))[-1]
    one = as_one_adapter(state)
    assert one.keys() == SHAPES.keys() == trainable(state).keys()
    assert len({len(one[a]) for a, _ in pairs(SHAPES)}) == 1 and one["x.q.lora_B.default.bias"].shape == (80,)
    for a, b in pairs(SHAPES):
        found = one[b].astype(np.float64) @ one[a]
        np.testing.assert_allclose(found, product(state, a, b), rtol=0, atol=1e-6 * np.abs(found).max())
