"""SCAFFOLD (Karimireddy et al., ICML 2020, option II): a client's gradients are corrected by a common control
variate, less its own one, which it keeps for itself.
"""

from dataclasses import replace

import numpy as np

from fedspeed.federation.methods.base import Aggregate
from fedspeed.federation.methods.lora_average.method import LoraAverage


def common(name):
    return f"control:{name}"


class ControlVariates(LoraAverage):
    needs = frozenset({"gradients", "add_to_gradients"})
    keeps_memory = True

    def first_state(self, state):
        return state | {common(name): np.zeros_like(state[name]) for name in self.layout.names}

    def segments(self, round):
        return (*super().segments(round), self.layout.size, 1)

    def train(self, engine, turns, trainer):
        def between(slot, turn):
            correction = {n: turn.start[common(n)] - turn.memory.get(n, 0.0) for n in self.layout.names}
            engine.add_to_gradients(slot, correction, 1.0)

        return [
            self._remembered(*pair, trainer)
            for pair in zip(turns, trainer.local_steps(engine, turns, between=between))
        ]

    def _remembered(self, turn, trained, trainer):
        memory = {}
        sent = {}
        for name in self.layout.names:
            slope = (turn.start[name] - trained.end[name]) / (turn.steps * trainer.lr(turn, 0))
            own = turn.memory.get(name, np.zeros_like(slope))
            memory[name] = (own - turn.start[common(name)] + slope).astype(np.float32)
            sent[common(name)] = turn.start[common(name)] + memory[name] - own
        return replace(trained, end=trained.end | sent, memory=memory)

    def encode(self, turn, end, weight):
        change = np.concatenate([
            (end[common(n)] - turn.start[common(n)]).reshape(-1) for n in self.layout.names
        ])
        return np.concatenate([
            super().encode(turn, end, weight),
            np.float32(weight) * change,
            [np.float32(1)],
        ])

    def aggregate(self, state, total, weight, *, round, exchange=0, factor=1.0):
        rest, changes, (trained,) = np.split(total, [total.size - self.layout.size - 1, total.size - 1])
        found = super().aggregate(state, rest, weight, round=round, factor=factor)
        # The mean change of those who trained, of all clients the part that they are.
        change = self.layout.unflatten(changes / np.float32(weight) * np.float32(trained / self.clients))
        sent = {common(name): state[common(name)] + change[name] for name in self.layout.names}
        return Aggregate(found.state | sent, found.factor_error)
