"""FedSA-LoRA that goes wrong after its first round, which so stays the best one."""

from dataclasses import replace

from fedspeed.federation.methods.fedsa import FedSA


class SpoiledA(FedSA):
    def train(self, engine, turns, trainer):
        found = super().train(engine, turns, trainer)
        by = {1: 1, 2: -10}.get(turns[0].round, 10)  # away from where training has led
        return [replace(t, memory={n: by * a for n, a in t.memory.items()}) for t in found]
