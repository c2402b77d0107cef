"""The clients of a cluster share one pipeline, and each trains as it would alone."""

import numpy as np
import pytest

from fedspeed.engine.config import EngineConfig
from tests.engine.engines import engine
from tests.engine.small_models import DETERMINED, LORA, stirred
from tests.processes import run_clusters
from tests.tiny import random_step

RATE = 0.1


def a_clients_step(client: int, number: int):
    step = random_step(10 * client + number, 2, 1 + client)
    step.micro[0].attention_mask[1, -3 - client :] = 0
    step.micro[0].labels[1, -3 - client :] = -100
    return step


def scaled_turns(rank, base, clients):
    """Return for two turns which steps were taken, from a loss scale that is too large at first, and the
    length of the update.
    """
    scope = "cluster" if len(clients) > 1 else "none"
    with engine(
        base,
        "resident",
        "fp16",
        clients=tuple((r,) for r in range(len(clients))),
        adapter=LORA,
        options=EngineConfig(pipeline=scope),
        fp16={"enabled": True, "initial_scale_power": 18},
    ) as client_engine:
        start = stirred(client_engine.state())
        found = []
        for _ in range(2):
            with client_engine.matched_passes(client_engine.train_passes(1, 6, 1), backward=True):
                client_engine.load(start, seed=1)
                taken = [
                    client_engine.train_step([a_clients_step(clients[rank], n)], 0.01)[0].steps
                    for n in range(6)
                ]
                found.append((
                    taken,
                    float(sum((t.double() - start[n]).abs().sum() for n, t in client_engine.state().items())),
                ))
        return found


def test_each_turn_of_a_cluster_begins_with_a_fresh_loss_scale(bases):
    found = run_clusters([2], scaled_turns, bases["llama"], [0, 1])
    for client in (0, 1):
        [expected] = run_clusters([1], scaled_turns, bases["llama"], [client])
        (taken, went), again = expected
        assert again == (taken, went) and 0 in taken and 1 in taken
        assert (
            found[client][0] == found[client][1]
            and found[client][0][0] == taken
            and found[client][0][1] == pytest.approx(went, rel=2e-2)
        )


def turn(client_engine, clients, start, steps):
    """Take a turn of the clients in this rank's client slots, in the order of the rounds; return (held-out
    sums under the start, losses by step, end states).
    """
    client_engine.load(start)
    with client_engine.matched_passes(
        client_engine.eval_passes([a_clients_step(c, 9).micro for c in clients]), backward=False
    ):
        before = client_engine.evaluate([a_clients_step(c, 9).micro for c in clients])
    losses = []
    ends = []
    with client_engine.matched_passes(client_engine.train_passes(len(clients), steps, 1), backward=True):
        for first in range(0, len(clients), client_engine.client_slots):
            together = clients[first : first + client_engine.client_slots]
            for client_slot, client in enumerate(together):
                client_engine.load(start, seed=client, slot=client_slot)
            losses.append([
                [s.loss for s in client_engine.train_step([a_clients_step(c, n) for c in together], RATE)]
                for n in range(steps)
            ])
            ends += [
                {n: v.detach().numpy() for n, v in client_engine.state(client_slot).items()}
                for client_slot in range(len(together))
            ]
    return before, losses, ends


def alone(rank, base, client, dtype="fp32", clip=0.0):
    with engine(
        base, "resident", dtype, adapter=LORA, train=DETERMINED, gradient_clipping=clip
    ) as client_engine:
        return turn(client_engine, [client], stirred(client_engine.state()), 3)


@pytest.mark.parametrize(
    "sets,carried,client_slots,options",
    [
        pytest.param([(0,), (1,)], [[0], [1]], 0, {}, marks=pytest.mark.slow),
        ([(0,), (1,), (2,)], [[0], [1], [2]], 0, {"cuts": (1, 2)}),
        (
            [(0,), (1,), (2,)],
            [[0], [], [2]],
            0,
            {"clip": 0.05},
        ),  # one takes no turn in this round, and computes for the others
        pytest.param([(0, 1), (2,)], [[0], [1]], 0, {"dtype": "bf16"}, marks=pytest.mark.slow),
        pytest.param([(0,), (1,)], [[0, 1, 2], [3]], 2, {"dtype": "fp16"}, marks=pytest.mark.slow),
    ],
)
def test_a_cluster_in_one_pipeline_trains_each_client_as_alone(bases, sets, carried, client_slots, options):
    filled = [
        clients or [9] for clients in carried
    ]  # a rank has a client slot whether or not its client takes a turn
    found = run_clusters(
        [sum(map(len, sets))],
        cluster_turn,
        bases["llama"],
        sets,
        filled,
        carried,
        client_slots=client_slots,
        options=options,
    )
    tolerance = 1e-5 if options.get("dtype", "fp32") == "fp32" else 2e-2
    for ranks, clients in zip(sets, carried):
        expected = [
            run_clusters(
                [1], alone, bases["llama"], c, options.get("dtype", "fp32"), options.get("clip", 0.0)
            )[0]
            for c in clients
        ]
        for rank in ranks:
            before, losses, ends = found[rank]
            assert len(ends) == len(clients)
            for at, (one_before, one_losses, one_ends) in enumerate(expected):
                assert max(np.abs(ends[at][n] - one_ends[0][n]).max() for n in one_ends[0]) < 20 * tolerance
                if rank == ranks[0]:
                    group, client_slot = divmod(at, client_slots or len(clients))
                    got = [step[client_slot] for step in losses[group]]
                    assert (
                        np.abs(np.array(got) / np.array([step[0] for step in one_losses[0]]) - 1).max()
                        < tolerance
                    )
                    assert (
                        before[at].loss == pytest.approx(one_before[0].loss, rel=tolerance)
                        and before[at].tokens == one_before[0].tokens
                    )
                else:
                    assert before[at].tokens == 0 and losses[0][0][0] == 0.0


def cluster_turn(rank, base, sets, filled, carried, *, client_slots, options):
    ranks = next(ranks for ranks in sets if rank in ranks)
    me = sets.index(ranks)
    engine_options = EngineConfig(
        pipeline="cluster", client_slots=client_slots, cuts=options.get("cuts", "auto")
    )
    with engine(
        base,
        "resident",
        options.get("dtype", "fp32"),
        clients=sets,
        adapter=LORA,
        train=DETERMINED,
        options=engine_options,
        client_slots=len(filled[me]),
        gradient_clipping=options.get("clip", 0.0),
    ) as client_engine:
        start = stirred(client_engine.state())
        turns = [turn(client_engine, carried[me], start, 3) for _ in range(2)]
        assert all(
            np.array_equal(a[n], b[n]) for a, b in zip(turns[0][2], turns[1][2]) for n in a
        )  # the previous turn leaves nothing behind
        return turns[0]
