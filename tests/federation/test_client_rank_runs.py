"""Whole runs of clients with LoRA ranks 4, 2 and 1, against the same rounds in plain torch."""

from dataclasses import replace

import numpy as np
import pytest

from fedspeed.models.factors import pairs
from fedspeed.models.folded import module_of
from fedspeed.models.lora_ranks import of_rank
from tests.federation.runs import run_worlds, settings, share_of, tiny_llama
from tests.models.products import products

METHODS = ("stack", "flexlora")
RANKS = (4, 2, 1)
ROUNDS = 2
STEPS = 2
SCALE = 2.0
# World rank -> clients. On two ranks, the second has an engine of rank 2, which client 2 shares.
LAYOUTS = {"one rank": ((1,), {0: (0, 1, 2)}), "two ranks": ((1, 1), {0: (0,), 1: (1, 2)})}


def by_method(world, configs, carries, folder):
    """By method: (global states, records), on the reporting rank."""
    from tests.federation.runs import course

    played = {
        name: course(world, f"{name} {len(carries)}", config, carries=carries, folder=folder, kind="ram")
        for name, config in configs.items()
    }
    return {name: (found.states, found.records) for name, found in played.items()}


def by_hand(world, config, states):
    """Return, for each round, the mean of the clients' products by factor A; and the held-out loss of the
    last state. A client's LoRA has its own rank, with the rest of the common products merged into the base.
    """
    from tests.federation.plain import Plain

    whole = sum(share_of(c) for c in range(3))
    means = []
    for number in range(ROUNDS):
        state = states[number]
        mean = dict.fromkeys(products(state), 0.0)
        for client, lora_rank in enumerate(RANKS):
            plain = Plain(replace(config, adapter=of_rank(config.adapter, lora_rank)))
            rest = add_rest(plain, state, lora_rank)
            plain.local_steps(client, number * STEPS, STEPS)
            for a, product in products(plain.state()).items():
                mean[a] = mean[a] + share_of(client) / whole * (product + rest[a])
        means.append(mean)
    plain = Plain(replace(config, adapter=of_rank(config.adapter, 1)))
    add_rest(plain, states[-1], 1)
    return means, plain.held_out_loss()


def add_rest(plain, state, lora_rank):
    """Load the first directions of a state, and merge the others into the base. Return these, by A."""
    import torch

    weights = {
        name.removesuffix(".base_layer.weight"): parameter
        for name, parameter in plain.model.named_parameters()
        if ".base_layer." in name
    }
    loaded = {}
    rest = {}
    for a, b in pairs(name for name in state if ":" not in name):
        loaded[a] = state[a][:lora_rank].copy()
        loaded[b] = state[b][:, :lora_rank].copy()
        rest[a] = products(state)[a] - loaded[b].astype(np.float64) @ loaded[a]
        with torch.no_grad():
            weights[module_of(a)] += torch.from_numpy(SCALE * rest[a]).float()
    plain.load(loaded)
    return rest


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    base = tiny_llama(tmp_path_factory.mktemp("base") / "llama")
    by_client = {str(client): lora_rank for client, lora_rank in enumerate(RANKS) if lora_rank != RANKS[0]}
    configs = {
        name: settings(
            base,
            adapter={"rank_by_client": by_client},
            federation={"rounds": ROUNDS, "method": {"name": name}},
        )
        for name in METHODS
    }
    runs = {}
    for layout, (clusters, carries) in LAYOUTS.items():
        folder = str(tmp_path_factory.mktemp("runs"))
        runs[layout] = run_worlds(clusters, by_method, configs, carries, folder)[0]
    return configs, runs


@pytest.mark.parametrize("name", METHODS)
def test_a_run_trains_every_client_at_its_rank(played, name):
    configs, runs = played
    states, records = runs["two ranks"][name]
    [(means, loss)] = run_worlds((1,), by_hand, configs[name], states)
    for state, mean in zip(states[1:], means, strict=True):
        for a, product in products(state).items():
            expected = mean[a]
            if name == "flexlora":
                u, values, vt = np.linalg.svd(expected, full_matrices=False)
                expected = (u[:, : RANKS[0]] * values[: RANKS[0]]) @ vt[: RANKS[0]]
            assert np.abs(product - expected).max() < 2e-6
    assert records[-1].val_loss == pytest.approx(loss, rel=2e-6), "on engines of rank 4 and 2 alike"


@pytest.mark.parametrize("name", METHODS)
def test_clients_that_share_an_engine_train_as_on_their_own(played, name):
    _, runs = played
    for one, other in zip(runs["one rank"][name][0], runs["two ranks"][name][0], strict=True):
        for a, product in products(one).items():
            assert np.abs(product - products(other)[a]).max() < 2e-6
    losses = [[record.val_loss for record in run[name][1]] for run in runs.values()]
    assert losses[0] == pytest.approx(losses[1], rel=2e-6) and len(losses[0]) == ROUNDS + 1
