"""`scaffold`: a client's gradients are corrected by a control variate of all clients, less its own one
(SCAFFOLD, Karimireddy et al., ICML 2020, option II).

Client i takes steps w -= lr (g_i(w) + c - c_i), and afterwards estimates its mean gradient anew from the way
it has gone: c_i' = c_i - c + (w_start - w_end) / (sum of lr over the steps taken). The clients send their
deltas and c_i' - c_i; c changes by the mean of the latter times the share of clients that trained. Deltas and
control variates are weighted alike, so that c remains the weighted mean of all c_i where all clients train.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import Aggregate
from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.federation.methods.turns import Trained, Turn, TurnTrainer

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine


def control(name: str) -> str:
    """Return the name that the common control variate of an array has in the state."""
    return f"control:{name}"


class Scaffold(LoraAverage):
    """Weighted averaging with control variates. The summed vector has, behind that of `LoraAverage`, the
    changes of the clients' control variates, and the number of clients in it. A client's memory is its
    control variate, by the names of the arrays that it corrects.
    """

    needs = frozenset({"gradients", "add_to_gradients"})
    unequal_turns = True
    keeps_memory = True

    def first_state(self, state: Arrays) -> Arrays:
        return state | {control(name): np.zeros_like(state[name]) for name in self.layout.names}

    def segments(self, round: int) -> tuple[int, ...]:
        return (*super().segments(round), self.layout.size, 1)

    def train(self, engine: "ClientEngine", turns: Sequence[Turn], trainer: TurnTrainer) -> list[Trained]:
        corrections = [
            {name: turn.start[control(name)] - self._own(turn, name) for name in self.layout.names}
            for turn in turns
        ]

        def between(slot: int, turn: Turn) -> None:
            engine.add_to_gradients(slot, corrections[slot], 1.0)

        results = trainer.local_steps(engine, turns, between=between)
        return [self._with_control(turn, trained) for turn, trained in zip(turns, results, strict=True)]

    def _own(self, turn: Turn, name: str) -> np.ndarray:
        """Return a client's control variate of an array: zeros before its first turn."""
        return turn.memory[name] if turn.memory else np.zeros_like(turn.start[name])

    def _with_control(self, turn: Turn, trained: Trained) -> Trained:
        """Return the result of a turn with the client's new control variate, as memory, and with its change
        added to the common one, as part of the end. A turn without any step changes neither.
        """
        if not trained.sums.steps:
            return trained
        memory = {}
        sent = {}
        for name in self.layout.names:
            own = self._own(turn, name)
            common = turn.start[control(name)]
            way = turn.start[name].astype(np.float64) - trained.end[name]
            memory[name] = (own - common + way / trained.sums.lr_sum).astype(np.float32)
            sent[control(name)] = common + (memory[name] - own)
        return replace(trained, end=trained.end | sent, memory=memory)

    def encode(self, turn: Turn, end: Arrays, weight: float) -> np.ndarray:
        common = {name: turn.start[control(name)] for name in self.layout.names}
        new = {name: end[control(name)] for name in self.layout.names}
        change = weight * (self.layout.flatten(new).astype(np.float64) - self.layout.flatten(common))
        return np.concatenate([super().encode(turn, end, weight), change, [1.0]]).astype(np.float32)

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
        deltas, changes, (trained,) = np.split(total, [total.size - self.layout.size - 1, total.size - 1])
        mean = super().aggregate(state, deltas, weight, round=round, factor=factor)
        share = min(1.0, float(trained) / self.all_clients)
        change = self.layout.unflatten(changes.astype(np.float64) / weight * share)
        common = {
            control(name): (state[control(name)] + change[name]).astype(np.float32)
            for name in self.layout.names
        }
        return Aggregate(mean.state | common, mean.factor_error)
