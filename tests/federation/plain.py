"""What federated training has to equal: ordinary PyTorch and PEFT, one row at a time, no padding, no
DeepSpeed.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from fedspeed.data.batches import step_rows
from tests.federation.runs import ROWS, client_data, share_of


class Plain:
    """The model of a configuration, trained by hand."""

    def __init__(self, config):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.config = config
        model = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32)
        if config.adapter.method == "lora":
            lora = LoraConfig(
                r=config.adapter.lora_rank, lora_alpha=config.adapter.alpha, target_modules="all-linear"
            )
            model = get_peft_model(model, lora)
        self.model = model.train()
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def load(self, state: dict[str, np.ndarray]) -> None:
        assert state.keys() == self.parameters.keys()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(state[name]))

    def state(self) -> dict[str, np.ndarray]:
        return {n: p.detach().numpy().copy() for n, p in self.parameters.items()}

    def _answer_loss(self, row) -> torch.Tensor:
        """Summed over the answer's tokens."""
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        logits = self.model(input_ids=ids[None]).logits[0]
        return functional.cross_entropy(
            logits[row.labels_start - 1 : -1], ids[row.labels_start :], reduction="sum"
        )

    def _step_losses(self, client: int, step: int) -> Iterator[torch.Tensor]:
        """Addends of the mean loss over the answer tokens of the client's rows in local step `step` of the
        run.
        """
        train = self.config.train
        data = client_data(client)
        rows = [
            data.train[i]
            for i in step_rows(self.config.run.seed, client, step, train.micro_batch, len(data.train))
        ]
        tokens = sum(len(e.input_ids) - e.labels_start for e in rows)
        for row in rows:
            yield self._answer_loss(row) / tokens

    @torch.no_grad()
    def step_loss(self, client: int, step: int) -> float:
        """The mean loss of a local step."""
        return sum(loss.item() for loss in self._step_losses(client, step))

    def gradient(self, client: int, step: int) -> dict[str, torch.Tensor]:
        """Of the mean loss of a local step."""
        self.model.zero_grad()
        for loss in self._step_losses(client, step):
            loss.backward()
        return {n: p.grad.clone() for n, p in self.parameters.items()}

    def local_steps(self, client: int, first: int, steps: int) -> None:
        """SGD with momentum from rest."""
        train = self.config.train
        velocity = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        for step in range(first, first + steps):
            for name, gradient in self.gradient(client, step).items():
                velocity[name] = train.momentum * velocity[name] + gradient
                with torch.no_grad():
                    self.parameters[name] -= train.lr * velocity[name]

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean per answer token over the held-out rows of all clients."""
        rows = [row for client in range(3) for row in client_data(client).val]
        return sum(self._answer_loss(row).item() for row in rows) / sum(
            len(r.input_ids) - r.labels_start for r in rows
        )


def one_step_on_the_mean(config, start: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One SGD step on the weighted mean of all clients' gradients at `start`."""
    plain = Plain(config)
    plain.load(start)
    whole = sum(share_of(c) for c in range(3))
    mean = {n: np.zeros(p.shape) for n, p in plain.parameters.items()}
    for client in range(3):
        for name, gradient in plain.gradient(client, 0).items():
            mean[name] += share_of(client) / whole * gradient.numpy().astype(np.float64)
    return {n: start[n] - config.train.lr * g for n, g in mean.items()}


def fedavg(config, start: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run all rounds of plain federated averaging over the three clients. With rounds of one epoch, the
    learning rate falls from round to round (schedule=linear). Under staleness, the last update
    has not arrived when a round starts: a client starts from the state before it, plus a fraction of its own
    delta, which is the alignment of the updates in the round before.
    """
    plain = Plain(config)
    state = start
    is_epoch = config.federation.round_budget == "epoch"
    whole = sum(share_of(c) for c in range(3))
    waiting = []
    own_deltas = {}
    fraction = 1 / 3
    for number in range(config.federation.rounds):
        change = {n: np.zeros(t.shape) for n, t in state.items()}
        square = 0.0
        if is_epoch:
            left = 1 - number / config.federation.rounds
            plain.config = replace(config, train=replace(config.train, lr=config.train.lr * left))
        for client in range(3):
            steps = -(-ROWS[client] // config.train.micro_batch) if is_epoch else config.train.local_steps
            begin = (
                _add(state, {n: fraction * t for n, t in own_deltas[client].items()})
                if client in own_deltas
                else state
            )
            plain.load(begin)
            plain.local_steps(client, number * steps, steps)
            delta = {n: t.astype(np.float64) - begin[n] for n, t in plain.state().items()}
            if config.federation.staleness:
                own_deltas[client] = delta
            for name in change:
                change[name] += share_of(client) / whole * delta[name]
                square += share_of(client) / whole * (delta[name] ** 2).sum()
        waiting.append((change, square))
        if len(waiting) > config.federation.staleness:
            first, mean_square = waiting.pop(0)
            state = _add(state, first)
            fraction = sum((t**2).sum() for t in first.values()) / mean_square
    for change, _ in waiting:
        state = _add(state, change)
    return state


def _add(state: dict[str, np.ndarray], change: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: (t + change[n]).astype(np.float32) for n, t in state.items()}


def alone(config, start: dict[str, np.ndarray]) -> list[float]:
    """Held-out loss of every client trained for the whole run on its own rows."""
    plain = Plain(config)
    losses = []
    for client in range(3):
        plain.load(start)
        plain.local_steps(client, 0, config.federation.rounds * config.train.local_steps)
        losses.append(plain.held_out_loss())
    return losses
