"""Whole runs: `stack` and `residual` against the same rounds in plain torch with every product merged into
the base, and a clipped one.
"""

import numpy as np
import pytest

from fedspeed.models.factors import pairs
from fedspeed.models.folded import is_folded, module_of
from tests.federation.runs import largest, run_worlds, settings, share_of, tiny_llama

ROUNDS = 2
STEPS = 2
SCALE = 2.0


def by_rounds(world, configs, folder):
    """By name: (global state at the start and after every round, records, the best round)."""
    from tests.federation.runs import course

    played = {
        name: course(world, name, config, carries={0: (0, 1, 2)}, folder=folder, kind="ram")
        for name, config in configs.items()
    }
    return {name: (found.states, found.records, found.best_round) for name, found in played.items()}


def by_hand(world, config, name, start, states):
    """(ends of every round's A and B, held-out loss) of plain torch. `states`: for the A that `stack` draws
    anew.
    """
    import torch

    from tests.federation.plain import Plain

    plain = Plain(config)
    whole = sum(share_of(c) for c in range(3))
    state = start
    ends = []
    weights = {
        n.removesuffix(".base_layer.weight"): p
        for n, p in plain.model.named_parameters()
        if ".base_layer." in n
    }
    for number in range(ROUNDS):
        trained = []
        for client in range(3):
            plain.load(state)
            plain.local_steps(client, number * STEPS, STEPS)
            trained.append((share_of(client) / whole, plain.state()))
        mean = {n: sum(p * end[n].astype(np.float64) for p, end in trained) for n in start}
        state = dict(mean)
        for a, b in pairs(start):
            product = sum(p * (end[b].astype(np.float64) @ end[a]) for p, end in trained)
            if name == "stack":
                state[a] = states[number][a]
                state[b] = np.zeros_like(mean[b])
            else:
                product -= mean[b] @ mean[a]
            with torch.no_grad():
                weights[module_of(a)] += torch.from_numpy(SCALE * product).float()
        state = {n: t.astype(np.float32) for n, t in state.items()}
        ends.append(state)
    plain.load(state)
    return ends, plain.held_out_loss()


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    base = tiny_llama(tmp_path_factory.mktemp("base") / "llama")
    options = {name: {"method": {"name": name}} for name in ("stack", "residual")}
    options["epochs"] = {"round_budget": "epoch"}
    options["clip"] = {"updates": ({"name": "clip", "norm": 0.003},)}
    train = {"epochs": {"schedule": "linear", "lr": 0.05}}
    configs = {
        name: settings(base, train=train.get(name), federation={"rounds": ROUNDS, **own})
        for name, own in options.items()
    }
    return configs, run_worlds((1,), by_rounds, configs, str(tmp_path_factory.mktemp("runs")))[0]


@pytest.mark.parametrize("name", ["stack", "residual"])
def test_a_run_learns_what_merging_every_product_would(played, name):
    """And evaluates, from round to round, what it has learned."""
    config = played[0][name]
    (states, records, best) = played[1][name]
    [(ends, expected)] = run_worlds((1,), by_hand, config, name, states[0], states[1:])
    for state, end in zip(states[1:], ends, strict=True):
        assert largest({n: state[n] for n in end}, end) < 2e-6
    assert records[-1].val_loss == pytest.approx(expected, rel=2e-6)
    assert best == ROUNDS and any(map(is_folded, states[-1]))


def test_a_run_clips_what_its_clients_send(played):
    """No round moves the state further than the longest delta that a client may send."""
    states, records, _ = played[1]["clip"]
    assert all(0.001 < record.update_norm <= 0.003 for record in records[1:])
    assert played[1]["residual"][1][1].update_norm > 0.03, "else it would be further"
    assert not any(map(is_folded, states[-1]))


def averaged(world, config, start):
    from tests.federation import plain

    return plain.fedavg(config, start)


def test_a_round_may_be_an_epoch_of_each_clients_rows(played):
    """Clients of 11, 5 and 7 rows are trained at the same time, for 6, 3 and 4 steps of 2 rows: a client that
    has finished stays as it is, with its momentum, until the others have; the next round goes on in the next
    rows of each.
    """
    config = played[0]["epochs"]
    states, records, _ = played[1]["epochs"]
    [expected] = run_worlds((1,), averaged, config, states[0])
    assert largest(states[-1], expected) < 2e-6 < largest(states[-1], states[0]) / 1000
    for record in records[1:]:
        assert [client.local_steps for client in record.per_client] == [6, 3, 4]
    assert [record.lr for record in records[1:]] == pytest.approx([0.05, 0.025])
