"""A method that cannot be: its server's LoRA has another rank than that of its clients, under one name."""

from dataclasses import replace

from fedspeed.federation.methods.lora_average.method import LoraAverage


class Contrary(LoraAverage):
    @classmethod
    def spec(cls, config, spec, *, shape):
        lora_rank = 2 if spec.role == "server" else spec.adapter.lora_rank
        return replace(spec, adapter=replace(spec.adapter, lora_rank=lora_rank))

    def server_step(self, state, engine, public_rows, *, round, exchange, trainer):
        return state
