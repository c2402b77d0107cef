"""Server optimizers against a literal transcription of the papers, in float64, over several rounds."""

import numpy as np
import pytest

from fedspeed.federation import server_optimizer
from fedspeed.federation.config import FederationConfig

NAMES = {"a": (4, 3), "b": (5,)}
ROUNDS = 6


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in NAMES.items()}


def changes(round):
    """The clients' mean change in a round: large and small in turn, so that yogi's sign takes both values."""
    return {n: np.float32(0.3 if round % 2 else 0.01) * d for n, d in drawn(100 + round).items()}


def clients_end(round, x):
    return {n: x[n] + d for n, d in changes(round).items()}


def plain_step(config, x, deltas):
    for delta in deltas:
        x = x + config.server_lr * delta
    return x


def fedavgm(config, x, deltas):
    """Hsu et al., 2019: v <- beta v + mean change; w <- w + v (here with a step size)."""
    v = np.zeros_like(x)
    for delta in deltas:
        v = config.server_momentum * v + delta
        x = x + config.server_lr * v
    return x


def fedadaptive(config, x, deltas):
    """Reddi et al., 2021, algorithm 2."""
    beta1 = config.server_momentum
    beta2 = config.server_beta2
    tau = config.server_tau
    eta = config.server_lr
    m = np.zeros_like(x)
    v = np.full_like(x, tau**2)
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        if config.server_optimizer == "yogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + eta * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize(
    ("kind", "lr", "paper"),
    [
        ("none", 0.5, plain_step),
        ("momentum", 1.0, fedavgm),
        ("momentum", 0.3, fedavgm),
        ("adam", 0.05, fedadaptive),
        ("yogi", 0.05, fedadaptive),
    ],
)
def test_rounds_follow_the_paper(kind, lr, paper):
    config = FederationConfig(
        server_optimizer=kind, server_lr=lr, server_momentum=0.8, server_beta2=0.95, server_tau=1e-2
    )
    x = drawn(1)
    state = server_optimizer.init(config, x)
    for round in range(ROUNDS):
        state, x = server_optimizer.update(config, state, x, clients_end(round, x))
    for n in NAMES:
        begin = drawn(1)[n].astype(np.float64)
        expected = paper(config, begin, [changes(r)[n].astype(np.float64) for r in range(ROUNDS)])
        assert x[n].dtype == np.float32
        np.testing.assert_allclose(x[n], expected, rtol=0, atol=3e-6)
        assert np.abs(expected - begin).max() > 0.05, "the rounds must move something"


def test_plain_step_of_one_is_exactly_the_aggregate():
    """Old + (aggregate - old) is not the aggregate in floating point."""
    config = FederationConfig()
    old = {"a": np.array([1e8, 1.0], dtype=np.float32)}
    aggregate = {"a": np.array([1.0, 1e-8], dtype=np.float32)}
    state, new = server_optimizer.update(config, server_optimizer.init(config, old), old, aggregate)
    assert state == {} and new.keys() == old.keys()
    assert new["a"].tobytes() == aggregate["a"].tobytes()


@pytest.mark.parametrize("kind", ["none", "momentum", "adam", "yogi"])
def test_frozen_names_do_not_move(kind):
    """Momentum left from the round in which `b` was trained must not move it in the one in which it is
    not.
    """
    config = FederationConfig(server_optimizer=kind, server_lr=0.1)
    x = drawn(1)
    state, x = server_optimizer.update(config, server_optimizer.init(config, x), x, clients_end(0, x))
    kept = {k: v["b"].tobytes() for k, v in state.items()}
    aggregate = clients_end(1, x) | {"b": x["b"]}
    state, new = server_optimizer.update(config, state, x, aggregate, frozenset({"b"}))
    assert new["b"].tobytes() == x["b"].tobytes()
    assert {k: v["b"].tobytes() for k, v in state.items()} == kept
    assert (new["a"] != x["a"]).all()


def test_update_leaves_its_arguments_alone():
    """The journal and the next round read the old values after the step."""
    config = FederationConfig(server_optimizer="adam")
    x = drawn(1)
    state = server_optimizer.init(config, x)
    copies = (
        {n: t.copy() for n, t in x.items()},
        {k: {n: t.copy() for n, t in ts.items()} for k, ts in state.items()},
    )
    server_optimizer.update(config, state, x, clients_end(0, x))
    for n in NAMES:
        np.testing.assert_array_equal(x[n], copies[0][n])
        for moment in ("m", "v"):
            np.testing.assert_array_equal(state[moment][n], copies[1][moment][n])
