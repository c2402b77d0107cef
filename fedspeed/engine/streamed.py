"""An engine that executes the model layer by layer, with the frozen base in a store and the clients'
trainable tensors in DeepSpeed engines.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from deepspeed.accelerator import get_accelerator

from fedspeed.data.batches import Batch, StepBatches
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.client_engine import Sums, Tensors
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.clock import Clock
from fedspeed.engine.compute.micro_batches import MicroBatchTask, seed_of
from fedspeed.engine.generation.pieces import Piece
from fedspeed.engine.generation.stage import PieceStage
from fedspeed.engine.groups import Groups
from fedspeed.engine.instruction_executor import InstructionExecutor, StreamSchedule
from fedspeed.engine.layer_major_executor import LayerMajorExecutor
from fedspeed.engine.store_engine import StoreEngine, evaluation_passes
from fedspeed.schedule.schedules import layer_major

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StreamedEngine(StoreEngine):
    """Execute the model block by block, on one rank or on each rank of a client."""

    kind = "streamed"

    def __init__(
        self,
        model: "PreTrainedModel",
        states: list[ClientState],
        groups: Groups,
        *,
        store: BaseStore,
        executor: LayerMajorExecutor,
        clock: Clock,
    ):
        super().__init__(model, states, groups, matched_group=store.matched_group, store=store, clock=clock)
        self._executor = executor
        self._piece_stage = PieceStage(model, store, executor.chunks, rows=self._logit_rows)
        self._player = InstructionExecutor()
        self._steps = 0  # local steps since `load`, for the seeds of dropout

    def _load(
        self, slot: int, state: Tensors, optimizer: Tensors | None, frozen: frozenset[str], seed: int
    ) -> None:
        super()._load(slot, state, optimizer, frozen, seed)
        self._steps = 0

    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        self._count_pass()
        with self._clock.stage("compute"):
            tasks = [
                self._task(slot, i, step) for slot, step in enumerate(work) for i in range(len(step.micro))
            ]
            self._steps += 1
            scores, grads = self._executor.train(
                tasks, [self._states[slot].tensors() for slot in range(len(work))]
            )
            sums = [Sums()] * len(work)
            for task, score in zip(tasks, scores):
                sums[task.owner] += Sums(score.loss, task.batch.answer_tokens)
            for slot in range(len(work)):
                self._accumulate(slot, grads[slot])
            get_accelerator().synchronize()  # so that the clock includes work that is still queued
        return sums

    def _task(self, slot: int, number: int, step: StepBatches) -> MicroBatchTask:
        state = self._states[slot]
        scale = self.groups.client_size / max(1, step.step_answer_tokens) * state.scaler.scale
        return MicroBatchTask(step.micro[number], slot, scale, seed_of(state.seed, self._steps, number))

    def evaluate(self, work: list[list[Batch]]) -> list[Sums]:
        sums = [Sums()] * len(work)
        tensors = self._states[0].tensors()
        for portion in evaluation_passes(work):
            self._count_pass()
            with self._clock.stage("compute"):
                scores = self._executor.evaluate(
                    [MicroBatchTask(batch, 0) for _, batch in portion], [tensors]
                )
            for (i, batch), score in zip(portion, scores):
                sums[i] += Sums(score.loss, batch.answer_tokens, score.exact, score.rows)
        return sums

    def begin_pieces(self) -> None:
        self.model.eval()

    def piece_passes(self, pieces: Sequence[Piece]) -> int:
        return min(1, len(pieces))

    def compute_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        stage = self._piece_stage
        chunks = len(self._executor.chunks)
        stream = layer_major(chunks, len(pieces), train=False)
        stage.begin(pieces, [self._states[0].tensors()] * len(pieces), stream, ahead=True)
        self._player.execute_standalone(StreamSchedule(stream), chunks=chunks, compute=stage)
        return [values.cpu().numpy() for _, values in sorted(stage.end().items())]

    def _idle_pass(self, backward: bool) -> None:
        if backward:
            self._executor.train([], [])
        else:
            self._executor.evaluate([], [])

    @property
    def device_bytes(self) -> int:
        return max(super().device_bytes, self._executor.budget.peak)

    @property
    def base_bytes(self) -> int:
        return sum(tensor.nbytes for unit in self.store.units for tensor in unit.tensors)
