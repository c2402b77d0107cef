"""`lora_average`: the weighted mean of the deltas, read from one sum of all clients.

LoRA's update is a product B A, and the mean of products is not the product of means. The rules differ in how
they face that:

- `avg_factors` averages A and B separately (what most systems do) and logs how wrong that is;
- `freeze_a` trains only B, which makes the mean exact (FFA-LoRA, Sun et al., ICLR 2024);
- `alternate` trains B and A in turn by round, each exact while the other is frozen (RoLoRA, Chen et al.,
  2024).

`avg_factors` averages whatever is trained, LoRA or not.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.base import Aggregate, Method, Turn
from fedspeed.federation.methods.factors import Sketch, moved
from fedspeed.models.factors import is_factor_a, is_factor_b
from fedspeed.monitor.metrics.metric import SKETCH


def rule_of(config) -> str:
    """Return the rule that a configuration names; a method that is made from this one may have no options."""
    return getattr(config, "rule", "avg_factors")


class LoraAverage(Method):
    """The vector is the weighted delta of the tensors that train, followed by the weighted sketch of the
    products.
    """

    def __init__(self, config, layout: Layout, **run):
        super().__init__(config, layout, **run)
        # Two, since the next round may train beside the exchange of one.
        self._plan = lru_cache(maxsize=2)(self._plan_of)

    def _plan_of(self, round: int) -> tuple[Layout, Sketch]:
        """Return (layout of the deltas that travel in a round, the round's sketch, which may have no
        values).
        """
        sketched = self.layout.without(self.layout.names if SKETCH in self.hides else ())
        return self.layout.without(self.frozen(round)), Sketch(sketched, self.seed, round)

    @classmethod
    def min_holders(cls, config, participants, modules):
        return len(set(participants.values()))  # all clients train the same tensors

    @classmethod
    def start_problem(cls, config, state):
        """Find a factor A that is zero and would stay so: its B never has a gradient. PEFT leaves the A of a
        fresh LoRA beside an embedding at zero.
        """
        if rule_of(config) != "freeze_a":
            return ""
        stuck = next((name for name in sorted(state) if is_factor_a(name) and not np.any(state[name])), "")
        if not stuck:
            return ""
        return (
            f"federation.method.rule=freeze_a keeps every A as it is, but {stuck} is zero in "
            "adapter.start_from, so that its B would never move; choose another rule, or start from an "
            "adapter that was trained"
        )

    def frozen(self, round):
        """Return the names that keep their value; `alternate` begins with B: while B = 0, A has no
        gradient.
        """
        rule = rule_of(self.config)
        names = self.layout.names
        if rule == "freeze_a" or (rule == "alternate" and round % 2 == 1):
            return frozenset(filter(is_factor_a, names))
        if rule == "alternate":
            return frozenset(filter(is_factor_b, names))
        return frozenset()

    def alone(self, client, state, **how):
        """Return a client's turn without the others, in which nothing is frozen that only every second round
        freezes: what a client trains alone is no mean, so it need not alternate.
        """
        turn = super().alone(client, state, **how)
        by_turns = self.frozen(turn.round) - self.frozen(turn.round + 1)
        return replace(turn, frozen=turn.frozen - by_turns)

    def unsent(self, round):
        """Return what is trained but not in the round's plan, where a method that is made from this one sends
        less than all.
        """
        return frozenset(self.layout.names) - set(self._plan(round)[0].names) - self.frozen(round)

    def values(self, round):
        return sum(self.parts(round))

    def parts(self, round):
        trained, sketch = self._plan(round)
        return (*trained.sizes, sketch.values)

    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        trained, sketch = self._plan(turn.round)
        delta = weight * (trained.flatten(end).astype(np.float64) - trained.flatten(turn.start))
        return np.concatenate([delta, weight * sketch.of(end)]).astype(np.float32)

    def aggregate(self, state, total, weight, *, round, exchange=0, factor=1.0):
        trained, sketch = self._plan(round)
        mean = total.astype(np.float64) / weight
        delta = trained.unflatten(mean[: trained.size])
        scaled = moved(state, delta, factor)
        plain = scaled if factor == 1.0 else moved(state, delta, 1.0)
        return Aggregate(scaled, sketch.error(mean[trained.size :], plain))
