"""How many local steps clients take in a round, and how deltas of different numbers of steps are combined."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from fedspeed.config.run import RunConfig
from fedspeed.data.config import MAX_STEPS, local_steps_of
from fedspeed.federation.config import FederationConfig
from fedspeed.federation.contribution import Contribution
from fedspeed.federation.header import Header
from fedspeed.federation.link import ClientLink
from fedspeed.federation.methods.config import METHODS

if TYPE_CHECKING:  # the planner's commands and the configuration checks import this without torch
    from fedspeed.engine.client_engine import ClientEngine

FIRST_STEPS = 2  # of a round with a budget of seconds, before any step has been timed


def fitting_steps(budget_s: float, pass_s: float | None, *, turns: int, limit: int) -> int:
    """Return how many local steps fit into a budget of seconds, from 1 to `limit`.

    Args:
        pass_s: seconds of a local step of as many clients as the engine trains at a time; None: not yet
            known.
        turns: how many such groups of clients train one after the other on this rank; 0 if none trains, which
            leaves the decision to the other ranks.
    """
    if not turns:
        return limit
    fitting = FIRST_STEPS if pass_s is None else int(budget_s / (pass_s * turns))
    return max(1, min(limit, fitting))


def is_evaluated(federation: FederationConfig, round: int) -> bool:
    """Return whether the state after a round is evaluated."""
    return round == federation.rounds or round % federation.evaluate_every == 0


def round_text(config: RunConfig) -> str:
    """Return how long a round is, such as `10 local steps`."""
    federation = config.federation
    steps = f"{config.train.local_steps} local steps"
    texts = {
        "steps": steps,
        "seconds": f"{federation.round_seconds:g} s of local steps, at most {config.train.local_steps},",
        "epoch": "one epoch of local steps",
    }
    return texts[federation.round_budget]


def is_uneven(config: RunConfig) -> bool:
    """Return whether clients may take different numbers of steps in a round that FedNova's scaling evens out,
    so that they count by their rows only. Epochs of different lengths are not evened out: in FedAvg
    (McMahan et al., 2017), clients with more rows take more steps and have more weight.
    """
    differs = config.train.local_steps_by_cluster or config.federation.round_budget == "seconds"
    return METHODS[config.federation.method.name].adds_deltas and bool(differs)


def fednova_scale(weight: float, weighted_steps: float, local_steps: int) -> float:
    """Return the factor of the mean delta under FedNova (Wang et al., NeurIPS 2020): the mean number of steps
    taken, divided by `local_steps`.

    A client that takes more steps has a larger delta and would count for more than its rows. Each delta is
    therefore scaled to the same number of steps before the sum, and the mean is scaled back by this factor.

    Args:
        weight: sum of all clients' weights. weighted_steps: sum of weight times steps taken.
        local_steps: the number of steps that deltas were scaled to.
    """
    return float(weighted_steps / weight / local_steps)


class Pace:
    """Decides how many local steps this rank's clients take, from the time that earlier steps took."""

    def __init__(self, config: RunConfig, cluster: str, engine: "ClientEngine"):
        self._config = config
        self._engine = engine
        self._max_steps = local_steps_of(config.train, cluster)
        self._is_uneven = is_uneven(config)
        self._pass_s: float | None = None

    def steps(self, clients: int) -> int:
        """Return the most local steps that this rank's clients take in a round in which `clients` of them
        train; `Trainer.steps_of` has the most of a single client.

        Collective over the ranks that share the base, which agree on the smallest number.
        """
        federation = self._config.federation
        if federation.round_budget == "epoch":
            return MAX_STEPS
        if federation.round_budget == "steps":
            return self._max_steps
        fitting = fitting_steps(
            federation.round_seconds, self._pass_s, turns=self._turns(clients), limit=self._max_steps
        )
        return self._engine.agree_least(fitting)

    @contextmanager
    def measure(self, clients: int, steps: int) -> Iterator[None]:
        """Time the local steps that are taken inside the `with` block, for the next round's `steps`."""
        began = time.perf_counter()
        yield
        if clients:
            self._pass_s = (time.perf_counter() - began) / steps / self._turns(clients)

    def delta_factor(self, steps: int) -> float | None:
        """Return what the delta of a client is multiplied by that took `steps` steps. None: deltas are sent
        as they are, and are not needed again.
        """
        if self._is_uneven:
            return self._config.train.local_steps / steps
        return 1.0 if self._config.federation.staleness else None

    def mean_scale(self, link: ClientLink, contribution: Contribution, header: Header) -> float:
        """Return `fednova_scale` over all ranks' clients; 1.0 where all take the same number of steps.
        Collective over all ranks.

        Args:
            contribution: of this rank's clients. header: of the update; it has the sums in the masked modes.
        """
        if not self._is_uneven:
            return 1.0
        weight = header.weight
        steps = header.weighted_steps
        if header.bounds is None:
            own = np.array([contribution.weight, contribution.weighted_steps])
            weight, steps = link.sum(own, 0.0).vector
        return fednova_scale(weight, steps, self._config.train.local_steps)

    def _turns(self, clients: int) -> int:
        """Return how many groups of clients train one after the other in the engine's client slots."""
        return -(-clients // self._engine.client_slots)
