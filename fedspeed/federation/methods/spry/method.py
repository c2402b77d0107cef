"""`spry` (Panchal et al., NeurIPS 2024): each client of a round trains some LoRA modules by forward
gradients, and sends their change.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedspeed.engine.directions import combined
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import Aggregate
from fedspeed.federation.methods.factors import add_scaled
from fedspeed.federation.methods.spry.forward_slices import ForwardSlices, direction_seeds
from fedspeed.federation.methods.turns import Trained, Turn, TurnTrainer

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine, Sums


class Spry(ForwardSlices):
    """The mean of every unit's deltas over the clients that train it. The summed vector has the deltas, each
    times the client's weight, and then the weight of each unit.
    """

    needs = frozenset({"forward_gradients", "add_to_gradients"})
    unequal_turns = True

    def train(self, engine: "ClientEngine", turns: Sequence[Turn], trainer: TurnTrainer) -> list[Trained]:
        """Train turns by steps on estimated gradients; a step without a finite estimate is not taken, and
        does not count.
        """
        return trainer.local_steps(
            engine, turns, step=lambda going_on, number: self._step(engine, going_on, number, trainer)
        )

    def _step(
        self, engine: "ClientEngine", turns: Sequence[Turn], number: int, trainer: TurnTrainer
    ) -> "list[Sums]":
        """Take one local step of all turns; returns their sums."""
        found = self._derivatives(engine, turns, number, trainer)
        usable = [slot for slot, of_turn in enumerate(found) if of_turn.are_finite]
        for slot in usable:
            shapes = {n: s for n, s in self._shapes.items() if n not in turns[slot].frozen}
            factors = self.mean_factors(found[slot].derivatives)
            estimate = combined(shapes, self.seeds(turns[slot], number), factors)
            engine.add_to_gradients(slot, estimate, 1.0)
        lr = trainer.lr(turns[0], number)
        applied: dict[int, bool] = {}
        if usable:
            applied = dict(zip(usable, engine.step(lr), strict=True))
        else:
            engine.end_step()
        taken = [applied.get(slot, False) for slot in range(len(turns))]
        return [
            replace(of_turn.sums, steps=int(is_taken), lr_sum=lr * is_taken)
            for of_turn, is_taken in zip(found, taken)
        ]

    def seeds(self, turn: Turn, number: int) -> list[int]:
        return direction_seeds([turn.seed, number], self.config.perturbations)

    def values(self, round: int) -> int:
        return sum(self.segments(round))

    def segments(self, round: int) -> tuple[int, ...]:
        return (*self.layout.sizes, len(self.units))

    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        weights = self.unit_weights(turn, weight)
        delta = {name: np.zeros(shape) for name, shape in self._shapes.items()}
        for unit, share in zip(self.units, weights):
            for name in unit if share else ():
                delta[name] = share * (end[name].astype(np.float64) - turn.start[name])
        return np.concatenate([self.layout.flatten(delta), weights]).astype(np.float32)

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
        """Return the state with the mean delta of each unit added. A unit of which no client's update was
        usable keeps its values.
        """
        sums = self.layout.unflatten(total[: self.layout.size].astype(np.float64))
        weights = self.summed_weights(total[self.layout.size :].astype(np.float64))
        means = {
            name: sums[name] / share for unit, share in zip(self.units, weights) if share > 0 for name in unit
        }
        return Aggregate(add_scaled(state, means, factor), factor_error=None)
