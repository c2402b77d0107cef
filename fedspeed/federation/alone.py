"""What federation is worth: every client trained on its own rows only, beside the federated model, on the held-out rows of all clients.

For simulations: it reads every client's held-out rows on every rank, which in a real federation nobody may.
"""

from dataclasses import dataclass

import numpy as np

from fedspeed import activity
from fedspeed.data.batches import eval_batches
from fedspeed.data.clients import ClientData
from fedspeed.engine.client_engine import Sums
from fedspeed.federation import rules
from fedspeed.federation.rounds import Federation, Tensors, as_arrays, as_torch

WORDS = ("loss", "tokens", "exact", "rows")


@dataclass(frozen=True)
class Score:
    """Of one model on the held-out rows of all clients."""

    name: str
    held_out_loss: float
    accuracy: float  # share of answers that greedy decoding gives exactly


def compare(federation: Federation, begin: Tensors, federated: Tensors, everyone: list[ClientData], link) -> list[Score]:
    """Scores of the start, of each client alone (as many local steps as the federated run, optimizer kept), and of the federated model.

    Collective over all ranks of the run; each trains its own clients.
    """
    engine, config, seat = federation.engine, federation.config, federation.seat
    steps = config.federation.rounds * federation.steps_per_round
    rule = config.federation.aggregation
    still = rules.held(rule, 1, begin) if rule == "freeze_a" else frozenset()  # a client alone need not alternate
    table = np.zeros((config.data.clients + 2, len(WORDS)))
    rows = [eval_batches(d.val, config.train.micro_batch, d.pad_id, d.limit) for d in everyone]

    clients, alone = list(seat.clients), {}
    turns = -(-len(clients) // engine.client_slots)
    with (activity.during("the training of each client alone", turns * steps, "local step"),
          engine.lockstep(engine.train_passes(len(clients), steps, config.train.accumulation), backward=True)):
        for first in range(0, len(clients), engine.client_slots):
            together = clients[first:first + engine.client_slots]
            for number, client in enumerate(together):
                federation.begin_turn(client, 0, begin, None, still, number)
            federation.local_steps(together, 0, steps)
            alone |= {client: as_arrays(engine.state(number)) for number, client in enumerate(together)}
    mine = [(client + 1, state) for client, state in alone.items()]
    if 0 in seat.clients:  # all ranks of one client: passes are matched between them
        mine += [(0, begin), (config.data.clients + 1, federated)]
    with (activity.during("the evaluation of each client alone", sum(map(len, rows)) * len(mine), "batch"),
          engine.lockstep(engine.eval_passes(rows) * len(mine), backward=False)):
        for row, state in mine:
            engine.load(as_torch(state))
            sums = sum(engine.evaluate(rows), Sums())
            if seat.gateway:
                table[row] = [getattr(sums, w) for w in WORDS]
    total = link.sum(table.reshape(-1), 0.0).vector.reshape(table.shape)
    names = ["before", *(f"client {c} alone" for c in range(config.data.clients)), "federated"]
    return [Score(n, float(t[0] / t[1]), float(t[2] / t[3])) for n, t in zip(names, total)]
