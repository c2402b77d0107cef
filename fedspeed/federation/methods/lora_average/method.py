"""`lora_average`: the weighted mean of all clients' deltas, computed from one sum.

LoRA's update is a product B A, and the mean of products is not the product of means. The rules treat that
differently:

- `avg_factors` averages A and B separately (as most systems do) and logs the resulting error;
- `freeze_a` trains only B, which makes the mean exact (FFA-LoRA, Sun et al., ICLR 2024);
- `alternate` trains B in odd rounds and A in even ones; the mean of one is exact while the other is frozen
  (RoLoRA,
  Chen et al., 2024).

`avg_factors` averages whatever is trained, LoRA or not.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import Aggregate, Method
from fedspeed.federation.methods.factors import Sketch, add_scaled
from fedspeed.federation.methods.turns import Turn
from fedspeed.models.factors import is_factor_a, is_factor_b
from fedspeed.monitor.metrics.metric import SKETCH


def rule_of(config: Any) -> str:
    """Return the rule that the method's options name; a method derived from this one may have no options."""
    return getattr(config, "rule", "avg_factors")


class LoraAverage(Method):
    """Weighted averaging. The summed vector has the weighted delta of the arrays that train, followed by the
    weighted sketch of the products.
    """

    def __init__(self, config: Any, layout: Layout, **run: Any):
        super().__init__(config, layout, **run)
        # For two rounds, since under staleness one trains during the exchange of the other.
        self._plan = lru_cache(maxsize=2)(self._plan_of)

    def _plan_of(self, round: int) -> tuple[Layout, Sketch]:
        """Return (layout of the deltas that are sent in a round, the round's sketch, which may have no
        values).
        """
        sketched = self.layout.without(self.layout.names if SKETCH in self.hides else self.server_arrays)
        return self.layout.without(self.frozen(round)), Sketch(sketched, self.seed, round)

    @classmethod
    def min_holders(cls, config: Any, participants: Mapping[int, int], modules: int) -> int:
        return len(set(participants.values()))  # all clients train the same arrays

    @classmethod
    def start_problem(cls, config: Any, state: Arrays) -> str:
        """Return a problem where a factor A is frozen at zero, because its B would never have a gradient.
        PEFT leaves the A of a new LoRA on an embedding at zero.
        """
        if rule_of(config) != "freeze_a":
            return ""
        zero = next((name for name in sorted(state) if is_factor_a(name) and not np.any(state[name])), "")
        if not zero:
            return ""
        return (
            f"federation.method.rule=freeze_a keeps every A as it is, but {zero} is zero in "
            "adapter.start_from, so that its B would never have a gradient; choose another rule, or start "
            "from an adapter that was trained"
        )

    def frozen(self, round: int) -> frozenset[str]:
        """Return the names of arrays that no client trains in a round. `alternate` trains B first, because A
        has no gradient while B = 0.
        """
        rule = rule_of(self.config)
        names = self.layout.names
        elsewhere = super().frozen(round)
        if rule == "freeze_a" or (rule == "alternate" and round % 2 == 1):
            return elsewhere | set(filter(is_factor_a, names))
        if rule == "alternate":
            return elsewhere | set(filter(is_factor_b, names))
        return elsewhere

    def turn_alone(self, client: int, state: Arrays, *, steps: int, seed: int) -> Turn:
        """Return the turn of a client that trains without the others. Arrays that are frozen only in every
        second round are trained, because nothing is averaged and no rule is needed.
        """
        turn = super().turn_alone(client, state, steps=steps, seed=seed)
        alternating = self.frozen(turn.round) - self.frozen(turn.round + 1)
        return replace(turn, frozen=turn.frozen - alternating)

    def unsent(self, round: int) -> frozenset[str]:
        """Return the names of arrays that are trained but not sent. Only derived methods have any."""
        return frozenset(self.layout.names) - set(self._plan(round)[0].names) - self.frozen(round)

    def values(self, round: int) -> int:
        return sum(self.segments(round))

    def segments(self, round: int) -> tuple[int, ...]:
        trained, sketch = self._plan(round)
        return (*trained.sizes, sketch.values)

    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        trained, sketch = self._plan(turn.round)
        delta = weight * (trained.flatten(end).astype(np.float64) - trained.flatten(turn.start))
        return np.concatenate([delta, weight * sketch.of(end)]).astype(np.float32)

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
        trained, sketch = self._plan(round)
        mean = total.astype(np.float64) / weight
        delta = trained.unflatten(mean[: trained.size])
        scaled = add_scaled(state, delta, factor)
        unscaled = scaled if factor == 1.0 else add_scaled(state, delta, 1.0)
        return Aggregate(scaled, sketch.error(mean[trained.size :], unscaled))
