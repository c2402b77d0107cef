"""What engines have in common whose model lies across ranks."""

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from deepspeed import comm as dist

from fedspeed.data.batches import StepBatches
from fedspeed.engine.base.store import BaseStore
from fedspeed.engine.client_engine import Sums
from fedspeed.engine.client_state import ClientState
from fedspeed.engine.compute.micro_batches import MicroBatchTask, Score
from fedspeed.engine.generation.stage import PieceStage
from fedspeed.engine.groups import Groups, world_deadline
from fedspeed.engine.pipeline.engine import FederatedPipelineEngine
from fedspeed.engine.pipeline.generation import PipelinedGeneration
from fedspeed.engine.pipeline.transfers import Routes, Transfers
from fedspeed.engine.player import StageCompute
from fedspeed.engine.stage import Stage
from fedspeed.engine.store_engine import StoreEngine
from fedspeed.schedule.instructions import Micro, Pipeline, Step, Stream
from fedspeed.schedule.layout import Layout
from fedspeed.schedule.schedules import forward_only

SCHEDULES = 64  # kept, by what they were made for


class PipelinedEngine(PipelinedGeneration, StoreEngine):
    """Every rank of the torch world is a stage; it holds the trainable tensors of its blocks, for every
    client that trains there.

    Args:
        states: of this stage, one for each client that trains at the same time.
        loads: whether chunks are loaded and released.
    """

    def __init__(
        self,
        net,
        states: list[ClientState],
        groups: Groups,
        *,
        matched_group,
        store: BaseStore,
        pipe: FederatedPipelineEngine,
        stage: Stage,
        layout: Layout,
        loads: bool,
        clock,
    ):
        super().__init__(net, states, groups, matched_group=matched_group, store=store, clock=clock)
        self.pipe = pipe
        self.layout = layout
        self._stage, self._loads, self._me = stage, loads, dist.get_rank()
        self._piece_stage = PieceStage(net, store, layout.chunks, rows=self._logit_rows)
        self._routes = Routes(world_deadline(), self._device)
        self._busy_s = self._pass_s = 0.0  # of training passes
        shapes = {n: p for n, p in sorted(net.named_parameters()) if p.requires_grad}
        self._shapes = {name: p.shape for name, p in shapes.items()}
        self._dtype = next(iter(shapes.values())).dtype
        self._streams = lru_cache(SCHEDULES)(self._made)

    @property
    def names(self) -> list[str]:
        """Of the whole model; this rank's states have those of its own stage."""
        return list(self._shapes)

    @property
    def data_share(self) -> tuple[int, int]:
        """A client's ranks work on the same rows."""
        return 1, 0

    @abstractmethod
    def _schedule(self, micros: tuple[Micro, ...]) -> tuple[Stream, ...]:
        """Of a training pass."""

    def _made(self, micros: tuple[Micro, ...], train: bool) -> tuple[Stream, ...]:
        if train:  # steps are taken when `step` is called
            return tuple(
                tuple(work for work in stream if not isinstance(work, Step))
                for stream in self._schedule(micros)
            )
        return forward_only(Pipeline(self.layout.ranks, self.layout.holders, micros), self._loads)

    def _play(
        self, micros: Sequence[Micro], tasks: Sequence[MicroBatchTask], *, train: bool
    ) -> dict[int, Score]:
        """Take micro-batches through the pipeline, and to `train` back, so that gradients wait for a step.

        Returns:
            scores of the micro-batches whose labels are here.
        """
        streams = self._streams(tuple(micros), train)
        tensors = [state.tensors() for state in self._states]
        self._stage.begin(tasks, tensors, streams[self._me], train=train)
        self._execute(streams, self._stage, lambda m: tasks[m].batch.attention_mask.shape, train=train)
        scores, grads = self._stage.end()
        if train:
            for slot in sorted({micro.client for micro in micros}):
                self._accumulate(slot, grads[slot])
        return scores

    def _execute(
        self,
        streams: Sequence[Stream],
        stage: StageCompute,
        shape_of: Callable[[int], tuple[int, ...]],
        *,
        train: bool,
    ) -> None:
        """Execute this rank's stream of one pass. Only what trains counts as busy.

        Args:
            streams: of all ranks. shape_of: rows and tokens of a micro-batch.
        """
        hidden = self.model.config.hidden_size
        before = self._busy_s
        transfers = Transfers(
            self._routes,
            streams,
            self._me,
            shape_of=lambda m: torch.Size((*shape_of(m), hidden)),
            dtype=self._dtype,
            device=self._device,
        )
        self.pipe.play(streams[self._me], len(self.layout.chunks), stage, transfers, self._noted)
        if not train:
            self._busy_s = before

    def _play_steps(self, slots: Sequence[int], lr: float) -> list[bool]:
        """Take the steps of some slots, in the same order on all ranks, since a norm or an overflow is found
        out together; by slot, whether it moved.
        """
        moved: dict[int, bool] = {}

        def step(slot: int) -> None:
            moved[slot] = self._move(slot, lr)

        self.pipe.play_steps(tuple(Step(slot) for slot in slots), step, self._noted)
        return [moved[slot] for slot in slots]

    @contextmanager
    def _passing(self):
        """Account to training what is done inside. It begins or ends with words from all ranks, so that
        waiting for the slowest is a part of it.
        """
        begin = time.perf_counter()
        yield
        self._pass_s += time.perf_counter() - begin

    def _gradients(self, work: Sequence[StepBatches]) -> list[Sums]:
        with self._passing():
            return self._gradients_together(work)

    def _step(self, slots: Sequence[int], lr: float) -> list[bool]:
        with self._passing():
            return self._step_together(slots, lr)

    @abstractmethod
    def _gradients_together(self, work: Sequence[StepBatches]) -> list[Sums]:
        """See `gradients`."""

    @abstractmethod
    def _step_together(self, slots: Sequence[int], lr: float) -> list[bool]:
        """See `step`."""

    def _noted(self, kind: str, name: str, begin: float, end: float) -> None:
        self._busy_s += end - begin if kind in ("compute", "step") else 0.0
        self._clock.trace.span(kind, name, begin, end)

    def take_bubble(self) -> tuple[float, float]:
        taken = self._pass_s - self._busy_s, self._pass_s
        self._busy_s = 0.0
        self._pass_s = 0.0
        return taken

    @property
    def base_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)
