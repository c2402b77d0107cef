"""Layer-major execution on one rank: every micro-batch of a step through one block, then through the next.

The usual order takes one micro-batch through all blocks, so that a base which does not fit on the device is
loaded twice a micro-batch. Here it is loaded twice an optimizer step, whatever the number of micro-batches
(`schedules.layer_major`).

Clients that share a rank share each load: a micro-batch belongs to an owner, whose trainable tensors are
bound while it is computed.
"""

import gc
import socket
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import torch
from deepspeed.accelerator import get_accelerator

from fedspeed import activity
from fedspeed.engine.activation_policy import BudgetedActivationPolicy
from fedspeed.engine.activations import ActivationBudget
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.compute.micro_batches import MicroBatchTask, Score, Tensors
from fedspeed.engine.player import Player, StreamSchedule
from fedspeed.engine.stage import Stage
from fedspeed.log import LOG
from fedspeed.models.blocks import Anatomy
from fedspeed.schedule.instructions import Instruction, Release
from fedspeed.schedule.schedules import layer_major

STREAMS = 64  # kept, by what they were made for


class Executor:
    """Runs passes over a model whose frozen parameters are in a `BaseStore`. One over no micro-batches
    computes nothing: it takes part in the loads of the ranks that have some.

    Args:
        model: as built, its trainable parameters inside the blocks.
        budget: for activations that are not computed again.
        inputs: where the inputs of blocks wait; auto: on the device as far as the budget allows.
        compiled: whether blocks are compiled.
    """

    def __init__(
        self,
        model,
        parts: Anatomy,
        store: BaseStore,
        budget: ActivationBudget,
        *,
        inputs: Literal["auto", "device", "host"] = "auto",
        compiled: bool = False,
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
            model, parts, store, self.chunks, policy=self.policy, lowest=self._lowest, compiled=compiled
        )
        self._player, self._streams = Player(), lru_cache(STREAMS)(layer_major)

    @property
    def budget(self) -> ActivationBudget:
        return self.policy.budget

    def train(
        self, tasks: Sequence[MicroBatchTask], owners: Sequence[Tensors]
    ) -> tuple[list[Score], list[Tensors]]:
        """Go forwards and backwards through a whole optimizer step.

        Args:
            owners: trainable tensors by name, of each owner.

        Returns:
            the score of each micro-batch, and by owner the gradients [fp32, by name] of the sum of scale *
            loss over its micro-batches.
        """
        try:
            return self._play(tasks, owners, train=True)
        except torch.OutOfMemoryError:
            # Others may have taken what was free. Ranks that load together would not do so again together.
            if self._store.matched_group is not None or not self.budget.give_up():
                raise
        LOG.info(
            f"{socket.gethostname()}: the device has become too full for activations that were kept for the "
            "backward "
            "pass; they are computed again from now on (engine.activation_gib=auto)"
        )
        get_accelerator().synchronize()  # nothing may still be on its way into memory that is given out anew
        self.policy.inputs.forget()
        gc.collect()
        get_accelerator().empty_cache()
        return self._play(tasks, owners, train=True)

    @torch.no_grad()
    def evaluate(self, tasks: Sequence[MicroBatchTask], owners: Sequence[Tensors]) -> list[Score]:
        """Go forwards only."""

        def passed(work: Instruction) -> None:
            if isinstance(work, Release) and isinstance(work.chunk, int):
                activity.advance(len(tasks) / self._depth)

        return self._play(tasks, owners, train=False, done=passed)[0]

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
        self._player.execute_standalone(StreamSchedule(stream, done), chunks=self._depth, computes=self.stage)
        scores, grads = self.stage.end()
        return list(scores.values()), grads
