"""FedSA-LoRA (Guo et al., ICLR 2025): factors A are averaged over the clients, and each keeps its own B."""

from dataclasses import replace

from fedspeed.federation.methods.factors import Sketch
from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.models.factors import is_factor_b


class SharedA(LoraAverage):
    keeps_memory = True

    def _plan_of(self, round):
        names = self.layout.names
        shared = self.layout.without(tuple(filter(is_factor_b, names)))
        return shared, Sketch(self.layout.without(names), self.seed, round)

    def turn(self, client, round, state, *, memory, **how):
        return super().turn(client, round, state | memory, memory=memory, **how)

    def train(self, engine, turns, trainer):
        found = super().train(engine, turns, trainer)
        return [replace(t, memory={n: a for n, a in t.end.items() if is_factor_b(n)}) for t in found]

    def models(self, state, memory):
        own = {f"client-{client}": state | values for client, values in memory.items()}
        return {"adapter": state} | own
