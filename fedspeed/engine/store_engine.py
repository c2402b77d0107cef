"""Engines whose frozen base lies in a store of its own, and whose gradients are computed beside DeepSpeed's engines: what they have in common."""

from collections.abc import Mapping

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.data.batches import Batch
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.masters import Tensors
from fedspeed.schedule.limits import EVAL_TOKENS


class StoreEngine(ClientEngine):
    """A client slot for each client that trains at the same time. A pass takes all their micro-batches of one optimizer step through the model."""

    def __init__(self, model, states: list[ClientState], groups, matched, store: BaseStore, clock):
        super().__init__(model, states, groups, matched, clock)
        self.store = store
        self._waiting: dict[int, Tensors] = {}  # client slot -> gradients that wait for a step

    def load(self, state, optimizer=None, *, frozen=frozenset(), seed=0, slot=0):
        super().load(state, optimizer, frozen=frozen, seed=seed, slot=slot)
        self._waiting.pop(slot, None)

    def _wait(self, slot: int, grads: Tensors) -> None:
        """Add the gradients of a pass to those that wait."""
        waiting = self._waiting.setdefault(slot, grads)
        if waiting is not grads:
            for name, grad in grads.items():
                waiting[name] += grad

    def _step(self, lr: float) -> list[bool]:
        waiting, self._waiting = self._waiting, {}
        moved = []
        with self._clock.stage("compute"):
            for slot in sorted(waiting):
                state = self._states[slot]
                state.backward(hand_over(state, waiting[slot]))
                moved.append(state.step(lr))
            get_accelerator().synchronize()  # the clock measures what was done, not what was asked for
        return moved

    def add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        state, waiting = self._states[slot], self._waiting[slot]
        for name in waiting.keys() & arrays.keys():
            added = torch.from_numpy(np.asarray(arrays[name], np.float32)).to(waiting[name].device)
            waiting[name] += (scale * state.scaler.scale) * added

    def train_passes(self, clients: int, steps: int, accumulation: int) -> int:
        return -(-clients // self.client_slots) * steps

    def eval_passes(self, work: list[list[Batch]]) -> int:
        return len(portions(work))

    def _away(self):
        return self.store.away()

    def take_loaded(self) -> int:
        return sum(self.store.take_loads().bytes.values())

    def close(self) -> None:
        self.store.close()


def hand_over(state: ClientState, grads: Tensors) -> torch.Tensor:
    """A loss whose backward gives the trainable parameters the gradients that the layers have computed, scaled as `state` wants them.

    So DeepSpeed reduces, clips, checks and applies them as it does its own.

    Args:
        grads: [fp32] by name, of all trainable tensors.
    """
    flats = [torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device) for parameter in state.parameters]
    flat_of = {id(parameter): flat for parameter, flat in zip(state.parameters, flats)}
    places = [place.of(flat_of[id(place.parameter)]) for place in state.places.values()]
    torch._foreach_copy_(places, [grads[name] for name in state.places])
    return _HandOver.apply(state.scaler.scale, flats, *state.parameters)


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, grads, *parameters):
        ctx.scale, ctx.grads = scale, grads
        ctx.shapes = [(p.shape, p.dtype) for p in parameters]
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, upward):
        factor = upward.float() / ctx.scale  # the gradients carry the loss scale already, and DeepSpeed multiplies by it
        # In place: nobody else has these sums, and they may be as large as what trains.
        return None, None, *(grad.mul_(factor).to(dtype).view(shape) for grad, (shape, dtype) in zip(ctx.grads, ctx.shapes))


def portions(work: list[list[Batch]]) -> list[list[tuple[int, Batch]]]:
    """(list number, batch) of all batches in order, cut into passes of bounded size."""
    portions, tokens = [], EVAL_TOKENS
    for i, batches in enumerate(work):
        for batch in batches:
            if tokens + batch.input_ids.size > EVAL_TOKENS or not portions:
                portions.append([])
                tokens = 0
            portions[-1].append((i, batch))
            tokens += batch.input_ids.size
    return portions
