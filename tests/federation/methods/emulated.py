"""A method whose clients have one block of the model and whose server has all: what is adapted is named for
both.
"""

from dataclasses import replace

from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.federation.tensors import as_arrays, as_torch

KEPT = 1
TARGETS = (f"layers.{KEPT}.self_attn.q_proj", f"layers.{KEPT}.self_attn.v_proj")


class Emulated(LoraAverage):
    server_needs = frozenset({"gradients"})

    @classmethod
    def spec(cls, config, spec, *, shape):
        narrow = replace(spec.adapter, targets=TARGETS)
        return replace(spec, adapter=narrow, blocks=None if spec.role == "server" else (KEPT,))

    def server_step(self, state, engine, public_rows, *, round, exchange, trainer):
        engine.load(as_torch(state), frozen=frozenset(n for n in state if "q_proj" in n))
        engine.gradients([trainer.public_batches(round)])
        engine.step(trainer.round_lr(round))
        return as_arrays(engine.state())
