"""A method whose clients have the second block of a model and whose server has the first: neither has what
the other trains.
"""

from dataclasses import replace

from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.federation.tensors import as_arrays, as_torch


class Unlike(LoraAverage):
    server_needs = frozenset({"gradients"})

    @classmethod
    def spec(cls, config, spec, *, shape):
        return replace(spec, blocks=(0,) if spec.role == "server" else (1,))

    def server_step(self, state, engine, public_rows, *, round, exchange, trainer):
        engine.load(as_torch(state))
        engine.gradients([trainer.public_batches(round)])
        engine.step(trainer.round_lr(round))
        return state | as_arrays(engine.state())
