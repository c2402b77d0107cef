"""The average of all clients' states after every local step."""

from fedspeed.federation.methods.lora_average.method import LoraAverage


class EveryStep(LoraAverage):
    exchange_every = "step"
