"""A method with a server: it answers each client's delta with twice as much, which the client then sends, and
takes a step of the state on public rows.
"""

from dataclasses import replace

from fedspeed.federation.methods.lora_average.method import LoraAverage
from fedspeed.federation.tensors import as_arrays, as_torch

LR_PART = 0.5  # of the clients' learning rate


class Served(LoraAverage):
    server_needs = frozenset({"gradients"})

    def train(self, engine, turns, trainer):
        return [self._answered(*pair, trainer) for pair in zip(turns, trainer.local_steps(engine, turns))]

    def _answered(self, turn, trained, trainer):
        answer = trainer.ask({n: trained.end[n] - turn.start[n] for n in trained.end})
        return replace(trained, end={n: turn.start[n] + answer[n] for n in trained.end})

    def serve(self, engine, channel, round, exchange, *, clients, state, trainer):
        for speaker in (channel.speakers[client] for client in clients):
            channel.send(speaker, {n: 2 * delta for n, delta in channel.receive(speaker).items()})

    def server_step(self, state, engine, public_rows, *, round, exchange, trainer):
        engine.load(as_torch(state))
        engine.gradients([trainer.public_batches(round)])
        engine.step(LR_PART * trainer.round_lr(round, exchange))
        return as_arrays(engine.state())
