"""Decisions that are functions of the round's number: which clients are sampled, in which order their turns
come, and the learning rate.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedspeed.config.run import RunConfig
from fedspeed.data.config import TrainConfig


def sample_clients(seed: int, round: int, clients: int, count: int) -> tuple[int, ...]:
    """Return the clients of a round in increasing order: `count` of `clients`, drawn without replacement from
    (seed, round); all of them where `count` is 0.
    """
    if count in (0, clients):
        return tuple(range(clients))
    rng = np.random.default_rng([seed, 0x5A3, round])
    return tuple(sorted(rng.choice(clients, count, replace=False).tolist()))


def lr_at(train: TrainConfig, step: int, total: int) -> float:
    """Return the learning rate of local step `step`, from 0, of `total`, both over the whole run: linear
    warm-up, then the schedule down to zero. A later step, as an audit of more rounds takes, has the last
    one's rate.
    """
    assert step >= 0, f"local step {step} is none of the run's {total}"
    step = min(step, total - 1)
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    factors = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return train.lr * factors[train.schedule]


def lr_in_run(config: RunConfig, step: int, steps_per_round: int) -> float:
    """Return the learning rate of a client's local step `step`, counted from 0 over the whole run.

    Where a round is an epoch, clients take different numbers of steps, and the rate changes once a round: it
    is then the same for all clients of a round.

    Args:
        steps_per_round: of the client.
    """
    rounds = config.federation.rounds
    if config.federation.round_budget == "epoch":
        return lr_at(config.train, step // steps_per_round, rounds)
    return lr_at(config.train, step, rounds * steps_per_round)


def turn_order(clients: Sequence[int], speakers: Sequence[int]) -> tuple[int, ...]:
    """Return the clients of a round in the order of their turns: the first client of every participant, then
    the second of each, and so on. Participants take their turns at the same time.

    Args:
        speakers: by client of the whole run, the participant that speaks for it.
    """
    earlier: Counter[int] = Counter()
    turn_numbers = {}
    for client in clients:
        turn_numbers[client] = earlier[speakers[client]]
        earlier[speakers[client]] += 1
    return tuple(sorted(clients, key=lambda client: (turn_numbers[client], client)))
