"""Decisions that depend on the round's number alone: who is asked, in which order, and how fast the clients
learn.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fedspeed.data.config import TrainConfig


def sample(seed: int, round: int, clients: int, asked: int) -> tuple[int, ...]:
    """Return the clients of a round, drawn without replacement from (seed, round); all of them where
    `asked` is 0.
    """
    if asked in (0, clients):
        return tuple(range(clients))
    rng = np.random.default_rng([seed, 0x5A3, round])
    return tuple(sorted(rng.choice(clients, asked, replace=False).tolist()))


def lr_at(train: TrainConfig, step: int, total: int) -> float:
    """Return the learning rate of local step `step` of `total`, both over the whole run: linear warm-up, then
    the schedule down to zero.
    """
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, total - train.warmup_steps)
    factors = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return train.lr * factors[train.schedule]


def turn_order(asked: Sequence[int], speakers: Sequence[int]) -> tuple[int, ...]:
    """Return the clients of a round in the order in which their turns come: the first of every participant,
    then the second of each, and so on. Ranks that share a base take their turns at the same time.

    Args:
        speakers: by client of the whole run, the participant that carries it.
    """
    before: Counter[int] = Counter()
    place = {}
    for client in asked:
        place[client] = before[speakers[client]]
        before[speakers[client]] += 1
    return tuple(sorted(asked, key=lambda client: (place[client], client)))
