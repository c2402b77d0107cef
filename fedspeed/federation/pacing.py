"""How many local steps clients take in a round, and what is made of it that they take different numbers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fedspeed.config.run import RunConfig
from fedspeed.data.config import local_steps_of
from fedspeed.federation.config import FederationConfig
from fedspeed.federation.methods.config import METHODS

FIRST_STEPS = 2  # of a run with a budget of seconds, before it knows how long a step takes


def fitting_steps(budget_s: float, pass_s: float | None, *, turns: int, limit: int) -> int:
    """Return how many local steps fit into a budget of seconds, from 1 to `limit`.

    Args:
        pass_s: seconds of a local step of as many clients as train at a time, None where nobody knows yet.
        turns: how often clients have to take turns on this rank, 0 if none of them trains: others decide.
    """
    if not turns:
        return limit
    fitting = FIRST_STEPS if pass_s is None else int(budget_s / (pass_s * turns))
    return max(1, min(limit, fitting))


def is_evaluated(federation: FederationConfig, round: int) -> bool:
    """Say whether the state after a round is evaluated."""
    return round == federation.rounds or round % federation.evaluate_every == 0


def is_uneven(config: RunConfig) -> bool:
    """Say whether clients may take different numbers of steps in a round and count by their rows all the
    same.
    """
    differs = config.train.local_steps_by_cluster or config.federation.round_budget == "seconds"
    return METHODS[config.federation.method.name].adds_deltas and bool(differs)


def fednova_scale(weight: float, weighted_steps: float, local_steps: int) -> float:
    """Return what the mean delta is multiplied by: the mean number of steps, of that all deltas were brought
    to.

    A client that takes more steps moves further, and would count for more than its rows do. So deltas are
    brought to one number of steps before they are summed, and the mean is multiplied by the mean number of
    steps (FedNova; Wang et al., NeurIPS 2020).

    Args:
        weight, weighted_steps: sums over all clients of their weights, and of weight times steps taken.
        local_steps: the number that deltas were brought to.
    """
    return float(weighted_steps / weight / local_steps)


class Pace:
    """Decides for one rank how many steps its clients take, by the time that the last ones took."""

    def __init__(self, config: RunConfig, cluster: str, engine):
        self._config = config
        self._engine = engine
        self._most = local_steps_of(config.train, cluster)
        self._is_uneven = is_uneven(config)
        self._pass_s: float | None = None

    def steps(self, clients: int) -> int:
        """Return how many local steps this rank's clients take in a round in which `clients` of them train.

        Collective over the ranks that make their passes together: they agree on the least.
        """
        federation = self._config.federation
        if federation.round_budget == "steps":
            return self._most
        fitting = fitting_steps(
            federation.round_seconds, self._pass_s, turns=self._turns(clients), limit=self._most
        )
        return self._engine.agree_least(fitting)

    @contextmanager
    def measured(self, clients: int, steps: int) -> Iterator[None]:
        """Measure the local steps that are taken inside."""
        begin = time.perf_counter()
        yield
        if clients:
            self._pass_s = (time.perf_counter() - begin) / steps / self._turns(clients)

    def factor(self, steps: int) -> float | None:
        """Return what a client's delta is multiplied by that took so many steps; None: nothing of it is asked
        for but that it is sent.
        """
        if self._is_uneven:
            return self._config.train.local_steps / steps
        return 1.0 if self._config.federation.staleness else None

    def scale(self, link, weight: float, weighted_steps: float) -> float:
        """Return `fednova_scale` of all ranks' clients, 1.0 where all take one number of steps.
        Collective.
        """
        if not self._is_uneven:
            return 1.0
        weight, steps = link.sum(np.array([weight, weighted_steps]), 0.0).vector
        return fednova_scale(weight, steps, self._config.train.local_steps)

    def _turns(self, clients: int) -> int:
        """Return how often `clients` take turns in the engine's client slots."""
        return -(-clients // self._engine.client_slots)
