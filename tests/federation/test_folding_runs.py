"""`stack` and `residual` through an engine, against the same rounds in plain torch with every product merged into the base."""

import numpy as np
import pytest

from fedspeed.federation.methods.base import make_method
from fedspeed.federation.methods.config import arm_of
from fedspeed.models.factors import pairs
from fedspeed.models.folded import module_of, trainable
from tests.federation.runs import client_data, largest, run_worlds, settings, share_of, stirred, tiny_llama

ROUNDS, STEPS, SCALE = 2, 2, 2.0


def by_engine(world, config, name, folder):
    """(start, global state after every round, held-out loss of the last one, and without what is folded)."""
    import torch

    from fedspeed.data.batches import client_step, eval_batches
    from tests.engine.engines import engine

    def as_torch(arrays):
        return {n: torch.from_numpy(t) for n, t in arrays.items()}

    train, states = config.train, []
    given = {"adapter": config.adapter, "train": train, "join": False, "nvme": folder, "seats": 3}
    with engine(config.model.base, "ram", **given) as own:
        start = state = stirred({n: t.numpy() for n, t in own.state().items()})
        method = make_method(arm_of(name)(), state, clients=3, seed=config.run.seed)
        for number in range(1, ROUNDS + 1):
            turns = [method.turn(c, number, state, steps=STEPS, seed=0, memory={}) for c in range(3)]
            for turn in turns:
                own.load(as_torch(turn.start), slot=turn.client)
            for step in range((number - 1) * STEPS, number * STEPS):
                rows = [
                    client_step(client_data(c), config.run.seed, c, step, train.micro_batch, 1, 1, 0)
                    for c in range(3)
                ]
                own.train_step(rows, train.lr)
            ends = [{n: t.numpy() for n, t in own.state(c).items()} for c in range(3)]
            total = sum(method.encode(turn, end, share_of(turn.client)) for turn, end in zip(turns, ends))
            weight = sum(share_of(c) for c in range(3))
            state = method.aggregate(state, total, weight, round=number).state
            states.append(state)
        losses = []
        for told in (state, trainable(state)):
            own.load(as_torch(told))
            sums = own.evaluate([eval_batches(client_data(c).val, 2, 0, 512) for c in range(3)])
            losses.append(sum(s.loss for s in sums) / sum(s.tokens for s in sums))
        own.close()
    return start, states, *losses


def by_hand(world, config, name, start, states):
    """(ends of every round's A and B, held-out loss) of plain torch. `states`: for the A that `stack` draws anew."""
    import torch

    from tests.federation.plain import Plain

    plain, whole, state, ends = Plain(config), sum(share_of(c) for c in range(3)), start, []
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
                state[a], state[b] = states[number][a], np.zeros_like(mean[b])
            else:
                product -= mean[b] @ mean[a]
            with torch.no_grad():
                weights[module_of(a)] += torch.from_numpy(SCALE * product).float()
        state = {n: t.astype(np.float32) for n, t in state.items()}
        ends.append(state)
    plain.load(state)
    return ends, plain.held_out_loss()


@pytest.mark.parametrize("name", ["stack", "residual"])
def test_a_run_learns_what_merging_every_product_would(tmp_path, name):
    config = settings(tiny_llama(tmp_path / "base"), federation={"rounds": ROUNDS})
    [(start, states, loss, without)] = run_worlds((1,), by_engine, config, name, tmp_path)
    [(ends, expected)] = run_worlds((1,), by_hand, config, name, start, states)
    for state, end in zip(states, ends):
        assert largest({n: state[n] for n in end}, end) < 2e-6
    assert loss == pytest.approx(expected, rel=2e-6)
    assert abs(without / expected - 1) > 5e-6, "what is folded matters"
