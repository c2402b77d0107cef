"""FedProx (Li et al., MLSys 2020) with mu = 2: gradients draw a client back to where it began."""

from fedspeed.federation.methods.lora_average.method import LoraAverage

MU = 2.0


class Proximal(LoraAverage):
    needs = frozenset({"gradients", "add_to_gradients"})

    def passes(self, engine, turns, steps, accumulation):
        return engine.train_passes(turns, steps, accumulation, reads=1), True

    def train(self, engine, turns, trainer):
        def between(slot, turn):
            now = engine.masters(slot)
            change = {name: now[name].numpy() - turn.start[name] for name in now}
            engine.add_to_gradients(slot, change, MU)

        return trainer.local_steps(engine, turns, between=between)
