"""What federation is worth: every client trained on its own rows only, beside the federated model, on the
held-out rows of all clients.

For simulations: it reads every client's held-out rows on every rank, which in a real federation nobody may.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed import activity
from fedspeed.config.run import RunConfig
from fedspeed.data.batches import Batch, eval_batches
from fedspeed.data.clients import ClientData
from fedspeed.engine.client_engine import ClientEngine, Sums
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.link import ClientLink
from fedspeed.federation.methods.base import Turn, make_method
from fedspeed.federation.role import RankRole
from fedspeed.federation.tensors import as_torch
from fedspeed.federation.trainer import Trainer

FIELDS = ("loss", "tokens", "exact", "rows")  # of a model's sums over all held-out rows


@dataclass(frozen=True)
class Score:
    """One model on the held-out rows of all clients; `accuracy` is the share of answers that greedy decoding
    gives exactly."""

    name: str
    held_out_loss: float
    accuracy: float


def compare(
    config: RunConfig,
    role: RankRole,
    engine: ClientEngine,
    link: ClientLink,
    *,
    start: Arrays,
    federated: Arrays,
    everyone: Sequence[ClientData],
) -> list[Score]:
    """Return scores of the start, of each client alone (as many local steps as the federated run, its
    optimizer kept), and of the federated model.

    Collective over all ranks of the run; each trains its own clients.

    Args:
        everyone: rows of all clients of the run, by client number.
    """
    alone = train_alone(config, role, engine, start)
    mine = [(client + 1, state) for client, state in alone.items()]
    if 0 in role.clients:  # all ranks of one client: passes are matched between them
        mine += [(0, start), (config.data.clients + 1, federated)]
    rows = [eval_batches(data.val, config.train.micro_batch, data.pad_id, data.limit) for data in everyone]
    table = np.zeros((config.data.clients + 2, len(FIELDS)))
    for number, sums in _evaluated(engine, mine, rows):
        if role.gateway:
            table[number] = [getattr(sums, name) for name in FIELDS]
    total = link.sum(table.reshape(-1), 0.0).vector.reshape(table.shape)
    names = ["before", *(f"client {client} alone" for client in range(config.data.clients)), "federated"]
    return [
        Score(name, float(loss / tokens), float(exact / count))
        for name, (loss, tokens, exact, count) in zip(names, total)
    ]


def train_alone(config: RunConfig, role: RankRole, engine: ClientEngine, start: Arrays) -> dict[int, Arrays]:
    """Return what each client of this rank comes to without the others, by client."""
    method = make_method(config.federation.method, start, clients=config.data.clients, seed=config.run.seed)
    trainer = Trainer(config, role, engine, method)
    steps = config.federation.rounds * trainer.steps_per_round
    turns = [
        Turn(
            client=client,
            round=0,
            start=start,
            frozen=method.frozen(1) & method.frozen(2),  # a client alone need not alternate
            steps=steps,
            seed=trainer.seed(client, 0),
            memory={},
        )
        for client in role.clients
    ]
    count = -(-len(turns) // engine.client_slots)
    with activity.during("the training of each client alone", count * steps, "local step"):
        ended = [pair for together in trainer.train(turns) for pair in together]
    return {turn.client: trained.end for turn, trained in ended}


def _evaluated(engine: ClientEngine, models: Sequence[tuple[int, Arrays]], rows: Sequence[list[Batch]]):
    """Evaluate models on everybody's rows; yields (number, sums) of each. Collective over the ranks that
    share the base."""
    with (
        activity.during("the evaluation of each client alone", sum(map(len, rows)) * len(models), "batch"),
        engine.lockstep(engine.eval_passes(rows) * len(models), backward=False),
    ):
        for number, state in models:
            engine.load(as_torch(state))
            yield number, sum(engine.evaluate(rows), Sums())
