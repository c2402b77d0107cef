"""`fedsa`: factors A are averaged over the clients, and each client keeps its own B (FedSA-LoRA, Guo et al.,
ICLR 2025).

A client trains both factors and sends A only. Its model is the common A with its own B, so that there is no
single trained model: the common `adapter` has the first B, which is zero in a new LoRA and is what a new
client begins with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.methods.factors import Sketch
from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.federation.methods.turns import Trained, Turn, TurnTrainer
from fedspeed.federation.named_models import own_model
from fedspeed.models.factors import is_factor_b

if TYPE_CHECKING:  # torch is not imported by modules that only ask what a method needs
    from fedspeed.engine.client_engine import ClientEngine


class FedSA(LoraAverage):
    """Weighted averaging of A. A client's memory is its B, with B's bias if it has one."""

    keeps_memory = True
    evaluated = "each client's own model, exported as `adapter-client-N`, and not of the common `adapter`"
    unequal_turns = True

    def _plan_of(self, round: int) -> tuple[Layout, Sketch]:
        """Return (layout of the factors A, a sketch without values, since no product is averaged)."""
        names = self.layout.names
        shared = self.layout.without(filter(is_factor_b, names))
        return shared, Sketch(self.layout.without(names), self.seed, round)

    def turn(self, client: int, round: int, state: Arrays, *, memory: Arrays, **task: Any) -> Turn:
        """Return a client's turn, which starts from the common A and the client's own B."""
        return super().turn(client, round, state | memory, memory=memory, **task)

    def train(self, engine: "ClientEngine", turns: Sequence[Turn], trainer: TurnTrainer) -> list[Trained]:
        return [
            replace(trained, memory={name: b for name, b in trained.end.items() if is_factor_b(name)})
            for trained in super().train(engine, turns, trainer)
        ]

    def models(self, state: Arrays, memory: Mapping[int, Arrays]) -> dict[str, Arrays]:
        """Return the model of each client that has trained, and the common one."""
        return {"adapter": state} | {own_model(client): state | own for client, own in memory.items()}
