"""Layer-major execution on one rank: all micro-batches of a step go through one block, then through the next.

The usual order takes one micro-batch through all blocks, so a base that does not fit on the device is loaded
twice per micro-batch. In this order it is loaded twice per optimizer step, whatever the number of
micro-batches (`schedules.layer_major`).

Clients that share a rank share each load: the trainable tensors of a micro-batch's client are bound to the
blocks while it is computed.
"""

import gc
import socket
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from fedspeed import activity
from fedspeed.engine.activation_policy import BudgetedActivationPolicy
from fedspeed.engine.activations import ActivationBudget
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.compute.micro_batches import MicroBatchTask, Score, Tensors
from fedspeed.engine.instruction_executor import InstructionExecutor, StreamSchedule
from fedspeed.engine.stage import Stage
from fedspeed.log import LOG
from fedspeed.models.blocks import Anatomy
from fedspeed.schedule.instructions import Instruction, Release
from fedspeed.schedule.schedules import layer_major

CACHED_STREAMS = 64


class LayerMajorExecutor:
    """Run passes over a model whose frozen parameters are in a `BaseStore`. A pass without micro-batches
    computes nothing, and takes part in the loads of other ranks.

    Args:
        model: as built, with its trainable parameters inside the blocks.
        budget: for activations that are kept for the backward pass.
        inputs: where block inputs are stored; auto: on the device as far as the budget allows.
        compiled: whether blocks are compiled.
        logits_mib: engine.logits_mib.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Anatomy,
        store: BaseStore,
        budget: ActivationBudget,
        *,
        inputs: Literal["auto", "device", "host"] = "auto",
        compiled: bool = False,
        logits_mib: int | str = "auto",
    ):
        depth = len(parts.blocks)
        self._store = store
        self._depth = depth
        self._lowest = next(
            b for b, block in enumerate(parts.blocks) if any(p.requires_grad for p in block.parameters())
        )
        self.policy = BudgetedActivationPolicy(budget, inputs, blocks=depth, lowest=self._lowest)
        self.chunks = [range(b, b + 1) for b in range(depth)]
        self.stage = Stage(
            model,
            parts,
            store,
            self.chunks,
            policy=self.policy,
            lowest=self._lowest,
            compiled=compiled,
            logits_mib=logits_mib,
        )
        self._player = InstructionExecutor()
        self._streams = lru_cache(CACHED_STREAMS)(layer_major)

    @property
    def budget(self) -> ActivationBudget:
        """The budget of activations that are kept for the backward pass."""
        return self.policy.budget

    def train(
        self, tasks: Sequence[MicroBatchTask], owners: Sequence[Tensors]
    ) -> tuple[list[Score], list[Tensors]]:
        """Compute the forward and backward pass of a whole optimizer step.

        Args:
            owners: trainable tensors by name, for each client.

        Returns:
            the score of each micro-batch, and for each client the gradients [fp32] by name of the sum of
            scale * loss over its micro-batches.
        """
        try:
            return self._play(tasks, owners, train=True)
        except torch.OutOfMemoryError:
            # Another process may have taken the free memory. Ranks whose loads are matched cannot repeat the
            # pass, since the others would not.
            if self._store.matched_group is not None or not self.budget.give_up():
                raise
        LOG.info(
            f"{socket.gethostname()}: the device has become too full for activations that were kept for the "
            "backward pass; they are computed again from now on (engine.activation_gib=auto)"
        )
        get_accelerator().synchronize()  # no copy may be in progress into memory that is released
        self.policy.inputs.forget()
        gc.collect()
        get_accelerator().empty_cache()
        return self._play(tasks, owners, train=True)

    @torch.no_grad()
    def evaluate(self, tasks: Sequence[MicroBatchTask], owners: Sequence[Tensors]) -> list[Score]:
        """Compute the forward pass only; returns the score of each micro-batch."""

        def report(instruction: Instruction) -> None:
            if isinstance(instruction, Release) and isinstance(instruction.chunk, int):
                activity.advance(len(tasks) / self._depth)

        return self._play(tasks, owners, train=False, done=report)[0]

    def _play(
        self,
        tasks: Sequence[MicroBatchTask],
        owners: Sequence[Tensors],
        *,
        train: bool,
        done: Callable[[Instruction], None] | None = None,
    ) -> tuple[list[Score], list[Tensors]]:
        stream = self._streams(self._depth, len(tasks), lowest=self._lowest, train=train)
        self.stage.begin(tasks, owners, stream, train=train, ahead=True)
        self._player.execute_standalone(StreamSchedule(stream, done), chunks=self._depth, compute=self.stage)
        scores, grads = self.stage.end()
        return list(scores.values()), grads
