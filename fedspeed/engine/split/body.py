"""The engine of the server in split learning: the blocks between the two ends that clients have. It sees
hidden states and gradients, and neither tokens nor labels nor losses.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.client_engine import Sums
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.clock import Clock
from fedspeed.engine.compute.micro_batches import Call, MicroBatchTask, seed_of
from fedspeed.engine.groups import Groups
from fedspeed.engine.masters import Tensors
from fedspeed.engine.split.messages import (
    HIDDEN,
    HIDDEN_GRADIENT,
    LAST,
    LENGTHS,
    OUTPUT,
    OUTPUT_GRADIENT,
    Limits,
    Message,
    NotFiniteError,
    check_names,
)
from fedspeed.engine.split.part import PartEngine
from fedspeed.engine.split.rows import Rows, from_array, to_array

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Graph:
    """Input and output of the blocks for one micro-batch, connected by an autograd graph."""

    x: torch.Tensor
    y: torch.Tensor
    rows: Rows


class BodyEngine(PartEngine):
    """The blocks of a model between its ends, with a client slot for each client that is served at the same
    time. All ranks of the server compute the same.

    Args:
        recompute: whether blocks are computed again in the backward pass, instead of keeping their
            activations while the client computes its loss.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        states: list[ClientState],
        groups: Groups,
        *,
        store: BaseStore,
        clock: Clock,
        recompute: bool,
    ):
        super().__init__(model, states, groups, store=store, clock=clock)
        self._recompute = recompute
        self._graphs: dict[int, _Graph] = {}  # by slot: of the micro-batch whose gradient is still to come
        self._counts = [0] * len(states)  # micro-batches since `load`, for the seeds of dropout
        self._like = torch.empty((0, model.config.hidden_size), dtype=model.dtype, device=self._device)

    def _load(
        self, slot: int, state: Tensors, optimizer: Tensors | None, frozen: frozenset[str], seed: int
    ) -> None:
        super()._load(slot, state, optimizer, frozen, seed)
        self._counts[slot] = 0
        self._graphs.pop(slot, None)

    def answer(self, slot: int, message: Mapping[str, np.ndarray], *, most: Limits, train: bool) -> Message:
        """Return the answer to a message of the client in a slot: the blocks' output for hidden states, or,
        while training, the gradient of their input for the gradient of that output. The gradients of the
        blocks' own tensors are added to the slot's.

        Args:
            most: that the message may have.

        Raises:
            FedSpeedError: the message is not the one that is due.
            NotFiniteError: while training, a value of it or of the answer is not finite. The slot's gradients
                are of no use then.
        """
        with self.measured() if train else nullcontext(), self._clock.stage("compute"):
            if train and slot in self._graphs:
                check_names(message, (OUTPUT_GRADIENT,), (OUTPUT_GRADIENT, LAST))
                answer = self._backward(slot, message)
            else:
                check_names(message, (HIDDEN, LENGTHS))
                answer = self._forward(slot, message, most, train=train)
        [(name, values)] = answer.items()
        if train:
            _check_finite("the answer to a message", name, values)
        return {name: to_array(values)}

    def ends_step(self, message: Mapping[str, np.ndarray]) -> bool:
        """Return whether a client's local step ends with the answer to its message."""
        return LAST in message

    def _forward(self, slot: int, message: Mapping[str, np.ndarray], most: Limits, *, train: bool) -> Tensors:
        rows = Rows.received(message[LENGTHS], most)
        hidden = from_array(message, HIDDEN, self._like, rows.tokens)
        if train:
            _check_finite("a message", HIDDEN, hidden)
        x = rows.unpack(hidden).requires_grad_(train)
        state = self._states[slot]
        task = MicroBatchTask(_without_content(rows), slot, seed=seed_of(state.seed, self._counts[slot], 0))
        self._counts[slot] += 1
        self.model.train(train)
        self._bind(slot)
        _, calls = self._compute.enter(task, None)
        with torch.set_grad_enabled(train):
            y = self._through_all(task, calls, x)
        if train:
            self._graphs[slot] = _Graph(x, y, rows)
        return {OUTPUT: rows.pack(y.detach())}

    def _through_all(self, task: MicroBatchTask, calls: Sequence[Call], x: torch.Tensor) -> torch.Tensor:
        blocks = range(len(self._parts.blocks))
        if not (self._recompute and torch.is_grad_enabled()):
            return self._through(blocks, task, calls, x)
        for b in blocks:  # a task's masks of dropout are drawn again from its seed
            x = checkpoint(
                self._compute.block, b, task, calls, x, use_reentrant=False, preserve_rng_state=False
            )
        return x

    def _backward(self, slot: int, message: Mapping[str, np.ndarray]) -> Tensors:
        graph = self._graphs.pop(slot)
        output_grad = from_array(message, OUTPUT_GRADIENT, self._like, graph.rows.tokens)
        _check_finite("a message", OUTPUT_GRADIENT, output_grad)
        y_grad = graph.rows.unpack(output_grad)
        self._bind(slot)
        x_grad = self._differentiate(slot, range(len(self._parts.blocks)), graph.y, y_grad, x=graph.x)
        assert x_grad is not None, "the gradient is asked for"
        self._pending.add(slot)
        return {HIDDEN_GRADIENT: graph.rows.pack(x_grad)}

    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        raise AssertionError("the body of a split model has no rows of its own; clients send hidden states")

    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        raise AssertionError("the body of a split model has no rows of its own; clients send hidden states")

    def _idle_pass(self, backward: bool) -> None:
        raise AssertionError("the ranks of a server answer the same messages")


def _check_finite(what: str, name: str, values: torch.Tensor) -> None:
    if not values.isfinite().all():
        raise NotFiniteError(f"{what} has values of {name} that are not finite; lower train.lr")


def _without_content(rows: Rows) -> Batch:
    """Return a batch of the right shape, from which masks and positions follow."""
    mask = rows.mask.astype(np.int64)
    return Batch(np.zeros_like(mask), np.full_like(mask, -100), mask, answer_tokens=0)
