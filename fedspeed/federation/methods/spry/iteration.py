"""`spry_iteration`: SPRY with an exchange in every local step. Clients send derivatives along directions that
all participants draw again, and everybody steps the state.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedspeed.engine.directions import combined
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import VALUE_BYTES, Aggregate, Traffic
from fedspeed.federation.methods.factors import add_scaled
from fedspeed.federation.methods.spry.forward_slices import ForwardSlices, direction_seeds
from fedspeed.federation.methods.turns import Trained, Turn, TurnTrainer
from fedspeed.planner.plan import Task

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine

DERIVATIVES = "spry:derivatives"  # the one array in the end of a turn


class SpryIteration(ForwardSlices):
    """The mean of every unit's estimated gradients over the clients that train it. The summed vector has, for
    each unit and direction, the derivatives of its clients, each times the client's weight, and then the
    weight of each unit.

    All clients of a round draw the same directions, so that the sum of the derivatives along one is all that
    a step needs. The new state is a step of SGD at the clients' learning rate; a server optimizer takes it as
    a pseudo-gradient.
    """

    needs = frozenset({"forward_gradients"})
    exchange_every = "step"

    def train(self, engine: "ClientEngine", turns: Sequence[Turn], trainer: TurnTrainer) -> list[Trained]:
        """Compute the derivatives of one local step; a turn without finite ones does not count."""
        trainer.begin(engine, turns)
        found = self._derivatives(engine, turns, 0, trainer)
        engine.end_step()
        done = [replace(of_turn.sums, steps=int(of_turn.are_finite)) for of_turn in found]
        trainer.stepped(turns, 0, done)
        return [
            Trained(
                end={DERIVATIVES: trainer.lr(turn, 0) * self.mean_factors(of_turn.derivatives)},
                sums=sums,
                memory=turn.memory,
            )
            for turn, of_turn, sums in zip(turns, found, done)
        ]

    def seeds(self, turn: Turn, number: int) -> list[int]:
        return self._seeds(turn.round, turn.exchange)

    def _seeds(self, round: int, exchange: int) -> list[int]:
        """Return the seeds of the directions of an exchange, the same for all clients."""
        return direction_seeds([self.seed, round, exchange], self.config.perturbations)

    def values(self, round: int) -> int:
        return sum(self.segments(round))

    def traffic(self, task: Task, participants: int) -> Traffic:
        """Predict what a client sends and receives in all steps of a round: the plain sum of all units. The
        values of its own are single numbers between those of others, so that no runs of zeros are left out.
        """
        whole = 2 * (participants - 1) / participants * self.values(1) * VALUE_BYTES * task.local_steps
        return Traffic(whole, whole)

    def segments(self, round: int) -> tuple[int, ...]:
        units = len(self.units)
        return units * self.config.perturbations, units

    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        weights = self.unit_weights(turn, weight)
        return np.concatenate([np.outer(weights, end[DERIVATIVES]).reshape(-1), weights]).astype(np.float32)

    def aggregate(
        self,
        state: Arrays,
        total: np.ndarray,
        weight: float,
        *,
        round: int,
        exchange: int = 0,
        factor: float = 1.0,
    ) -> Aggregate:
        """Return the state after a step along the mean estimate of each unit. A unit of which no client's
        derivatives were finite keeps its values.
        """
        units = len(self.units)
        sums, weights = np.split(total.astype(np.float64), [units * self.config.perturbations])
        seeds = self._seeds(round, exchange)
        steps: Arrays = {}
        for unit, of_unit, share in zip(self.units, sums.reshape(units, -1), self.summed_weights(weights)):
            if share > 0:
                steps |= combined({name: self._shapes[name] for name in unit}, seeds, of_unit / share)
        return Aggregate(add_scaled(state, steps, -factor), factor_error=None)
