"""The common part of engines that store the frozen base themselves, and compute gradients outside of
DeepSpeed.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from fedspeed.data.batches import Batch
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.clock import Clock
from fedspeed.engine.groups import Groups
from fedspeed.engine.masters import Tensors
from fedspeed.engine.surrogate_loss import surrogate_loss
from fedspeed.schedule.limits import EVAL_TOKENS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel


class StoreEngine(ClientEngine):
    """An engine with a client slot for each client that trains at the same time. A pass takes their
    micro-batches of one optimizer step through the model. The gradients are kept in fp32 until `step` passes
    them to the clients' DeepSpeed engines.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        states: list[ClientState],
        groups: Groups,
        *,
        matched_group: "ProcessGroup | None",
        store: BaseStore,
        clock: Clock,
    ):
        super().__init__(model, states, groups, matched_group, clock)
        self.store = store
        self._grads: dict[int, Tensors] = {}  # by slot: [fp32] by name, times the loss scale

    def train_passes(
        self, clients: int, steps: int, accumulation: int, *, gradients: int = 1, reads: int = 0
    ) -> int:
        return -(-clients // self.client_slots) * steps * gradients

    def _drop_gradients(self, slot: int) -> None:
        self._grads.pop(slot, None)

    def _accumulate(self, slot: int, grads: Tensors) -> None:
        """Add gradients, of some or all tensors, to those of a slot. They may be kept and changed."""
        sums = self._grads.setdefault(slot, {})
        for name, grad in grads.items():
            sums[name] = sums[name].add_(grad) if name in sums else grad

    def _add_to_gradients(self, slot: int, arrays: Mapping[str, np.ndarray], scale: float) -> None:
        state = self._states[slot]
        if slot not in self._grads:
            self._grads[slot] = {
                name: torch.zeros(part.shape, device=self._device) for name, part in state.slices.items()
            }
        for name in state.slices.keys() & arrays.keys():
            added = torch.from_numpy(np.asarray(arrays[name], np.float32)).to(self._device)
            self._grads[slot][name].add_(added, alpha=scale * state.scaler.scale)

    def _step(self, slots: Sequence[int], lr: float) -> list[bool]:
        with self._clock.stage("compute"):
            applied = [self._step_slot(slot, lr) for slot in slots]
            get_accelerator().synchronize()
        return applied

    def _step_slot(self, slot: int, lr: float) -> bool:
        """Take an optimizer step with the gradients of a slot; returns whether it was applied."""
        state = self._states[slot]
        state.backward(surrogate_loss(state, self._grads.pop(slot)))
        return state.step(lr)

    def eval_passes(self, work: list[list[Batch]]) -> int:
        return len(evaluation_passes(work))

    def _away(self) -> list[torch.Tensor]:
        return self.store.away()

    def take_loaded(self) -> int:
        return sum(self.store.take_loads().bytes.values())

    def close(self) -> None:
        self.store.close()


def evaluation_passes(work: list[list[Batch]]) -> list[list[tuple[int, Batch]]]:
    """Divide batches into passes of at most EVAL_TOKENS tokens; returns (number of its list, batch) of
    each.
    """
    passes: list[list[tuple[int, Batch]]] = []
    tokens = 0
    for i, batches in enumerate(work):
        for batch in batches:
            if not passes or tokens + batch.input_ids.size > EVAL_TOKENS:
                passes.append([])
                tokens = 0
            passes[-1].append((i, batch))
            tokens += batch.input_ids.size
    return passes
