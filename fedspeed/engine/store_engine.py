"""Engines whose frozen base lies in a store of its own, and whose gradients are computed beside DeepSpeed's
engines: what they have in common.
"""

from collections.abc import Mapping

import numpy as np
import torch

from fedspeed.data.batches import Batch
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.masters import Tensors
from fedspeed.engine.surrogate_loss import surrogate_loss
from fedspeed.schedule.limits import EVAL_TOKENS


class StoreEngine(ClientEngine):
    """A client slot for each client that trains at the same time. A pass takes all their micro-batches of one
    optimizer step through the model; the gradients wait in fp32 until `step` hands them to the clients'
    DeepSpeed engines.
    """

    def __init__(self, model, states: list[ClientState], groups, *, matched_group, store: BaseStore, clock):
        super().__init__(model, states, groups, matched_group, clock)
        self.store = store
        self._grads: dict[int, Tensors] = {}  # by slot: [fp32] by name, times the loss scale

    def train_passes(
        self, clients: int, steps: int, accumulation: int, *, gradients: int = 1, reads: int = 0
    ) -> int:
        return -(-clients // self.client_slots) * steps * gradients

    def _forget(self, slot: int) -> None:
        self._grads.pop(slot, None)

    def _accumulate(self, slot: int, grads: Tensors) -> None:
        """Keep gradients of a slot for its step; those that wait already are added to."""
        waiting = self._grads.setdefault(slot, grads)
        if waiting is not grads:
            for name, grad in grads.items():
                waiting[name] += grad

    def _add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        state = self._states[slot]
        if slot not in self._grads:
            self._grads[slot] = {
                name: torch.zeros(place.shape, device=self._device) for name, place in state.places.items()
            }
        for name in state.places.keys() & arrays.keys():
            added = torch.from_numpy(np.asarray(arrays[name], np.float32)).to(self._device)
            self._grads[slot][name].add_(added, alpha=scale * state.scaler.scale)

    def _move(self, slot: int, lr: float) -> bool:
        """Step with the gradients that wait in a slot."""
        state = self._states[slot]
        state.backward(surrogate_loss(state, self._grads.pop(slot)))
        return state.step(lr)

    def eval_passes(self, work: list[list[Batch]]) -> int:
        return len(evaluation_passes(work))

    def _away(self):
        return self.store.away()

    def take_loaded(self) -> int:
        return sum(self.store.take_loads().bytes.values())

    def close(self) -> None:
        self.store.close()


def evaluation_passes(work: list[list[Batch]]) -> list[list[tuple[int, Batch]]]:
    """(list number, batch) of all batches in order, cut into passes of bounded size."""
    passes: list[list[tuple[int, Batch]]] = []
    tokens = EVAL_TOKENS
    for i, batches in enumerate(work):
        for batch in batches:
            if tokens + batch.input_ids.size > EVAL_TOKENS or not passes:
                passes.append([])
                tokens = 0
            passes[-1].append((i, batch))
            tokens += batch.input_ids.size
    return passes
