"""One round of a method on tensors that are made up, without an engine, for the tests of methods."""

import numpy as np

from fedspeed.federation.methods.base import make_method
from fedspeed.federation.methods.config import variant_of

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
    """Return random tensors of these shapes."""
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


RULES = ("avg_factors", "freeze_a", "alternate")


def variant(name):
    """Return the configuration of a method, or of a rule of `lora_average`."""
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
    """Return the names that a method or rule freezes in a round."""
    return Round(name, shapes, round=round).frozen


def aggregate(rule, start, ends, weights=WEIGHTS):
    """Return the result of one sum over all clients in `ends`."""
    total = np.sum(
        [rule.contribution(c, weights[c], start, end).astype(np.float64) for c, end in ends.items()], axis=0
    )
    return rule.result(start, total.astype(np.float32), sum(weights[c] for c in ends))


def trained(name, round=1, clients=(0, 1, 2), scale=0.1):
    """Return (start, state of each client after its turn); frozen tensors keep their values."""
    start = drawn(99)
    stays = frozen(name, round)
    return start, {
        c: {n: t if n in stays else t + drawn(c, scale=scale)[n] for n, t in start.items()} for c in clients
    }


def weighted_mean(ends, weights=WEIGHTS):
    """Return the weighted mean of each tensor, in float64."""
    total = sum(weights[c] for c in ends)
    return {n: sum(weights[c] / total * end[n].astype(np.float64) for c, end in ends.items()) for n in SHAPES}


def mean_product(ends, a, b, weights=WEIGHTS):
    """Return the weighted mean of the products of a matrix's factors, in float64."""
    total = sum(weights[c] for c in ends)
    return sum(
        weights[c] / total * (end[b].astype(np.float64) @ end[a].astype(np.float64))
        for c, end in ends.items()
    )
