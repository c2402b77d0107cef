"""`fedprox`: the weighted mean of deltas, where a proximal term keeps clients near the weights that they
began with (FedProx, Li et al., MLSys 2020).

A client minimises F(w) + mu / 2 |w - w_start|^2. Any local optimizer will do, since the term is a part of the
objective: its gradient mu (w - w_start) is added to each step's gradient before clipping.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.federation.methods.turns import ALONE, Trained, Turn, TurnTrainer

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine


class FedProx(LoraAverage):
    """Weighted averaging of clients that are drawn back to where they began. Losses are reported without the
    proximal term.
    """

    needs = frozenset({"gradients", "add_to_gradients"})
    unequal_turns = True

    def passes(self, engine: "ClientEngine", turns: int, steps: int, accumulation: int) -> tuple[int, bool]:
        return engine.train_passes(turns, steps, accumulation, reads=1), True

    def train(self, engine: "ClientEngine", turns: Sequence[Turn], trainer: TurnTrainer) -> list[Trained]:
        """Train turns with the proximal term. A client that trains without the others (ALONE) has nobody to
        stay near to, so nothing is added.
        """

        def between(slot: int, turn: Turn) -> None:
            now = engine.masters(slot)  # read in any case: `passes` has counted it
            if turn.round != ALONE:
                drift = {name: value.numpy() - turn.start[name] for name, value in now.items()}
                engine.add_to_gradients(slot, drift, self.config.mu)

        return trainer.local_steps(engine, turns, between=between)
