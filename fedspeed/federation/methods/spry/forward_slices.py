"""The common part of `spry` and `spry_iteration` (SPRY, Panchal et al., NeurIPS 2024): each client of a round
trains some units of the arrays, by derivatives along random directions that one forward pass each computes.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedspeed.engine.directions import direction_seed
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import VALUE_BYTES, Method, Traffic
from fedspeed.federation.methods.spry.slices import fewest_holders, holders, place_count, units_of
from fedspeed.federation.methods.turns import ALONE, Turn, TurnTrainer
from fedspeed.federation.schedule import sample_clients
from fedspeed.planner.plan import Task

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine, ForwardDerivatives

_DIRECTION_STREAM = 0x5B8  # the random stream of directions


def direction_seeds(key: Sequence[int], count: int) -> list[int]:
    """Return the seeds of `count` directions, functions of (key, number of the direction) only."""
    return [direction_seed([_DIRECTION_STREAM, *key, k]) for k in range(count)]


class ForwardSlices(Method):
    """A method in which each client of a round trains some units only.

    Attributes:
        units: names of the arrays of each unit.
    """

    def __init__(self, config: Any, layout: Layout, **run: Any):
        super().__init__(config, layout, **run)
        self.units = units_of(layout.names)
        self._shapes = dict(zip(layout.names, layout.shapes))

    def round_clients(self, round: int) -> tuple[int, ...]:
        """Return the clients of a round, counted from 1, in ascending order."""
        return sample_clients(self.seed, round, self.clients, self.clients_per_round)

    @classmethod
    def min_holders(cls, config: Any, participants: Mapping[int, int], modules: int) -> int:
        return fewest_holders(modules, participants, config.clients_per_unit)

    @classmethod
    def planned(cls, config: Any, task: Task, *, role: Literal["client", "server"]) -> Task | None:
        return replace(task, differentiated_blocks=0, tangents=True) if role == "client" else None

    def traffic(self, task: Task, participants: int) -> Traffic:
        """Predict what a client's gateway sends and receives: the part of the vector that its clients fill,
        and the sum of its part for everybody.
        """
        units = len(self.units)
        clients = len(self.round_clients(1))
        places = place_count(units, clients, self.config.clients_per_unit)
        filled = min(1.0, places / units / participants)
        whole = (participants - 1) / participants * self.values(1) * VALUE_BYTES
        return Traffic(whole * (1 + filled), whole * (1 + filled))

    def turn(self, client: int, round: int, state: Arrays, *, exchange: int = 0, **task: Any) -> Turn:
        turn = super().turn(client, round, state, exchange=exchange, **task)
        return replace(turn, frozen=frozenset(self.layout.names) - self._held_by(client, round, exchange))

    def _held_by(self, client: int, round: int, exchange: int) -> frozenset[str]:
        """Return the names of the arrays that a client trains in an exchange."""
        held = holders(
            len(self.units),
            self.round_clients(round),
            least=self.config.clients_per_unit,
            seed=self.seed,
            round=round,
            exchange=exchange,
        )
        return frozenset(
            name for unit, clients in zip(self.units, held) if client in clients for name in unit
        )

    def turn_alone(self, client: int, state: Arrays, *, steps: int, seed: int) -> Turn:
        """Return the turn of a client that trains without the others, hence all units."""
        return super().turn(client, ALONE, state, steps=steps, seed=seed, memory={})

    def passes(self, engine: "ClientEngine", turns: int, steps: int, accumulation: int) -> tuple[int, bool]:
        count = self.config.perturbations
        return engine.train_passes(turns, steps, accumulation, gradients=count), False

    def held_units(self, turn: Turn) -> np.ndarray:
        """Return whether a client trains each unit in a turn: [units] bool."""
        return np.array([turn.frozen.isdisjoint(unit) for unit in self.units])

    def _derivatives(
        self, engine: "ClientEngine", turns: Sequence[Turn], number: int, trainer: TurnTrainer
    ) -> "list[ForwardDerivatives]":
        """Return, by turn, the derivatives of the loss of local step `number` along the directions of
        `seeds`.
        """
        return engine.forward_gradients(
            [trainer.rows(turn, number) for turn in turns],
            [self.seeds(turn, number) for turn in turns],
            [frozenset(self.layout.names) - turn.frozen for turn in turns],
        )

    @abstractmethod
    def seeds(self, turn: Turn, number: int) -> list[int]:
        """Return the seeds of the directions of a turn's local step `number`: [perturbations]."""

    def mean_factors(self, derivatives: np.ndarray) -> np.ndarray:
        """Return the factor of each direction in the estimate of the gradient: the derivatives along them,
        within bounds, divided by their number.
        """
        bound = self.config.derivative_clip or np.inf
        return np.clip(derivatives, -bound, bound) / len(derivatives)

    def unit_weights(self, turn: Turn, weight: float) -> np.ndarray:
        """Return how much a client counts in the mean of each unit: [units], 0 where it does not train it."""
        return self.held_units(turn) * (weight if self.config.weighting == "tokens" else 1.0)

    def summed_weights(self, sums: np.ndarray) -> np.ndarray:
        """Return the weight of each unit [units] from its sum, which a masked exchange rounds."""
        return np.rint(sums) if self.config.weighting == "equal" else sums
